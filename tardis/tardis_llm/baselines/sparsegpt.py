"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): pruning that makes up for what it removes."""

from __future__ import annotations

from torch import Tensor

from ..folding.sweep import Replace, sweep
from .masks import removed, smallest

_BLOCK = 128  # columns whose mask is chosen together


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

    return sweep(w, hessian, block, rule)
