"""Stacking with quantisation: the fold, and the weights that fixing reads, in few bits.

Fixing reads W1 as `predictor + remainder`: the predictor's bits serve twice, and a fixed neuron's pre-activation is
what was predicted plus the remainder's product. W2 is stored neuron by neuron, as its transpose. The refit comes after
both, so the fold takes up what their rounding leaves of a linear map. What it leaves of a neuron's size, its row of W2
makes up for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..calibration.tokens import Tokens, product
from ..ffn.packed import PackedMatrix
from ..ffn.weights import DenseFFN, FoldedWeights, FoldFormat, Storage, written_out
from .rounding import quantise

_TOKENS = 16_384  # on which a number a neuron is fitted
_MOST = 2.0  # by which a row of W2 is multiplied or divided


def quantise_fallback(
    w1: Tensor, w2: Tensor, predictor: PackedMatrix, storage: Storage, covariance: Tensor | None
) -> tuple[PackedMatrix | None, PackedMatrix | None]:
    """What the predictor leaves of W1, and W2 transposed, in few bits; None for what is not stored so.

    Args:
        w1: [h, d] fp32.
        w2: [d, h] fp32, rounded to the nearest: spreading its errors by the residuals' covariance made no difference.
        predictor: of w1.
        covariance: [d, d] second moments of the inputs, by which the rounding errors of W1 are spread; None to round to
            the nearest.
    """
    bits, group_size = storage.fallback_bits, storage.group_size
    if bits is None:
        return None, None
    remainder = None
    left = storage.left(predictor.bits)
    if left > 0:
        remainder = quantise(w1 - predictor.dequantise(), left, group_size, covariance)
    return remainder, quantise(w2.T.contiguous(), bits, group_size, has_zero=True)


def match_sizes(dense: DenseFFN, folded: FoldedWeights, tokens: Tokens) -> FoldedWeights:
    """Scale each row of the stored W2 so that what fixing adds of its neuron fits the exact residuals best.

    A residual computed with a rounded W1 is too large or too small where an input is far larger than all others, as
    that of a text's first token: rounding then moves it by one weight's error. Single neurons make the huge activations
    of that token, on which all others lean in their attention. The scale is that of least squares, with one more token
    at which there is no error; it costs no byte.

    Args:
        dense: in fp32.
        folded: stacked; its fold and bias are not read.
        tokens: inputs, by whose weights errors count.
    """
    assert isinstance(folded.down, PackedMatrix), "W2 is in few bits"
    w1, w_hat = folded.fallback(torch.float32)[0], written_out(folded.predictor)
    neurons = folded.neurons.map(Tensor.float)
    wanted, found, count = (torch.zeros(dense.h, dtype=torch.float64, device=tokens.device) for _ in range(3))
    for some in tokens.spread(_TOKENS).chunks(len(dense.w1)):
        outside = neurons.outside(product(some.x, w_hat, dense.b1))
        exact = neurons.residual(product(some.x, dense.w1, dense.b1))
        rounded = neurons.residual(product(some.x, w1, dense.b1))
        counted = outside if some.weight is None else outside * some.weight[:, None]
        wanted += (counted * exact * rounded).sum(0)
        found += (counted * rounded.square()).sum(0)
        count += outside.sum(0)
    one = found / count.clamp_min(1)
    scale = torch.where(found > 0, (wanted + one) / (found + one), 1.0).clamp(1 / _MOST, _MOST)
    matched = folded.down.scale.float() * scale[:, None]
    return replace(folded, down=replace(folded.down, scale=matched.half()))


def store_fold(
    weight: Tensor, storage: Storage | FoldFormat, dtype: torch.dtype, covariance: Tensor | None
) -> Tensor | PackedMatrix:
    """The fold as it is stored: in `dtype`, or in few bits.

    Args:
        weight: [d, d] fp32, C.
        storage: says in how many bits, if in few, and in what groups.
        dtype: of the model.
        covariance: [d, d] second moments of the inputs, by which the rounding errors of few bits are spread; None to
            round to the nearest.
    """
    if storage.fold_bits is None:
        return weight.to(dtype).contiguous()  # strides choose the kernel, and so bits
    return quantise(weight, storage.fold_bits, storage.group_size, covariance)
