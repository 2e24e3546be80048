"""Magnitude pruning (Han et al. 2015, arXiv 1506.02626): the smallest weights of each matrix go."""

from __future__ import annotations

from torch import Tensor

from .masks import removed, smallest


def prune_magnitude(w: Tensor, sparsity: float) -> Tensor:
    """w [out, in] fp32 with its smallest `floor(out * in * sparsity)` weights zero: one threshold per matrix."""
    return w.masked_fill(smallest(w.abs(), removed(w.numel(), sparsity)), 0)
