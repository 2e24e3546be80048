"""Stacking with quantisation: the fold, and the weights that fixing reads, in few bits.

Fixing reads W1 as `predictor + remainder`: the predictor's bits serve twice, and a fixed neuron's pre-activation is
what was predicted plus the remainder's product. W2 is stored neuron by neuron, as its transpose. The refit comes after
both, so the fold takes up what their rounding leaves of a linear map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ffn.packed import PackedMatrix
from ..ffn.weights import FoldFormat, Storage
from .rounding import quantise


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
    left = bits - predictor.bits if storage.remainder_bits is None else storage.remainder_bits
    if left > 0:
        remainder = quantise(w1 - predictor.dequantise(), left, group_size, covariance)
    return remainder, quantise(w2.T.contiguous(), bits, group_size, has_zero=True)


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
