"""The matrices of a folded FFN as modules, in the order in which they are stored or laid out for a backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ffn.packed import PackedMatrix
from ..ffn.weights import Matrix
from .stored import LaidOut


class LowBit(LaidOut):
    """A matrix in few bits: `planes` [rows, bits, ceil(columns / 8)] uint8, `scale` [rows, groups] fp16."""

    format_tensors = matrix_tensors = frozenset({"planes", "scale"})
    planes: Tensor
    scale: Tensor

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.columns, self.group_size, self.has_zero = matrix.columns, matrix.group_size, matrix.has_zero
        self.register_buffer("planes", matrix.planes)
        self.register_buffer("scale", matrix.scale)

    def forward(self) -> Any:
        """The matrix in the order in which it is now; see `FoldState.fetched`."""
        return self.current

    def _get(self) -> PackedMatrix:
        return PackedMatrix(self.planes, self.scale, self.columns, self.group_size, self.has_zero)

    def _set(self, matrix: PackedMatrix) -> None:
        self.planes, self.scale = matrix.planes, matrix.scale

    def _clear(self) -> None:
        self.planes, self.scale = self.planes.new_empty(0), self.scale.new_empty(0)


class Fold(LaidOut):
    """The affine part in the model's dtype: `weight` [d, d] and `bias` [d]."""

    matrix_tensors = frozenset({"weight"})

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self) -> tuple[Matrix, Tensor]:
        """The matrix in the order in which it is now, and the bias; see `FoldState.fetched`."""
        return self.current, self.bias

    def _get(self) -> Tensor:
        return self.weight.detach()

    def _set(self, matrix: Tensor) -> None:
        self.weight = nn.Parameter(matrix, requires_grad=False)

    def _clear(self) -> None:
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)


class LowBitFold(LowBit):
    """The affine part in few bits: `planes`, `scale`, and `bias` [d] in the model's dtype."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor) -> None:
        super().__init__(matrix)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self) -> tuple[Matrix, Tensor]:
        """The matrix in the order in which it is now, and the bias; see `FoldState.fetched`."""
        return self.current, self.bias
