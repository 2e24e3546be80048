"""Fold one FFN and keep the neurons that would be fixed often: all others are predicted, and fixed where they must be.

    y = x C^T + c + sum over fixed neurons i of residual_i W2[:, i] + sum over kept neurons i of value_i W2[:, i]

Fixing a neuron takes longer than computing it beside its neighbours, as its rows are read by themselves, and a neuron
that is kept needs no prediction. So one that is fixed in more than a share of the tokens is better kept. What is rare
is still predicted, and so fixed, on text unlike the calibration text too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.tokens import Tokens, product
from ..config import FoldConfig
from ..ffn.accounting import cost, planned
from ..ffn.neuron import Neurons
from ..ffn.packed import PackedMatrix
from ..ffn.weights import DenseFFN, FoldedWeights
from .fold import AnyPredicted, FoldQuality, Inputs, PredictedGated, choose_ranges, finished, without_fold
from .kept import keep, up_bias
from .stack import match_sizes
from .statistics import fixing

_TOKENS = 4096  # on which it is counted how often neurons are fixed
_BISECTIONS = 8  # of a fix rate


def fold_mixed(
    ffn: DenseFFN, inputs: Inputs, predicted: AnyPredicted, fix_rate: float, config: FoldConfig, dtype: torch.dtype
) -> tuple[FoldedWeights, FoldQuality]:
    """A mixed fold, and its quality on held-out tokens.

    Args:
        ffn: in fp32.
        inputs: that the FFN sees.
        predicted: the predictor of all neurons.
        fix_rate: of a dynamic fold that reads as many bytes for a token as this one may.
        config: settings; a neuron that is fixed in more than `keep_above` of the tokens is kept.
        dtype: of the model.
    """
    choice = choose(ffn, inputs, predicted, fix_rate, config)
    others = ffn.at(choice.others)
    neurons = choice.neurons.at(choice.others)
    predictor = _rows_of(predicted.predictor, choice.others, ffn)
    weights = match_sizes(others, without_fold(others, predictor, neurons, inputs, config, dtype), inputs.fit)
    if len(choice.kept):
        weights = replace(weights, b1=up_bias(others, dtype))
        fixes = fixing(others, weights)
        weights = keep(ffn, choice.kept, weights, inputs, config, lambda x: fixes(x)[0])
    return finished(ffn, inputs, weights, config)


@dataclass(frozen=True)
class Choice:
    """Which neurons are kept, and when the others are fixed.

    Attributes:
        neurons: lines and hot ranges, of all.
        kept: numbers of those that are kept, in order.
        others: numbers of all others, in order.
    """

    neurons: Neurons
    kept: Tensor
    others: Tensor


def choose(ffn: DenseFFN, inputs: Inputs, predicted: AnyPredicted, fix_rate: float, config: FoldConfig) -> Choice:
    """The choice that reads as many bytes for a held-out token as a dynamic fold of this fix rate, or as little less.

    Args:
        ffn, inputs, predicted, fix_rate, config: as of `fold_mixed`.
    """
    bits = predicted.predictor.bits
    budget = planned(ffn, config.storage, bits).touched(fix_rate)
    tested = _tested(ffn, predicted, inputs.heldout.spread(_TOKENS))
    low, high, best = 0.0, 1.0, None
    for _ in range(_BISECTIONS):
        rate = (low + high) / 2
        neurons = choose_ranges(ffn, predicted, rate, config).neurons
        often = _how_often(neurons, tested)
        kept, others = _apart(often, config.keep_above, min(config.group_size, ffn.d))
        if _touched(ffn, bits, len(kept), float(often[others].mean()), config) <= budget:
            low, best = rate, Choice(neurons, kept, others)
        else:
            high = rate
    if best is None:  # hardly anything can be fixed
        neurons = choose_ranges(ffn, predicted, 0.0, config).neurons
        best = Choice(neurons, *_apart(torch.zeros_like(ffn.gain), config.keep_above, 1))
    return best


def _tested(ffn: DenseFFN, predicted: AnyPredicted, tokens: Tokens) -> list[Tensor]:
    """What hot ranges are of, [tokens, h] in chunks: the same at every fix rate, as gated neurons keep their lines."""
    w_hat = predicted.predictor.dequantise()
    seen = (product(some.x, w_hat, ffn.b1) for some in tokens.chunks(len(ffn.w1)))
    return [predicted.lines.tested(v) if isinstance(predicted, PredictedGated) else v for v in seen]


def _how_often(neurons: Neurons, tested: Sequence[Tensor]) -> Tensor:
    """[h] share of the tokens in which each neuron is predicted out of its hot range.

    Args:
        neurons: their ranges.
        tested: what these are of, as `Neurons.tested` gives it, in chunks [tokens, h].
    """
    count = torch.stack([neurons.excludes(some).sum(0) for some in tested]).sum(0)
    return count / sum(map(len, tested))


def _apart(often: Tensor, most: float, group: int) -> tuple[Tensor, Tensor]:
    """Numbers of the neurons to keep, in whole groups, and of the others, at least one; both in order.

    Args:
        often: [h] in what share of the tokens each is fixed.
        most: share beyond which it is kept.
        group: neurons whose columns of W2 share a scale.
    """
    wanted = int((often > most).sum())
    count = min(round(wanted / group), (len(often) - 1) // group) * group
    order = often.argsort(descending=True, stable=True)
    return order[:count].sort().values, order[count:].sort().values


def _touched(ffn: DenseFFN, bits: int, kept: int, fix_rate: float, config: FoldConfig) -> float:
    """Bytes that a token reads of a mixed fold that keeps so many neurons and fixes such a share of the others."""
    if not kept:
        return planned(ffn, config.storage, bits).touched(fix_rate)
    form = config.storage.mixed_format(ffn, bits, kept)
    return cost(ffn, FoldedWeights.empty(form, ffn.d, ffn.h, ffn.w1.dtype, torch.device("meta"))).touched(fix_rate)


def _rows_of(predictor: PackedMatrix, neurons: Tensor, ffn: DenseFFN) -> PackedMatrix:
    """The predictor of some neurons of the FFN that it is of."""
    rows = ffn.rows(neurons)
    return replace(predictor, planes=predictor.planes[rows].contiguous(), scale=predictor.scale[rows].contiguous())
