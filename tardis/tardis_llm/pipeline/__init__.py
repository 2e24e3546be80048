"""Fold whole models: plan the budget, fold layer by layer, resume what was interrupted."""
