"""Result fixing for engines, by itself where they run the fold as a linear layer of their own, else with the fold.

    fix(x) = sum over i in S(x) of r_i(z_i) W2[:, i]

It takes any number of tokens on any device:

    CPU, kernels built      the kernels of `ops`, 64 tokens at a time
    CPU, no kernels         dense products; residuals of neurons that are not fixed are set to zero
    any other device        the same: shapes depend on no values and nothing waits for the device, so that a CUDA graph
                            can capture it
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ffn.activations import ACTIVATIONS
from ..ffn.packed import PackedMatrix
from .cpu import ops
from .cpu.library import MAX_TOKENS
from .cpu.panels import Panels


@dataclass(frozen=True)
class Fixing:
    """What fixing reads of one FFN; its tensors must neither move nor change once it has run.

    Attributes:
        activation: a name in `ACTIVATIONS`.
        predictor: [h, d], in panels or not; the fold too.
        ranges: low, high, slope, offset, each [h].
        b1: [h].
        up: W1 [h, d]; beside a low-bit `down`, what the predictor leaves of it, None where that is nothing.
        down: W2 transposed, [h, d].
        fold: C [d, d], to be added; None where the engine adds it.
        bias: [d], of the fold.
    """

    activation: str
    predictor: Tensor | PackedMatrix | Panels
    ranges: tuple[Tensor, Tensor, Tensor, Tensor]
    b1: Tensor | None
    up: Tensor | PackedMatrix | None
    down: Tensor | PackedMatrix
    fold: Tensor | PackedMatrix | Panels | None = None
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, d] in the dtype of x [tokens, d]."""
        if not len(x):
            return torch.empty_like(x)
        return self._prepared(x.contiguous()) if ops.takes(x) else self.masked(x)

    @cached_property
    def _prepared(self) -> ops.PreparedFFN:
        matrices = [self.fold, self.predictor, self.up, self.down]
        return ops.PreparedFFN(self.activation, matrices, self.bias, self.b1, self.ranges)

    def masked(self, x: Tensor) -> Tensor:
        """The same for x [tokens, d] by dense products; predictions and residuals are in fp32, as in the reference."""
        low, high, slope, offset = (each.float() for each in self.ranges)
        coarse = _dense(self.predictor)
        zhat = F.linear(x.float(), coarse, None if self.b1 is None else self.b1.float())  # [tokens, h]
        fixed = ~((zhat >= low) & (zhat <= high))
        if isinstance(self.down, PackedMatrix):  # `up` is what the predictor leaves
            w1 = coarse if self.up is None else coarse + _dense(self.up)
        else:
            assert isinstance(self.up, Tensor), "beside dense W2, W1 is dense"
            w1 = self.up
        z = F.linear(x, w1.to(x.dtype), self.b1).float()
        residual = torch.where(fixed, ACTIVATIONS[self.activation](z) - slope * z - offset, 0.0)
        y = F.linear(residual.to(x.dtype), _dense(self.down).to(x.dtype).T)
        return y if self.fold is None else y + F.linear(x, _dense(self.fold).to(x.dtype), self.bias)


def packed_linear(x: Tensor, weight: PackedMatrix, bias: Tensor | None) -> Tensor:
    """x W^T + bias, [tokens, out] in the dtype of x [tokens, in], for a fold in few bits."""
    if not ops.takes(x):
        return F.linear(x, weight.dequantise().to(x.dtype), bias)
    parts = [
        torch.ops.tardis.lowbit_linear(some, weight.planes, weight.scale, weight.group_size, bias)
        for some in x.contiguous().split(MAX_TOKENS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dense(matrix: Tensor | PackedMatrix | Panels) -> Tensor:
    if isinstance(matrix, Panels):
        matrix = matrix.matrix()
    return matrix.dequantise() if isinstance(matrix, PackedMatrix) else matrix
