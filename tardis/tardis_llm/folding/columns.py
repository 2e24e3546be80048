"""Round columns one after the other, while those behind make up for each.

The loop is an operator of torch, so that it can be compiled: kernels are the runtime's, of which nothing here knows,
and `runtime.backend` gives the operator one for the CPU. Elsewhere it runs `by_torch`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # columns of a call, at most

library = torch.library.Library("tardis", "FRAGMENT")
library.define(
    "round_columns(Tensor target, Tensor? base, Tensor scale, Tensor factor, int top, float zero) -> (Tensor, Tensor)"
)


class Rounded(NamedTuple):
    """Levels [columns, out] fp32, and how much each differs from its base."""

    levels: Tensor
    change: Tensor


def round_columns(target: Tensor, base: Tensor | None, scale: Tensor, factor: Tensor, top: int, zero: float) -> Rounded:
    """Round columns of a matrix.

    Row by row, `change_j = level(target_j) - base_j`, and then `target_k -= factor[j, k] change_j` for all k > j, where
    the level of t is `(clamp(round(t / scale + zero), 0, top) - zero) scale`.

    Args:
        target: [columns, out] fp32, `BLOCK` columns at most.
        base: the same shape; None for each target as it is when its turn comes.
        scale: the same shape, not zero.
        factor: [columns, columns] fp32, of which what is above the diagonal counts.
        top: the greatest code.
        zero: the code of 0.
    """
    return Rounded(*torch.ops.tardis.round_columns(target, base, scale, factor, top, zero))


def by_torch(target: Tensor, base: Tensor | None, scale: Tensor, factor: Tensor, top: int, zero: float) -> Rounded:
    """`round_columns`, as it is specified."""
    levels, change = target.clone(), torch.empty_like(target)
    for j, column in enumerate(levels):
        best = (column / scale[j]).add_(zero).round_().clamp_(0, top).sub_(zero).mul_(scale[j])
        torch.sub(best, column if base is None else base[j], out=change[j])
        levels[j + 1 :].addr_(factor[j, j + 1 :], change[j], alpha=-1)
        column.copy_(best)
    return Rounded(levels, change)


library.impl("round_columns", by_torch, "CompositeExplicitAutograd")
