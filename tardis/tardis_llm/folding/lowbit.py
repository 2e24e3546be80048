"""Low-bit matrices: the predictor, a copy of W1 whose product with x tells which neurons leave their hot range, and,
where folding is stacked with quantisation, the fold and the fallback weights too.

A weight is `(code - (2^bits - 1) / 2) * scale` with an unsigned code, so the grid is symmetric and needs no zero
point. A row is stored as bit-planes, the highest first, one after the other: every width packs without waste, and the
first planes of a wider copy are a coarser copy. Within a plane, columns come in blocks of 512, the last one shorter.
Bit k of byte j of a block of n columns belongs to column k * ceil(n / 8) + j of the block, so that one shift of a
register of bytes gives the codes of consecutive columns, which makes them cheap to multiply.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidInputError
from .sweep import Replace, dead_inputs, sweep

_SCALE_CANDIDATES = 40  # scales tried per group, between a fifth of the largest weight and all of it
_LEAST_SCALE = 2.0**-24  # the least positive fp16, so that nothing is divided by zero
_BLOCK = 128  # columns rounded before the rest of the matrix is updated
_COLUMNS = 512  # of a block of a plane: 64 bytes
_ROWS = 256  # rows handled at once where temporaries as large as the matrix would be slow


@dataclass(frozen=True)
class PackedMatrix:
    """A low-bit matrix [h, d] as it is stored.

    Attributes:
        planes: [h, bits, ceil(d / 8)] uint8, highest bit first; see above for the columns of a plane.
        scale: [h, ceil(d / group_size)] fp16.
        columns: d.
        group_size: columns that share a scale; the last group may be shorter.
    """

    planes: Tensor
    scale: Tensor
    columns: int
    group_size: int

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return self.planes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes as stored, scales included."""
        return self.planes.nbytes + self.scale.nbytes

    def dequantise(self) -> Tensor:
        """The matrix [h, d] fp32 that the codes stand for."""
        parts = []
        for planes, scale in zip(self.planes.split(_ROWS), self.scale.split(_ROWS), strict=True):
            level = unpack(planes, self.columns).float() - _midpoint(self.bits)
            parts.append(level * expand_scale(scale.float(), self.group_size, self.columns))
        return torch.cat(parts)


def quantise(w: Tensor, bits: int, group_size: int, covariance: Tensor | None = None) -> PackedMatrix:
    """Round w to `bits` per weight.

    Args:
        w: [h, d] fp32.
        bits: 1 to 8.
        group_size: columns per scale; d or more means one scale per row.
        covariance: [d, d] second moments of the inputs. With it each column's rounding error is spread over the columns
            not yet rounded so as to keep the output (GPTQ, arXiv 2210.17323); None rounds to the nearest.

    Raises:
        InvalidInputError: w is not finite, or too large for fp16 scales.
    """
    if not bool(torch.isfinite(w).all()):
        raise InvalidInputError("a weight of an FFN has NaN or infinite entries; reload a sound checkpoint.")
    group_size = min(group_size, w.shape[1])
    scale = best_scale(w, bits, group_size)
    columns = expand_scale(scale.float(), group_size, w.shape[1])
    codes = _nearest(w, columns, bits) if covariance is None else _gptq(w, columns, bits, covariance)
    return PackedMatrix(pack(codes, bits), scale, w.shape[1], group_size)


def best_scale(w: Tensor, bits: int, group_size: int) -> Tensor:
    """[h, groups] fp16: per row and group, the scale whose nearest rounding has the least squared error."""
    best = torch.cat([_best_scale(rows, bits, group_size) for rows in w.split(_ROWS)])
    if bool((best > torch.finfo(torch.float16).max).any()):
        raise InvalidInputError("a weight of an FFN is too large for fp16 scales; check the checkpoint's weights.")
    return best.half().clamp_min(_LEAST_SCALE)


def _best_scale(w: Tensor, bits: int, group_size: int) -> Tensor:
    """`best_scale` in fp32, for a few rows at a time."""
    h, d = w.shape
    groups = F.pad(w, (0, -d % group_size)).view(h, -1, group_size)
    valid = F.pad(torch.ones(d), (0, -d % group_size)).view(-1, group_size)
    largest = groups.abs().amax(-1).clamp_min(1e-6)
    best, least = largest, torch.full_like(largest, torch.inf)
    top = _midpoint(bits)
    for share in torch.linspace(0.2, 1.0, _SCALE_CANDIDATES):
        scale = largest * share / top
        column = scale[..., None]
        level = _nearest(groups, column, bits).float() - top
        error = ((level * column - groups).square() * valid).sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def expand_scale(scale: Tensor, group_size: int, columns: int) -> Tensor:
    """[h, groups] to one scale per column, [h, columns]."""
    return scale.repeat_interleave(group_size, 1)[:, :columns]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [h, d] (integers below 2^bits) as bit-planes [h, bits, ceil(d / 8)] uint8."""
    positions = torch.arange(8, dtype=torch.uint8)[:, None]
    parts = []
    for block in _blocks(codes.to(torch.uint8)):
        planes = [(((block >> bit) & 1) << positions).sum(2, dtype=torch.uint8) for bit in reversed(range(bits))]
        parts.append(torch.stack(planes, 1).flatten(2))
    return torch.cat(parts, 2)


def _blocks(codes: Tensor) -> list[Tensor]:
    """Codes [h, d] as [h, blocks, 8, bytes]: those of 512 columns, and the last one if it is shorter."""
    whole = codes.shape[1] // _COLUMNS * _COLUMNS
    rest = codes[:, whole:]
    rest = F.pad(rest, (0, -rest.shape[1] % 8))
    parts = [part for part in (codes[:, :whole].unflatten(1, (-1, _COLUMNS)), rest[:, None]) if part.numel()]
    return [part.unflatten(2, (8, -1)) for part in parts]


def unpack(planes: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`: codes [h, columns] uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)[:, None]
    whole = columns // _COLUMNS * _COLUMNS // 8
    parts = []
    for part, size in ((planes[..., :whole], _COLUMNS // 8), (planes[..., whole:], planes.shape[2] - whole)):
        if part.numel():
            lines = part.unflatten(2, (-1, 1, size))  # [h, bits, blocks, 1, bytes]
            bits = ((lines >> shifts) & 1).flatten(2)
            parts.append(_join(bits))
    return torch.cat(parts, 1)[:, :columns]


def _join(bits: Tensor) -> Tensor:
    """Bits [h, width, columns] of codes, highest first, as the codes."""
    codes = torch.zeros_like(bits[:, 0])
    for bit in bits.unbind(1):
        codes = codes * 2 + bit
    return codes


def _midpoint(bits: int) -> float:
    return (2**bits - 1) / 2


def _nearest(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes whose levels are nearest to w, for scales that broadcast against it."""
    return (w / scale + _midpoint(bits)).round().clamp(0, 2**bits - 1).to(torch.uint8)


def _gptq(w: Tensor, scale: Tensor, bits: int, covariance: Tensor) -> Tensor:
    """Codes [h, d] uint8, column by column, each error carried to the columns after it."""
    rows = scale.T.contiguous()  # [d, h], as the sweep has its columns

    def rule(start: int, block: Tensor, diagonal: Tensor) -> Replace:
        def replace(j: int, column: Tensor) -> Tensor:
            at = rows[start + j]
            return (_nearest(column, at, bits).float() - _midpoint(bits)) * at

        return replace

    put = sweep(w, covariance, _BLOCK, rule)
    # what no token of the calibration text had, another text may have
    return _nearest(torch.where(dead_inputs(covariance), w, put), scale, bits)
