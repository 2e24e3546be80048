"""The sections of docs/doraemon.md, one module each; `results.py` puts them together."""
