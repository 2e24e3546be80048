"""Folded models in other libraries."""
