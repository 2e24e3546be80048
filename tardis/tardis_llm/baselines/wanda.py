"""Wanda (Sun et al. 2023, arXiv 2306.11695): weights scored by their size times the norm of their input."""

from __future__ import annotations

from torch import Tensor

from .masks import removed, smallest_per_row


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
