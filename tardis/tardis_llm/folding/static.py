"""Fold one FFN statically: keep the neurons that a linear map says least of, in few bits, and fold all others.

    y = x C^T + c + sum over kept neurons i of value_i(v) W2[:, i]

No neuron is predicted, and every token computes the same ones. So it reads weights in stretches, where fixing reads
rows here and there, and saves time at every batch. What a folded neuron does on text unlike the calibration text is
lost.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..calibration.moments import SecondMoments
from ..calibration.tokens import product
from ..config import FoldConfig
from ..ffn.neuron import value
from ..ffn.weights import DenseFFN, FoldedWeights
from .fold import FoldQuality, Inputs, finished
from .kept import keep, up_bias
from .ridge import affine_errors, ridge

_LINE_DAMPING = 1e-3  # of the map that tells how linear a neuron is


def fold_static(
    ffn: DenseFFN, inputs: Inputs, kept: int, config: FoldConfig, dtype: torch.dtype
) -> tuple[FoldedWeights, FoldQuality]:
    """A static fold that keeps so many neurons, and its quality on held-out tokens.

    Args:
        ffn: in fp32.
        inputs: that the FFN sees.
        kept: number of neurons, at least 1.
        config: settings; `fallback_bits` are those of the kept neurons.
        dtype: of the model.
    """
    neurons = error_of_lines(ffn, inputs).topk(kept).indices.sort().values
    form = config.storage.static_format(replace(ffn, b1=up_bias(ffn, dtype)), kept)
    empty = FoldedWeights.empty(form, ffn.d, ffn.h, dtype, ffn.w1.device)
    return finished(ffn, inputs, keep(ffn, neurons, empty, inputs, config), config)


def error_of_lines(ffn: DenseFFN, inputs: Inputs) -> Tensor:
    """[h] fp64, squared error of the output that each neuron leaves where the best affine map of x stands for it.

    Args:
        ffn: in fp32.
        inputs: that it sees.
    """
    x, values = inputs.fit_moments, SecondMoments.zeros(ffn.d, ffn.h, inputs.fit.device)
    for some in inputs.fit.chunks(len(ffn.w1)):
        values.add(some.x, value(product(some.x, ffn.w1, ffn.b1), ffn.act, ffn.k), some.weight)
    best = ridge(inputs.spectrum, x, values, x, values, dampings=(_LINE_DAMPING,))
    return affine_errors(best.weight, best.bias, x, values) * ffn.gain
