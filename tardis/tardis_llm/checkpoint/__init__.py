"""Folded checkpoints: their format, what must be in them, writing and reading them."""
