"""Folded models in other libraries: transformers, vLLM and lm-eval."""
