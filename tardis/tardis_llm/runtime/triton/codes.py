"""Codes side by side in words of 32 bits: the order in which GPUs read matrices in few bits.

Codes are split into parts of 8, 4, 2 and 1 bits, the highest first: 3 bits are 2 and 1. A row has its parts one after
the other, each in lines of 16 words. In a part of `width` bits a word has `32 / width` fields, and field f of word j of
a line is the code of column `16 f + j` of those that the line has. So one load and one mask give the codes of
consecutive columns, every row begins at a multiple of 64 bytes, and the first part alone is a coarser copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ffn.packed import PackedMatrix, midpoint, pack, unpack
from ...ffn.weights import Kind

#: words of a line, and bits of a word
LINE, WORD = 16, 32
_SLICE = 512  # rows that are handled at once, which bounds the working memory


@dataclass(frozen=True)
class Codes:
    """A matrix [rows, columns] in few bits, as the GPU kernels read it.

    Attributes:
        data: [rows, words] int32; see above.
        scale: [rows, groups] fp16.
        columns: of the matrix.
        bits: of a code.
        group_size: columns that share a scale.
        has_zero: whether one of the levels is 0; see `PackedMatrix`.
    """

    data: Tensor
    scale: Tensor
    columns: int
    bits: int
    group_size: int
    has_zero: bool

    @classmethod
    def empty(
        cls, rows: int, columns: int, bits: int, group_size: int, device: torch.device, has_zero: bool = False
    ) -> Codes:
        """A matrix [rows, columns] without content."""
        data = torch.empty(rows, words(columns, bits), dtype=torch.int32, device=device)
        scale = torch.empty(rows, -(-columns // group_size), dtype=torch.float16, device=device)
        return cls(data, scale, columns, bits, group_size, has_zero)

    @property
    def kind(self) -> Kind:
        """The kind of the matrix in the order in which it is stored."""
        return (len(self.data), self.columns), self.bits, self.group_size, self.has_zero

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, filling included."""
        return self.data.nbytes + self.scale.nbytes

    @property
    def middle(self) -> float:
        """The code, or the point between two codes, that stands for 0."""
        return midpoint(self.bits, self.has_zero)

    @classmethod
    def of(cls, matrix: PackedMatrix) -> Codes:
        """A stored matrix in this order."""
        columns, bits = matrix.columns, matrix.bits
        parts = [_words(unpack(some, columns), bits) for some in matrix.planes.split(_SLICE)]
        return cls(torch.cat(parts), matrix.scale.contiguous(), columns, bits, matrix.group_size, matrix.has_zero)

    def matrix(self) -> PackedMatrix:
        """The inverse of `of`."""
        parts = [pack(_codes(some, self.columns, self.bits), self.bits) for some in self.data.split(_SLICE)]
        return PackedMatrix(torch.cat(parts), self.scale, self.columns, self.group_size, self.has_zero)


def widths(bits: int) -> list[int]:
    """Bits of the parts of a code, the highest part first."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def lines(columns: int, width: int) -> int:
    """Lines of a part in so many columns."""
    return -(-columns * width // (LINE * WORD))


def words(columns: int, bits: int) -> int:
    """Words of a row."""
    return sum(LINE * lines(columns, width) for width in widths(bits))


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] as words [rows, words]."""
    parts = []
    for width in widths(bits):
        part = (codes >> (bits & (width - 1))) & (2**width - 1)
        part = F.pad(part, (0, lines(codes.shape[1], width) * LINE * WORD // width - codes.shape[1]))
        fields = part.unflatten(1, (-1, WORD // width, LINE)).int() << _shifts(width, codes.device)
        parts.append(fields.sum(2, dtype=torch.int32).flatten(1))
    return torch.cat(parts, 1)


def _codes(data: Tensor, columns: int, bits: int) -> Tensor:
    """The inverse of `_words`: codes [rows, columns] uint8."""
    codes = torch.zeros(len(data), columns, dtype=torch.uint8, device=data.device)
    parts = data.split([LINE * lines(columns, width) for width in widths(bits)], 1)
    for width, part in zip(widths(bits), parts, strict=True):
        fields = (part.unflatten(1, (-1, 1, LINE)) >> _shifts(width, data.device)) & (2**width - 1)
        codes += fields.to(torch.uint8).flatten(1)[:, :columns] << (bits & (width - 1))
    return codes


def _shifts(width: int, device: torch.device) -> Tensor:
    """[fields, 1] int32: where the codes of a word begin."""
    return torch.arange(0, WORD, width, dtype=torch.int32, device=device)[:, None]
