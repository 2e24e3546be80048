"""RIA (Zhang et al., "Plug-and-Play", ICLR 2024): weights scored by their share of their row and of their column."""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import removed, smallest

_POWER = 0.5  # of the inputs' norms


def ria_scores(w: Tensor, norms: Tensor) -> Tensor:
    """[out, in] `(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) |X_j|^0.5`; 0 in a row or column of zeros."""
    size = w.abs()
    least = torch.finfo(size.dtype).tiny
    column, row = size.sum(0, keepdim=True).clamp_min(least), size.sum(1, keepdim=True).clamp_min(least)
    return (size / column + size / row) * norms**_POWER


def prune_ria(w: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    """w [out, in] fp32 with the weights of least score zero: one threshold per matrix.

    Args:
        w: [out, in] fp32.
        norms: [in] fp32, the norm of each input over all tokens.
        sparsity: share of the weights to remove.
    """
    return w.masked_fill(smallest(ria_scores(w, norms), removed(w.numel(), sparsity)), 0)
