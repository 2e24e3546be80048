"""Pruning by four methods, each of which removes exactly as many weights as asked for, ties included.

magnitude   Han et al. 2015, arXiv 1506.02626: the smallest weights of each matrix go
Wanda       Sun et al. 2023, arXiv 2306.11695: weights scored by their size times the norm of their input
RIA         Zhang et al., "Plug-and-Play", ICLR 2024: weights scored by their share of their row and of their column
SparseGPT   Frantar and Alistarh 2023, arXiv 2301.00774: pruning that makes up for what it removes
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..folding.sweep import Replace, by_columns, sweep

_POWER = 0.5  # of the inputs' norms, in RIA
_BLOCK = 128  # columns whose mask SparseGPT chooses together


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


def prune_magnitude(w: Tensor, sparsity: float) -> Tensor:
    """w [out, in] fp32 with its smallest `floor(out * in * sparsity)` weights zero: one threshold per matrix."""
    return w.masked_fill(smallest(w.abs(), removed(w.numel(), sparsity)), 0)


def wanda_scores(w: Tensor, norms: Tensor) -> Tensor:
    """[out, in] `|W_ij| |X_j|` for w [out, in] and the norms [in] of the inputs over all tokens."""
    return w.abs() * norms


def prune_wanda(w: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    """w [out, in] fp32 with the `floor(in * sparsity)` weights of least score zero in every row.

    Args:
        w: [out, in] fp32.
        norms: [in] fp32, the norm of each input over all tokens.
        sparsity: share of the weights to remove.
    """
    return w.masked_fill(smallest_per_row(wanda_scores(w, norms), removed(w.shape[1], sparsity)), 0)


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


def prune_sparsegpt(w: Tensor, hessian: Tensor, sparsity: float, block: int = _BLOCK) -> Tensor:
    """w [out, in] fp32 with the same share of weights zero in every block of columns, the others adapted.

    Of each block of columns, over all rows, the weights with the least `W_ij^2 / U_jj^2` go, judged when the sweep
    reaches the block.

    Args:
        w: [out, in] fp32.
        hessian: [in, in] `(2 / N) X^T X` of the inputs.
        sparsity: share of the weights to remove.
        block: columns whose mask is chosen together.
    """

    def rule(start: int, columns: Tensor, diagonal: Tensor) -> Replace:
        mask = smallest((columns / diagonal[:, None]).square(), removed(columns.numel(), sparsity))
        return lambda j, column: column.masked_fill(mask[j], 0)

    return sweep(w, hessian, block, by_columns(rule))
