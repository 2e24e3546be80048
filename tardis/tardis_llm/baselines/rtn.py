"""Round to nearest: asymmetric low-bit weights, each group of inputs with a scale and a zero point of its own.

A weight is `(code - zero) * scale` with a code and an integer zero point of `bits` bits and a scale in fp16. The range
of a group always contains zero, so zero stays exact. How much of the range to clip is searched per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidInputError

_SHARES = torch.linspace(1.0, 0.2, 33)  # of the range that are tried; the first clips nothing
_LEAST_SCALE = 2.0**-24  # the least positive fp16
_ROWS = 256  # rows handled at once, to keep temporaries small


@dataclass(frozen=True)
class Grid:
    """Levels `(code - zero) * scale` with codes from 0 to `2^bits - 1`.

    Attributes:
        bits: per weight.
        scale: fp16 scales, of any shape.
        zero: uint8 zero points, shaped as the scales.
    """

    bits: int
    scale: Tensor
    zero: Tensor

    def nearest(self, w: Tensor) -> Tensor:
        """The levels nearest to w, fp32, which broadcasts against the scale."""
        scale, zero = self.scale.float(), self.zero.float()
        return (w / scale).round().clamp(-zero, 2**self.bits - 1 - zero) * scale

    def per_group(self) -> Grid:
        """This grid with an axis of length 1 at the end of scale and zero point, to meet groups [..., columns]."""
        return Grid(self.bits, self.scale[..., None], self.zero[..., None])


def fit_grid(w: Tensor, bits: int) -> Grid:
    """The grid with the least squared error per group among those that clip more or less of its range, or nothing.

    Args:
        w: [..., columns] fp32, one group per row. Zeros at its end change nothing.
        bits: 2, 3, 4 or 8.

    Returns:
        A grid whose scale and zero point are [...].

    Raises:
        InvalidInputError: the weights are too large for fp16 scales.
    """
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    if not float((high - low).max()) / (2**bits - 1) <= torch.finfo(torch.float16).max:
        raise InvalidInputError("weights are too large for fp16 scales; check the checkpoint's weights.")
    grids = _candidates(low, high, bits)
    best = next(grids)  # clips nothing
    least = _squared_error(best, w)
    for grid in grids:
        error = _squared_error(grid, w)
        better = error < least
        scale, zero = torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero)
        best, least = Grid(bits, scale, zero), torch.minimum(error, least)
    return best


def _candidates(low: Tensor, high: Tensor, bits: int) -> Iterator[Grid]:
    """Grids over shares of the range from low to high, which contains zero; the zero point rounded either way."""
    top = 2**bits - 1
    for share in _SHARES.tolist():
        scale = ((high - low) * share / top).half().clamp_min(_LEAST_SCALE)
        zero = -low * share / scale.float()
        for rounded in (zero.floor(), zero.ceil()):
            yield Grid(bits, scale, rounded.clamp(0, top).to(torch.uint8))


def _squared_error(grid: Grid, w: Tensor) -> Tensor:
    return (grid.per_group().nearest(w) - w).square().sum(-1)


def round_to_nearest(w: Tensor, bits: int, group: int) -> Tensor:
    """w [out, in] fp32 rounded to `bits` per weight, with a grid for every `group` columns of a row.

    Raises:
        InvalidInputError: the weights are too large for fp16 scales.
    """
    group = min(group, w.shape[1])
    return torch.cat([_round_rows(rows, bits, group) for rows in w.split(_ROWS)])


def _round_rows(w: Tensor, bits: int, group: int) -> Tensor:
    groups = F.pad(w, (0, -w.shape[1] % group)).view(len(w), -1, group)
    return fit_grid(groups, bits).per_group().nearest(groups).flatten(1)[:, : w.shape[1]]
