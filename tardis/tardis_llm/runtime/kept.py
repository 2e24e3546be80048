"""A fold that keeps neurons, ready to run: two products for these, beside whatever the others are.

    y = value(x W1^T + b1) W2^T + rest(x)        W1, b1, W2 of the kept neurons

The rest is the fold alone where no neuron is predicted, and else a dynamic fold of the others, by whatever backend the
inputs have. A backend may have kernels that compute all of it at once; they read each weight once for a few tokens,
more of which are better multiplied by products for many. `prepare` is where folded FFNs are made ready, these here and
dynamic ones by their backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ffn.activations import activation
from ..ffn.neuron import value
from ..ffn.weights import FoldedWeights
from . import backend
from .backend import REFERENCE, PreparedFFN, backend_for, linear

#: tokens up to which a backend computes all at once, if it can
_FEW = 16


@dataclass(frozen=True)
class KeptFFN:
    """A static or mixed fold, ready to run.

    Attributes:
        weights: as they lie.
        predicted: the fold with the neurons that are predicted; None in a static fold.
        together: all of it at once; None where the backend has no kernel for that.
    """

    weights: FoldedWeights
    predicted: PreparedFFN | None
    together: PreparedFFN | None

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [tokens, d] for inputs x [tokens, d]."""
        if self.together is not None and len(x) <= _FEW:
            return self.together(x)
        if self.predicted is not None:
            return self._kept(x) + self.predicted(x)
        assert self.weights.fold is not None, "nothing else adds the fold of a static one"
        return self._kept(x) + linear(x, self.weights.fold, self.weights.bias)

    def quick_exact(self, x: Tensor) -> bool:
        """Whether the neurons that are predicted have it; those of a static fold that are not kept have no weights."""
        return self.predicted is not None and self.predicted.quick_exact(x)

    def exact(self, x: Tensor, b2: Tensor | None) -> Tensor:
        """Outputs with every neuron computed that there are weights of; b2 is in the bias of a static fold."""
        return self(x) if self.predicted is None else self._kept(x) + self.predicted.exact(x, b2)

    def fixed(self, x: Tensor) -> Tensor:
        """[tokens, h] bool: which of the h neurons that are predicted are fixed."""
        if self.predicted is not None:
            return self.predicted.fixed(x)
        return torch.empty(len(x), 0, dtype=torch.bool, device=x.device)

    def _kept(self, x: Tensor) -> Tensor:
        """[tokens, d] what the kept neurons add."""
        weights, up, down = self.weights, self.weights.kept_up, self.weights.kept_down
        assert up is not None and down is not None, "it keeps neurons"
        hidden = value(linear(x, up, weights.kept_bias), activation(weights.neurons.activation), weights.k)
        return linear(hidden, down, None)


def prepare(weights: FoldedWeights, x: Tensor) -> PreparedFFN:
    """A folded FFN made ready for inputs like x [tokens, d]; see `backend.prepare` for one that keeps no neuron."""
    if not weights.kept:
        return backend.prepare(weights, x)
    chosen = backend_for(x)
    together = None if chosen is REFERENCE else chosen.prepare(weights, x.dtype)
    return KeptFFN(weights, backend.prepare(weights.without_kept, x) if weights.mixed else None, together)
