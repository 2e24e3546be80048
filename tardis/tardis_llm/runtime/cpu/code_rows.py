"""Matrices in few bits as code rows: the order in which rows here and there are added up fastest.

A row is one stretch of memory, and its codes lie side by side, where planes have one bit of each in every plane. They
are in words of 16 bits with n = 16 / bits codes, from the lowest bits on, and words in lines of 16: code k of word
8 i + 4 h + j of a line is that of column 8 (n h + k) + 4 i + j of its 16 n columns. So where the words of two rows are
put side by side, a mask leaves the codes of both for eight consecutive columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...allocator import contiguous_in_huge_pages
from ...ffn.packed import PackedMatrix, pack, unpack
from ...ffn.weights import Kind

_WORD = 16  # bits
_SLICE = 2048  # rows that are handled at once, which bounds the working memory


@dataclass(frozen=True)
class CodeRows:
    """A matrix [rows, columns] as code rows.

    Attributes:
        data: [rows, columns * bits / 16] int16.
        scale: [rows, groups] fp16.
        bits: of a code, 4 or 8.
        group_size: columns that share a scale.
        has_zero: see `PackedMatrix`.
    """

    data: Tensor
    scale: Tensor
    bits: int
    group_size: int
    has_zero: bool

    @property
    def columns(self) -> int:
        """Of the matrix; a multiple of 64."""
        return self.data.shape[1] * _WORD // self.bits

    @property
    def kind(self) -> Kind:
        """The kind of the matrix in the order in which it is stored."""
        return (len(self.data), self.columns), self.bits, self.group_size, self.has_zero

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.data.nbytes + self.scale.nbytes

    @classmethod
    def of(cls, matrix: PackedMatrix) -> CodeRows:
        """A matrix that `can_be_code_rows`; a large one in huge pages."""
        parts = [_words(unpack(some, matrix.columns), matrix.bits) for some in matrix.planes.split(_SLICE)]
        data, scale = contiguous_in_huge_pages(torch.cat(parts)), matrix.scale.contiguous()
        return cls(data, scale, matrix.bits, matrix.group_size, matrix.has_zero)

    def matrix(self) -> PackedMatrix:
        """The inverse of `of`."""
        parts = [pack(_codes(some, self.bits), self.bits) for some in self.data.split(_SLICE)]
        return PackedMatrix(torch.cat(parts), self.scale, self.columns, self.group_size, self.has_zero)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] uint8 as words [rows, words] int16."""
    n = _WORD // bits
    by_word = codes.unflatten(1, (-1, 2, n, 2, 4)).permute(0, 1, 4, 2, 5, 3)  # [rows, lines, i, h, j, k]
    return (by_word.int() << _shifts(n, bits)).sum(-1, dtype=torch.int32).to(torch.int16).flatten(1)


def _codes(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_words`."""
    n = _WORD // bits
    codes = (words.int()[..., None] >> _shifts(n, bits)) & (2**bits - 1)
    by_word = codes.to(torch.uint8).unflatten(1, (-1, 2, 2, 4))  # [rows, lines, i, h, j, k]
    return by_word.permute(0, 1, 3, 5, 2, 4).flatten(1)


def _shifts(n: int, bits: int) -> Tensor:
    """[n] int32: where the codes of a word begin."""
    return torch.arange(0, n * bits, bits, dtype=torch.int32)
