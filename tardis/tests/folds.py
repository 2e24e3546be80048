"""Folded tiny models, each made once: tests that share one must not change it."""

from __future__ import annotations

from functools import cache

import torch
from models import tiny_model, tokens
from torch import Tensor
from transformers import PreTrainedModel

from tardis_llm import FoldConfig, FoldReport, fold

#: quick, with room for about a third of the neurons
SETTINGS = FoldConfig(reduction=0.5, predictor_bits=1, probe_tokens=64, sequence_length=32)


def text(windows: int = 40) -> Tensor:
    """Calibration windows [windows, 32] of random bytes."""
    return tokens(windows, 32)


@cache
def folded_tiny(name: str) -> tuple[PreTrainedModel, FoldReport]:
    """`tiny_model(name)`, folded with `SETTINGS` on `text()`."""
    model = tiny_model(name)
    return model, fold(model, text(), SETTINGS)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Logits [2, 16, vocabulary] on tokens that are the same on every call."""
    return model(tokens(2, 16)).logits
