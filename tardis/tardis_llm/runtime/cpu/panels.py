"""Matrices in panels: the order in which products with few tokens read them at the pace of memory.

A panel has 32 rows side by side, so that the kernels read a matrix as one stretch of memory and one number of an input
serves 32 outputs. Only products read it so: rows of a panel do not lie together. In memory, per panel:

    bf16        [columns / 2, 32, 2], as the processor multiplies pairs
    fp16        [columns, 32, 1]
    few bits    [columns / (32 / bits), 32, 4] bytes; byte j of a row has the codes of columns j, 4 + j, ... of its
                32 / bits columns, from the lowest bits on; and scales [groups, 32]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...allocator import contiguous_in_huge_pages
from ...ffn.packed import PackedMatrix, pack, unpack
from ...ffn.weights import Kind

#: of a panel
ROWS = 32
#: columns that lie side by side, by the dtypes that may be in panels
TOGETHER = {torch.bfloat16: 2, torch.float16: 1}
#: bytes of a row's codes that lie side by side
LINE_BYTES = 4
_SLICE = 2048  # rows that are put into panels at once, which bounds the working memory


@dataclass(frozen=True)
class Panels:
    """A matrix [rows, columns] in panels.

    Attributes:
        data: [panels, pairs, 32, 2] bf16, [panels, columns, 32, 1] fp16, or [panels, lines, 32, 4] uint8.
        scale: [panels, groups, 32] fp16 of codes, else None.
        rows, columns: those that are no filling.
        bits: of a code, 16 for bf16 and fp16.
        group_size: columns that share a scale.
    """

    data: Tensor
    scale: Tensor | None
    rows: int
    columns: int
    bits: int
    group_size: int

    @property
    def kind(self) -> Kind:
        """The kind of the matrix in the order in which it is stored."""
        shape = self.rows, self.columns
        return (shape, self.data.dtype) if self.scale is None else (shape, self.bits, self.group_size, False)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales, filling included."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @classmethod
    def of(cls, matrix: Tensor | PackedMatrix) -> Panels:
        """A matrix that `can_be_in_panels`, in panels; large ones in huge pages."""
        if isinstance(matrix, Tensor):
            data = torch.cat([_numbers(some) for some in matrix.split(_SLICE)])
            rows, columns = matrix.shape
            return cls(contiguous_in_huge_pages(data), None, rows, columns, 16, columns)
        codes = [_lines(unpack(some, matrix.columns), matrix.bits) for some in matrix.planes.split(_SLICE)]
        data, scale = contiguous_in_huge_pages(torch.cat(codes)), _side_by_side(matrix.scale[..., None])[..., 0]
        rows, group_size = len(matrix.planes), matrix.group_size
        return cls(data, scale.contiguous(), rows, matrix.columns, matrix.bits, group_size)

    def matrix(self) -> Tensor | PackedMatrix:
        """The inverse of `of`."""
        if self.scale is None:
            return self.data.transpose(1, 2).flatten(2).flatten(0, 1)[: self.rows].contiguous()
        parts = []
        for some in self.data.split(_SLICE // ROWS):
            codes = some.transpose(1, 2).flatten(0, 1)[..., None, :] >> _shifts(self.bits)  # [rows, lines, codes, 4]
            parts.append(pack((codes & (2**self.bits - 1)).flatten(1)[:, : self.columns], self.bits))
        scale = self.scale.transpose(1, 2).flatten(0, 1)[: self.rows].contiguous()
        return PackedMatrix(torch.cat(parts)[: self.rows], scale, self.columns, self.group_size)


def data_shape(rows: int, columns: int, bits: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """The shape of `Panels.data` for a matrix [rows, columns] in this dtype, uint8 for codes of some bits."""
    panels = -(-rows // ROWS)
    if dtype in TOGETHER:
        return panels, columns // TOGETHER[dtype], ROWS, TOGETHER[dtype]
    return panels, -(-columns // _line_columns(bits)), ROWS, LINE_BYTES


def _side_by_side(rows: Tensor) -> Tensor:
    """[rows, parts, size] as [panels, parts, 32, size], filled up with zeros."""
    filled = F.pad(rows, (0, 0, 0, 0, 0, -len(rows) % ROWS))
    return filled.unflatten(0, (-1, ROWS)).transpose(1, 2)


def _numbers(weight: Tensor) -> Tensor:
    """bf16 or fp16 rows in panels."""
    return _side_by_side(weight.unflatten(1, (-1, TOGETHER[weight.dtype]))).contiguous()


def _lines(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] in panels."""
    columns = _line_columns(bits)
    parts = F.pad(codes, (0, -codes.shape[1] % columns)).unflatten(1, (-1, columns // LINE_BYTES, LINE_BYTES))
    return _side_by_side((parts << _shifts(bits)).sum(2, dtype=torch.uint8)).contiguous()


def _line_columns(bits: int) -> int:
    """Columns whose codes lie side by side."""
    return 8 * LINE_BYTES // bits


def _shifts(bits: int) -> Tensor:
    """[codes of a byte, 1] uint8: where they begin."""
    return torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
