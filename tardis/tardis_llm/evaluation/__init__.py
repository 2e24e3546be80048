"""Measuring models: perplexity, fix rates, plots."""
