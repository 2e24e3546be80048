"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounding that makes up for its errors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..folding.sweep import Replace, by_columns, sweep
from .rtn import fit_grid, round_to_nearest

_BLOCK = 128  # columns rounded before the rest of the matrix is updated


def quantise_gptq(w: Tensor, hessian: Tensor, bits: int, group: int) -> Tensor:
    """w [out, in] fp32 rounded column by column on the grids of `rtn`, each error carried to the columns after it.

    The grids are those of the weights as they are given, and columns of large inputs come first, while all others are
    left to make up for their errors: what GPTQ's users know as `desc_act` with static groups. A greedy sweep can end
    above plain rounding; rows do not depend on each other, so the rows where it does are rounded to the nearest. On
    the inputs behind `hessian` the result is thus never worse than `round_to_nearest`, but for the rounding of fp32.

    Args:
        w: [out, in] fp32.
        hessian: [in, in] `(2 / N) X^T X` of the inputs.
        bits: 2, 3, 4 or 8.
        group: columns of a row that share scale and zero point; the last group may be shorter.

    Raises:
        InvalidInputError: the weights are too large for fp16 scales.
    """
    grids = [fit_grid(columns.contiguous(), bits) for columns in w.split(group, 1)]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    groups = (order // group).tolist()

    def rule(start: int, columns: Tensor, diagonal: Tensor) -> Replace:
        return lambda j, column: grids[groups[start + j]].nearest(column)

    swept = torch.empty_like(w)
    swept[:, order] = sweep(w[:, order], hessian[order][:, order], _BLOCK, by_columns(rule))
    nearest = round_to_nearest(w, bits, group)
    return torch.where(_worse(swept - w, nearest - w, hessian)[:, None], nearest, swept)


def _worse(change: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    """[out] bool: rows of a change [out, in] whose output error `dW_i H dW_i^T` is above that of another change.

    As H is symmetric, the difference of the two is `(a - b) H (a + b)^T`, which needs but one product.
    """
    return (((change - other) @ hessian.to(change.dtype)) * (change + other)).sum(1) > 0
