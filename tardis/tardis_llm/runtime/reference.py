"""The reference backend: the folded FFN in plain torch, which specifies what every kernel computes.

    y = x C^T + c + sum over i in S(x) of r_i(v) W2[:, i] + sum over kept i of value_i(v) W2[:, i]
    S(x) = neurons whose predicted v is out of their hot range
    r_i(v) = value_i(v) - line_i(v)

It takes any number of tokens, dtype and device, and lets gradients through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ffn.neuron import value
from ..ffn.packed import PackedMatrix
from ..ffn.weights import FoldedWeights, Matrix, written_out

_TOKENS = 512  # at once, so that temporaries stay small


def folded_ffn(x: Tensor, weights: FoldedWeights) -> Tensor:
    """Outputs [tokens, d] of a folded FFN for inputs x [tokens, d], in the dtype of x.

    On a CPU, rows of W1 and W2 are gathered for the union of the tokens' fixed neurons. On other devices and in graphs
    all rows are multiplied, so that shapes depend on no values and nothing waits for the device.

    Predictions, residuals and the sum are in fp32; the matrix products are in the dtype of x.

    Args:
        x: [tokens, d].
        weights: with the dense weights beside them, in the dtype of x, unless they are stacked.
    """
    parts = [_kept(x, weights)] if weights.kept else []
    parts += [] if weights.static else [_fixes(x, weights)]
    if weights.fold is not None:
        parts.append(F.linear(x, written_out(weights.fold).to(x.dtype), weights.bias))
    return parts[0] if len(parts) == 1 else torch.stack([part.float() for part in parts]).sum(0).to(x.dtype)


def _fixes(x: Tensor, weights: FoldedWeights) -> Tensor:
    """[tokens, d] what fixing adds for inputs x [tokens, d], some tokens at once."""
    predictor, w1, w2 = written_out(weights.predictor), *weights.fallback(x.dtype)
    static = torch.compiler.is_compiling() or not x.is_cpu or type(x) is not Tensor
    parts = [x] if static else x.split(_TOKENS)
    corrections = [_correction(some, weights, predictor, w1, w2, static) for some in parts]
    return torch.cat(corrections) if len(corrections) > 1 else corrections[0]


def _correction(x: Tensor, weights: FoldedWeights, predictor: Tensor, w1: Tensor, w2: Tensor, static: bool) -> Tensor:
    """[tokens, d] what fixing adds for inputs x [tokens, d].

    Args:
        x: in the model's dtype.
        weights: of the folded FFN.
        predictor: written out in fp32.
        w1, w2: as fixing reads them, written out in the dtype of x.
        static: whether shapes may not depend on values.
    """
    fixed = _outside(x, weights, predictor)  # [tokens, h]
    union = None if static else fixed.any(0)
    some = slice(None) if union is None or bool(union.all()) else union.nonzero()[:, 0]  # all are not gathered
    neurons = weights.neurons.at(some)
    rows = _rows(some, weights.neurons.count, weights.neurons.k)
    v = F.linear(x, w1[rows], None if weights.b1 is None else weights.b1[rows]).float()
    residual = torch.where(fixed[:, some], neurons.residual(v), 0.0)
    return F.linear(residual.to(x.dtype), w2[:, some])


def _kept(x: Tensor, weights: FoldedWeights) -> Tensor:
    """[tokens, d] what the kept neurons add for inputs x [tokens, d]."""
    ffn = weights.kept_ffn(x.dtype)
    return F.linear(value(F.linear(x, ffn.w1, ffn.b1), ffn.act, ffn.k), ffn.w2)


def fixed_neurons(x: Tensor, weights: FoldedWeights) -> Tensor:
    """[tokens, h] bool: the neurons S(x) that are predicted out of their hot range, for inputs x [tokens, d]."""
    return _outside(x, weights, written_out(weights.predictor))


def _outside(x: Tensor, weights: FoldedWeights, predictor: Tensor) -> Tensor:
    b1 = None if weights.b1 is None else weights.b1.float()
    return weights.neurons.outside(F.linear(x.float(), predictor, b1))


def _rows(neurons: Tensor | slice, count: int, k: int) -> Tensor | slice:
    """Rows of W1 that belong to some of `count` neurons."""
    if k == 1 or isinstance(neurons, slice):
        return neurons
    return (neurons + count * torch.arange(k)[:, None]).flatten()


@dataclass(frozen=True)
class ReferenceFFN:
    """A folded FFN by the reference."""

    weights: FoldedWeights

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [tokens, d] for inputs x [tokens, d]."""
        return folded_ffn(x, self.weights)

    def quick_exact(self, x: Tensor) -> bool:
        """No: matrices in few bits are written out for each call."""
        return False

    def exact(self, x: Tensor, b2: Tensor | None) -> Tensor:
        """Outputs [tokens, d] with every neuron computed, for inputs x [tokens, d]."""
        return self.weights.exact(x, b2)

    def fixed(self, x: Tensor) -> Tensor:
        """[tokens, h] bool: the neurons that are fixed for inputs x [tokens, d]."""
        return fixed_neurons(x, self.weights)


class ReferenceBackend:
    """Everything, everywhere, in plain torch."""

    name = "reference"
    reads_stored = True
    dtypes: tuple[torch.dtype, ...] = ()
    instruction_sets: tuple[str, ...] = ()

    def use(self, instruction_set: str) -> None:
        """There is nothing to choose."""

    def accepts(self, x: Tensor) -> bool:
        """Any inputs."""
        return True

    def lay_out(self, matrix: Tensor | PackedMatrix, dtype: torch.dtype, by_rows: bool = False) -> None:
        """Nothing: it reads matrices as they are stored."""

    def prepare(self, weights: FoldedWeights, dtype: torch.dtype) -> ReferenceFFN:
        """The weights, which need no preparation."""
        return ReferenceFFN(weights)

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        """x W^T + bias, [..., out] for x [..., in]."""
        weight = matrix if isinstance(matrix, Tensor) else written_out(matrix).to(x.dtype)
        return F.linear(x, weight, bias)

    def head(self, x: Tensor, predictor: Matrix, remainder: Matrix, bias: Tensor | None, top: int) -> None:
        """Logits by two products: there is no kernel of its own for them."""
