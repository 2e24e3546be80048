"""Folded checkpoints: their format, how they are written and loaded, and how they are checked before that."""
