"""What refitting has to know of the inputs of one FFN: constant in size, streamed, and able to follow the traffic."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..calibration.moments import SecondMoments, Sums, chunks
from ..ffn.neuron import Neurons
from ..ffn.weights import DenseFFN, FoldedWeights, written_out


@dataclass(frozen=True)
class Targets(Sums):
    """What the fold has to explain, beside the inputs.

    Attributes:
        left: moments of x beside what fixing leaves, `y - fix(x)`.
        output: moments of x beside the dense output y.
        fixed: neurons fixed, summed over the tokens.
        neurons: h.
    """

    _GIVEN = frozenset({"neurons"})
    left: SecondMoments
    output: SecondMoments
    fixed: float
    neurons: int

    @property
    def fix_rate(self) -> float:
        """Share of the neurons fixed per token."""
        return self.fixed / (self.left.count * self.neurons)


@dataclass(frozen=True)
class Statistics(Sums):
    """All that a fold is refitted from: moments of the inputs beside themselves, and what the fold has to explain."""

    x: SecondMoments
    targets: Targets


def input_moments(x: Tensor) -> SecondMoments:
    """Second moments of inputs x [tokens, d]."""
    moments = SecondMoments.zeros(x.shape[1], x.shape[1])
    for chunk in chunks(x, x.shape[1]):
        chunk = chunk.float()
        moments.add(chunk, chunk)
    return moments


def target_moments(ffn: DenseFFN, x: Tensor, w_hat: Tensor, neurons: Neurons, w1: Tensor, w2: Tensor) -> Targets:
    """Stream inputs x [tokens, d] through the dense FFN and the fixing.

    Args:
        w_hat: [h, d] fp32, the dequantised predictor.
        neurons: ranges and lines as stored.
        w1, w2: [h, d] and [d, h], the weights that fixing reads: those of `ffn`, or what stands for them.
    """
    d, h = x.shape[1], len(ffn.w1)
    exact, w1, w2 = w1 is ffn.w1, w1.float(), w2.float()
    left, output = SecondMoments.zeros(d, d), SecondMoments.zeros(d, d)
    fixed, neurons = 0, neurons.map(Tensor.float)
    for chunk in chunks(x, h):
        chunk = chunk.float()
        z = F.linear(chunk, ffn.w1, ffn.b1)
        zhat = F.linear(chunk, w_hat, ffn.b1)
        outside = neurons.outside(zhat)
        a = ffn.act(z)
        y = F.linear(a, ffn.w2, ffn.b2)
        output.add(chunk, y)
        if not exact:
            z = F.linear(chunk, w1, ffn.b1)
            a = ffn.act(z)
        left.add(chunk, y - F.linear(neurons.residual(z, a) * outside, w2))
        fixed += int(outside.sum())
    return Targets(left, output, fixed, h)


def gather(dense: DenseFFN, folded: FoldedWeights, x: Tensor) -> Statistics:
    """Statistics of inputs x [tokens, d] of an FFN, to refit its fold with.

    Args:
        dense: the FFN as it was before it was folded, in any float dtype.
        folded: its fold, whose predictor, ranges, lines and fallback weights stay.
        x: in any float dtype.

    Example:
        >>> from tardis_llm.checkpoint.loading import load_model
        >>> from tardis_llm.families.sites import find_ffns
        >>> from tardis_llm.runtime.placing import folded_ffns
        >>> site = find_ffns(model)[0]
        >>> folded = folded_ffns(load_model("folded"))[site.prefix].weights
        >>> statistics = gather(site.weights(), folded, torch.randn(512, site.hidden_size))
        >>> statistics.merge(statistics).decay(0.5).x.count
        512.0
    """
    ffn = dense.in_fp32()
    fixing = folded.fallback(dense.w1.dtype) if folded.stacked else (ffn.w1, ffn.w2)
    targets = target_moments(ffn, x, written_out(folded.predictor), folded.neurons, *fixing)
    return Statistics(input_moments(x), targets)
