"""Result fixing by itself, for engines that run the fold as a linear layer of their own.

    tardis::fix             sum over i in S(x) of r_i(z_i) W2[:, i]
    tardis::packed_linear   y = x W^T + b with W in few bits, for a fold that is stored so

Both take any number of tokens and any device, and a tracer sees one operator whatever happens inside:

    CPU, kernels built      the kernels of `ops`, 64 tokens at a time
    CPU, no kernels         dense products; residuals of neurons that are not fixed are set to zero
    any other device        the same: shapes depend on no values and nothing waits for the device, so that a CUDA graph
                            can capture it
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS
from ..folding.lowbit import PackedMatrix
from . import ops
from .cpu.library import MAX_TOKENS

ops.library.define(
    "fix(Tensor x, str activation, Tensor[] predictor, Tensor[] ranges, Tensor? b1, Tensor[] up, Tensor[] down, "
    "int[] group_sizes) -> Tensor"
)
ops.library.define("packed_linear(Tensor x, Tensor planes, Tensor scale, int group_size, Tensor? bias) -> Tensor")


def _fix(
    x: Tensor,
    activation: str,
    predictor: Sequence[Tensor],
    ranges: Sequence[Tensor],
    b1: Tensor | None,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    group_sizes: Sequence[int],
) -> Tensor:
    """[tokens, d] in the dtype of x.

    Args:
        x: [tokens, d].
        activation: a name in `ACTIVATIONS`.
        predictor: planes and scale.
        ranges: low, high, slope, offset, each [h].
        b1: [h].
        up, down: [weight [h, d]], or [planes, scale] of a low-bit one. `up` is W1, or what the predictor leaves of it,
            [] where that is nothing; `down` is W2 transposed.
        group_sizes: of predictor, up and down; those of dense ones are not read.
    """
    if not len(x):
        return torch.empty_like(x)
    if not ops.takes(x[:1]):
        return _masked(x, activation, predictor, ranges, b1, up, down, group_sizes)
    sizes = [0, *group_sizes]
    parts = [
        torch.ops.tardis.folded_ffn(tokens, activation, [], None, predictor, ranges, b1, up, down, sizes)
        for tokens in x.contiguous().split(MAX_TOKENS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _masked(
    x: Tensor,
    activation: str,
    predictor: Sequence[Tensor],
    ranges: Sequence[Tensor],
    b1: Tensor | None,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    group_sizes: Sequence[int],
) -> Tensor:
    """`_fix` by dense products; predictions and residuals are in fp32, as in the reference."""
    low, high, slope, offset = (each.float() for each in ranges)
    predicting, up_size, down_size = group_sizes
    columns = x.shape[1]
    coarse = _dense(predictor, columns, predicting)
    zhat = F.linear(x.float(), coarse, None if b1 is None else b1.float())  # [tokens, h]
    fixed = ~((zhat >= low) & (zhat <= high))
    w1 = _dense(up, columns, up_size) if up else torch.zeros((), device=x.device)
    if len(down) == 2:  # `up` is what the predictor leaves
        w1 = coarse + w1
    z = F.linear(x, w1.to(x.dtype), b1).float()
    residual = torch.where(fixed, ACTIVATIONS[activation](z) - slope * z - offset, 0.0)
    return F.linear(residual.to(x.dtype), _dense(down, columns, down_size).to(x.dtype).T)


def _packed_linear(x: Tensor, planes: Tensor, scale: Tensor, group_size: int, bias: Tensor | None) -> Tensor:
    """x [tokens, in] and a `PackedMatrix` [out, in]: [tokens, out] in the dtype of x."""
    if not ops.takes(x[:1]):
        return F.linear(x, _dense((planes, scale), x.shape[1], group_size).to(x.dtype), bias)
    parts = [
        torch.ops.tardis.lowbit_linear(tokens, planes, scale, group_size, bias)
        for tokens in x.contiguous().split(MAX_TOKENS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dense(parts: Sequence[Tensor], columns: int, group_size: int) -> Tensor:
    """A matrix as the operator takes it, [rows, columns]."""
    return parts[0] if len(parts) == 1 else PackedMatrix(parts[0], parts[1], columns, group_size).dequantise()


ops.library.impl("fix", _fix, "CompositeExplicitAutograd")
ops.library.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("tardis::fix")
def _(x: Tensor, *others: object, **settings: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("tardis::packed_linear")
def _(x: Tensor, planes: Tensor, scale: Tensor, *others: object, **settings: object) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])
