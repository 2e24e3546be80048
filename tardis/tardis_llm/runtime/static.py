"""A static fold that runs: three products, by whatever backend the inputs have.

    y = x C^T + c + value(x W1^T + b1) W2^T        W1, W2 of the kept neurons

`prepare` is where folded FFNs are made ready, static ones here and dynamic ones by their backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ffn.activations import activation
from ..ffn.neuron import value
from ..ffn.weights import FoldedWeights, Matrix
from . import backend
from .backend import PreparedFFN, linear


@dataclass(frozen=True)
class StaticFFN:
    """A static fold, ready to run.

    Attributes:
        weights: as they lie; those of the kept neurons and the fold are read.
    """

    weights: FoldedWeights

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [tokens, d] for inputs x [tokens, d]."""
        weights, (up, down, fold) = self.weights, self.matrices
        hidden = value(linear(x, up, weights.kept_bias), activation(weights.neurons.activation), weights.k)
        return linear(hidden, down, None) + linear(x, fold, weights.bias)

    @property
    def matrices(self) -> tuple[Matrix, Matrix, Matrix]:
        """W1 and W2 of the kept neurons, and C."""
        weights = self.weights
        assert weights.kept_up is not None and weights.kept_down is not None and weights.fold is not None
        return weights.kept_up, weights.kept_down, weights.fold

    def quick_exact(self, x: Tensor) -> bool:
        """No: the weights of the other neurons are not there."""
        return False

    def exact(self, x: Tensor, b2: Tensor | None) -> Tensor:
        """The same as a call, which computes every neuron that there are weights of; the fold's bias has b2."""
        return self(x)

    def fixed(self, x: Tensor) -> Tensor:
        """[tokens, 0] bool: no neuron is predicted."""
        return torch.empty(len(x), 0, dtype=torch.bool, device=x.device)


def prepare(weights: FoldedWeights, x: Tensor) -> PreparedFFN:
    """A folded FFN made ready for inputs like x [tokens, d]; see `backend.prepare` for one that is not static."""
    return StaticFFN(weights) if weights.kept else backend.prepare(weights, x)
