"""What a baseline did: the bytes of every matrix and of the whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..report import ByteTotals

_SCALE_BITS = 16


@dataclass(frozen=True)
class MatrixReport:
    """One compressed matrix with its bias, or one FFN that became a matrix.

    Attributes:
        name: full name of the module in the model.
        weights: number of weights before.
        nonzero: number of weights now that are not zero.
        dense: bytes before.
        touched: bytes read for a token, on average.
        resident: bytes kept in memory.
    """

    name: str
    weights: int
    nonzero: int
    dense: int
    touched: float
    resident: int


@dataclass(frozen=True)
class BaselineReport(ByteTotals):
    """A model compressed by a baseline.

    Attributes:
        method: name of the baseline.
        scope: "ffn" or "all".
        asked: the share of weights that was to go; None for a method of fixed size.
        tokens: calibration tokens that were used; 0 if the method needs none.
        layers: the compressed matrices in the model's order.
    """

    method: str
    scope: str
    asked: float | None
    tokens: int
    layers: list[MatrixReport]

    @property
    def sparsity(self) -> float:
        """Share of the weights that are gone: zero, or no longer there at all."""
        return 1 - sum(layer.nonzero for layer in self.layers) / sum(layer.weights for layer in self.layers)


def masked_bytes(weight: Tensor) -> int:
    """Bytes of a pruned matrix in its dtype: the weights that are not zero, and a bitmap that says which they are."""
    return int(weight.count_nonzero()) * weight.element_size() + -(-weight.numel() // 8)


def quantised_bytes(weight: Tensor, bits: int, group: int) -> int:
    """Bytes of a matrix [out, in] in `bits` per weight: codes, and per group a scale in fp16 and a zero point."""
    rows, columns = weight.shape
    groups = -(-columns // group)
    return -(-rows * (columns * bits + groups * (_SCALE_BITS + bits)) // 8)
