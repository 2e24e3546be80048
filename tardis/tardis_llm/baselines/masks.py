"""Which weights a pruning method removes: exactly as many as asked for, ties included."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def removed(count: int, sparsity: float) -> int:
    """How many of `count` weights go: the floor of the product, which fp64 may put a hair below an integer."""
    return math.floor(count * sparsity + 1e-9)


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mask, of the shape of the scores, of exactly the `count` smallest; of equal scores the first go."""
    flat = scores.flatten()
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    mask = flat < threshold
    ties = (flat == threshold).nonzero()[:, 0]
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(scores.shape)


def smallest_per_row(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` smallest scores [rows, columns] of every row; of equal scores the first go."""
    chosen = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
