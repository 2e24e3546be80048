"""Matrices in few bits as bit-planes: the predictor, and where folding is stacked with quantisation, fold and fallback.

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

#: of a block of a plane
BLOCK_COLUMNS = 512
ROWS_AT_ONCE = 256  # rows handled at once where temporaries as large as the matrix would be slow


@dataclass(frozen=True)
class PackedMatrix:
    """A low-bit matrix [h, d] as it is stored.

    Attributes:
        planes: [h, bits, ceil(d / 8)] uint8, highest bit first; see above for the columns of a plane.
        scale: [h, ceil(d / group_size)] fp16.
        columns: d.
        group_size: columns that share a scale; the last group may be shorter.
        has_zero: whether one of the levels is 0: code c stands for `c - 2^(bits - 1)` times the scale, which may be
            negative. Else levels are symmetric, `c - (2^bits - 1) / 2`.
    """

    planes: Tensor
    scale: Tensor
    columns: int
    group_size: int
    has_zero: bool = False

    @classmethod
    def empty(
        cls, rows: int, columns: int, bits: int, group_size: int, device: torch.device, has_zero: bool = False
    ) -> PackedMatrix:
        """A matrix [rows, columns] without content."""
        planes = torch.empty(rows, bits, -(-columns // 8), dtype=torch.uint8, device=device)
        scale = torch.empty(rows, -(-columns // group_size), dtype=torch.float16, device=device)
        return cls(planes, scale, columns, group_size, has_zero)

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return self.planes.shape[1]

    @property
    def middle(self) -> float:
        """The code, or the point between two codes, that stands for 0."""
        return midpoint(self.bits, self.has_zero)

    @property
    def nbytes(self) -> int:
        """Bytes as stored, scales included."""
        return self.planes.nbytes + self.scale.nbytes

    def dequantise(self) -> Tensor:
        """The matrix [h, d] fp32 that the codes stand for."""
        parts = []
        for planes, scale in zip(self.planes.split(ROWS_AT_ONCE), self.scale.split(ROWS_AT_ONCE), strict=True):
            level = unpack(planes, self.columns).float() - self.middle
            parts.append(level * expand_scale(scale.float(), self.group_size, self.columns))
        return torch.cat(parts)


def expand_scale(scale: Tensor, group_size: int, columns: int) -> Tensor:
    """[h, groups] to one scale per column, [h, columns]."""
    return scale.repeat_interleave(group_size, 1)[:, :columns]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [h, d] (integers below 2^bits) as bit-planes [h, bits, ceil(d / 8)] uint8."""
    positions = torch.arange(8, dtype=torch.uint8, device=codes.device)[:, None]
    parts = []
    for block in _blocks(codes.to(torch.uint8)):
        planes = [(((block >> bit) & 1) << positions).sum(2, dtype=torch.uint8) for bit in reversed(range(bits))]
        parts.append(torch.stack(planes, 1).flatten(2))
    return torch.cat(parts, 2)


def _blocks(codes: Tensor) -> list[Tensor]:
    """Codes [h, d] as [h, blocks, 8, bytes]: those of 512 columns, and the last one if it is shorter."""
    whole = codes.shape[1] // BLOCK_COLUMNS * BLOCK_COLUMNS
    rest = codes[:, whole:]
    rest = F.pad(rest, (0, -rest.shape[1] % 8))
    parts = [part for part in (codes[:, :whole].unflatten(1, (-1, BLOCK_COLUMNS)), rest[:, None]) if part.numel()]
    return [part.unflatten(2, (8, -1)) for part in parts]


def unpack(planes: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`: codes [h, columns] uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)[:, None]
    whole = columns // BLOCK_COLUMNS * BLOCK_COLUMNS // 8
    parts = []
    for part, size in ((planes[..., :whole], BLOCK_COLUMNS // 8), (planes[..., whole:], planes.shape[2] - whole)):
        if part.shape[2]:
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


def midpoint(bits: int, has_zero: bool) -> float:
    """The code, or the point between two codes, that stands for 0; see `PackedMatrix`."""
    return (2**bits - 1 + has_zero) / 2
