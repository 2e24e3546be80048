"""The folded FFN in plain torch: the specification that every kernel is tested against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ffn.weights import FFNWeights, FoldedWeights, dense_fold
from .linears.dense import linear


def folded_ffn(
    x: Tensor,
    folded: FoldedWeights,
    dense: FFNWeights,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """Output [tokens, d] of a folded FFN for inputs x [tokens, d], in the dtype of x.

    Rows of W1 and columns of W2 are gathered for the union of the tokens' fixed neurons, and each token adds the
    residuals of its own. Predictions, residuals and the sum are in fp32; the matrix products in the dtype of x.

    Args:
        x: [tokens, d].
        folded: fold, predictor, ranges and lines.
        dense: the weights that fixing reads, in the dtype of x.
        act: the activation.
    """
    fixed = fixed_neurons(x, folded, dense.b1)  # [tokens, h]
    union = fixed.any(0).nonzero()[:, 0]
    z = F.linear(x, dense.w1[union], None if dense.b1 is None else dense.b1[union]).float()
    residual = act(z) - folded.slope[union].float() * z - folded.offset[union].float()
    residual = torch.where(fixed[:, union], residual, 0.0)
    affine = F.linear(x, dense_fold(folded.weight, x.dtype), folded.bias)
    correction = F.linear(residual.to(x.dtype), dense.w2[:, union])
    return (affine.float() + correction.float()).to(x.dtype)


def dense_ffn(x: Tensor, dense: FFNWeights, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Output [..., d] of the FFN before it was folded, in the dtype of x.

    Args:
        x: [..., d].
        dense: its b2 is added here, where the fold has it in its bias.
        act: the activation.
    """
    return linear(act(linear(x, dense.w1, dense.b1)), dense.w2, dense.b2)


def fixed_neurons(x: Tensor, folded: FoldedWeights, b1: Tensor | None) -> Tensor:
    """[tokens, h] bool: the neurons S(x) predicted to be out of their hot range. NaN counts as out of it."""
    zhat = F.linear(x.float(), folded.predictor.dequantise(), None if b1 is None else b1.float())
    return ~((zhat >= folded.low.float()) & (zhat <= folded.high.float()))
