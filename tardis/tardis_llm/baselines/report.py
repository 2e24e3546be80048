"""What a baseline did: the bytes of every matrix and of the whole, as plain values for tables and files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

_SCALE_BITS = 16
_TOTALS = ("dense", "touched", "resident", "reduction", "sparsity")


@dataclass(frozen=True)
class MatrixReport:
    """One compressed matrix with its bias, or one FFN that became a matrix.

    Attributes:
        name: full name of the module in the model.
        weights: number of weights before.
        nonzero: number of weights now that are not zero.
        dense: bytes before.
        touched: bytes read for a token.
        resident: bytes kept in memory.
    """

    name: str
    weights: int
    nonzero: int
    dense: int
    touched: int
    resident: int


@dataclass(frozen=True)
class BaselineReport:
    """A model compressed by a baseline.

    Attributes:
        method: name of the baseline.
        scope: "ffn" or "all".
        asked: the share of weights that was to go; None for a method of fixed size.
        tokens: calibration tokens that were used; 0 if the method needs none.
        matrices: the compressed matrices in the model's order.
    """

    method: str
    scope: str
    asked: float | None
    tokens: int
    matrices: list[MatrixReport]

    @property
    def dense(self) -> int:
        """Bytes in scope of the dense model."""
        return sum(matrix.dense for matrix in self.matrices)

    @property
    def touched(self) -> int:
        """Bytes in scope read for a token."""
        return sum(matrix.touched for matrix in self.matrices)

    @property
    def resident(self) -> int:
        """Bytes in scope kept in memory."""
        return sum(matrix.resident for matrix in self.matrices)

    @property
    def reduction(self) -> float:
        """`1 - touched / dense`: what is saved once indices, scales and biases are counted."""
        return 1 - self.touched / self.dense

    @property
    def sparsity(self) -> float:
        """Share of the weights that are gone: zero, or no longer there at all."""
        return 1 - sum(matrix.nonzero for matrix in self.matrices) / sum(matrix.weights for matrix in self.matrices)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, totals included."""
        return {**asdict(self), "totals": {name: getattr(self, name) for name in _TOTALS}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BaselineReport:
        """The inverse of `as_dict`."""
        own = {name: value for name, value in values.items() if name != "totals"}
        return cls(**{**own, "matrices": [MatrixReport(**matrix) for matrix in own["matrices"]]})


def masked_bytes(weight: Tensor) -> int:
    """Bytes of a pruned matrix in its dtype: the weights that are not zero, and a bitmap that says which they are."""
    return int(weight.count_nonzero()) * weight.element_size() + -(-weight.numel() // 8)


def quantised_bytes(weight: Tensor, bits: int, group: int) -> int:
    """Bytes of a matrix [out, in] in `bits` per weight: codes, and per group a scale in fp16 and a zero point."""
    rows, columns = weight.shape
    groups = -(-columns // group)
    return -(-rows * (columns * bits + groups * (_SCALE_BITS + bits)) // 8)
