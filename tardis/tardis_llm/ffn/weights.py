"""What an FFN is: its dense weights, and what it stores once folded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .packed import PackedMatrix


class FFNWeights(NamedTuple):
    """The weights of one FFN, `act(x w1^T + b1) w2^T + b2`: views of the model's own tensors, in its dtype.

    Attributes:
        w1: [h, d] up weight; one row per neuron.
        b1: [h] up bias, or None.
        w2: [d, h] down weight; one column per neuron.
        b2: [d] down bias, or None.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


@dataclass(frozen=True)
class DenseFFN:
    """The weights of one FFN in fp32, biases zero where the model has none, and its activation.

    Attributes:
        w1: [h, d]; b1: [h]; w2: [d, h]; b2: [d].
        activation: a name in `ACTIVATIONS`.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    activation: str

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """The activation function."""
        return ACTIVATIONS[self.activation]

    @property
    def gain(self) -> Tensor:
        """[h] fp64, |W2[:, i]|^2: how much of a neuron's squared error reaches the output."""
        return self.w2.square().sum(0, dtype=torch.float64)


@dataclass(frozen=True)
class FoldedWeights:
    """What a folded FFN stores, as stored.

    Attributes:
        weight: [d, d] fold weight C, in the model's dtype or in few bits.
        bias: [d] fold bias c, in the model's dtype.
        predictor: low-bit copy of W1.
        low, high, slope, offset: [h] ranges and lines, fp16 where the values fit it and fp32 where not.
        fallback: what fixing reads in place of the dense weights; None where it reads these.
    """

    weight: Tensor | PackedMatrix
    bias: Tensor
    predictor: PackedMatrix
    low: Tensor
    high: Tensor
    slope: Tensor
    offset: Tensor
    fallback: Fallback | None = None


@dataclass(frozen=True)
class Fallback:
    """Low-bit copies of the dense weights, for fixing.

    Attributes:
        remainder: [h, d], what the predictor leaves of W1; None where the predictor has all the bits.
        down: [h, d], W2 transposed: one row per neuron.
    """

    remainder: PackedMatrix | None
    down: PackedMatrix

    @property
    def nbytes(self) -> int:
        """Bytes that fixing every neuron would read, beside the predictor."""
        return self.down.nbytes + (self.remainder.nbytes if self.remainder else 0)

    def matrices(self, predictor: PackedMatrix, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W1 [h, d] and W2 [d, h] that these bits stand for, in `dtype`."""
        w1 = predictor.dequantise()
        if self.remainder:
            w1 = w1 + self.remainder.dequantise()
        return w1.to(dtype), self.down.dequantise().T.to(dtype)


def dense_fold(stored: Tensor | PackedMatrix, dtype: torch.dtype) -> Tensor:
    """The fold [d, d] that is stored, in `dtype`."""
    return stored.dequantise().to(dtype) if isinstance(stored, PackedMatrix) else stored.to(dtype)
