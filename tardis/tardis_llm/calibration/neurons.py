"""Streamed statistics of an FFN's neurons, by what is predicted of them: lines and ranges follow without the tokens.

All are sums over tokens in fp64. A token may count for more or less than others: see `Tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ffn.activations import activation
from .sums import Sums

#: bins per neuron, and how many standard deviations they span to each side; the outermost bins are open
BINS, SPAN = 96, 5.0


@dataclass
class BinnedMoments(Sums):
    """Per neuron and bin of `u`, the moments from which any line's error in any interval follows exactly.

    `u` is what a range is tested on: the predicted pre-activation `zhat`. Inside a bin, with `a = act(z)`,
    `sum (a - s z - o)^2` for every line (s, o) is a combination of the six sums below, so lines and ranges are
    fitted without another pass over the tokens, and the noise of the predictor is part of the statistics. A token's
    weight is in all of them but the count, which tells how much a range fixes.

    Attributes:
        activation: of the neurons, a name that `activation` takes.
        edge: [h] lower edge of the first bin.
        width: [h] width of a bin.
        sums: [7, h, BINS] fp64: count, then weighted 1, z, z^2, a, a z, a^2.
        tokens: tokens seen, a fraction after `decay`.
    """

    _GIVEN = frozenset({"activation", "edge", "width"})
    activation: str
    edge: Tensor
    width: Tensor
    sums: Tensor
    tokens: float = 0

    @classmethod
    def around(cls, activation: str, mean: Tensor, deviation: Tensor) -> BinnedMoments:
        """Empty bins over mean +- SPAN deviations, both [h] fp32."""
        deviation = deviation.clamp_min(1e-6 * (1 + mean.abs()))
        sums = torch.zeros(7, len(mean), BINS, dtype=torch.float64, device=mean.device)
        return cls(activation, mean - SPAN * deviation, 2 * SPAN / BINS * deviation, sums)

    def add(self, u: Tensor, z: Tensor, weight: Tensor | None = None) -> None:
        """Add tokens: u and z are [tokens, h] fp32, weight [tokens] or None for 1."""
        u, z = u.T.contiguous(), z.T.contiguous()
        bins = ((u - self.edge[:, None]) / self.width[:, None]).clamp_(0, BINS - 1).long()
        a, z = activation(self.activation)(z).double(), z.double()
        one = torch.ones_like(z)
        w = one if weight is None else weight.double().expand_as(z)
        wz, wa = w * z, w * a
        for total, value in zip(self.sums, (one, w, wz, wz * z, wa, wa * z, wa * a), strict=True):
            total.scatter_add_(1, bins, value)
        self.tokens += u.shape[1]

    @property
    def count(self) -> Tensor:
        """[h, BINS] tokens per bin."""
        return self.sums[0]

    def at(self, neurons: Tensor) -> BinnedMoments:
        """Those of some neurons, by their numbers."""
        sums = self.sums[:, neurons]
        return BinnedMoments(self.activation, self.edge[neurons], self.width[neurons], sums, self.tokens)

    def edges(self) -> Tensor:
        """[h, BINS + 1] fp32: the bins' edges; the first is -inf and the last inf, as the outer bins are open."""
        steps = torch.arange(BINS + 1, dtype=torch.float32, device=self.edge.device)
        edges = self.edge[:, None] + self.width[:, None] * steps
        edges[:, 0], edges[:, -1] = -torch.inf, torch.inf
        return edges


@dataclass
class PairMoments(Sums):
    """Per gated neuron, the weighted moments of its predicted (g, u) and its output: a line follows from them.

    Attributes:
        sums: [9, h] fp64: 1, g, u, g^2, g u, u^2, a, a g, a u for the output a.
    """

    sums: Tensor

    @classmethod
    def zeros(cls, h: int, device: torch.device | None = None) -> PairMoments:
        """Moments of no tokens, on a device; default: the CPU."""
        return cls(torch.zeros(9, h, dtype=torch.float64, device=device))

    def add(self, v: Tensor, a: Tensor, weight: Tensor | None = None, inside: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            v: [tokens, 2 h] fp32, predicted.
            a: [tokens, h] fp32, outputs.
            weight: [tokens], or None for 1.
            inside: [tokens, h] bool, which outputs count; None for all.
        """
        g, u = v.chunk(2, -1)
        w = torch.ones(len(v), device=v.device) if weight is None else weight
        one = torch.ones_like(g) if inside is None else inside.to(g.dtype)
        og, ou, oa = one * g, one * u, one * a
        products = (one, og, ou, og * g, og * u, ou * u, oa, oa * g, oa * u)
        for total, product in zip(self.sums, products, strict=True):
            total += w @ product


#: bins of a `ScoreHistogram`: steps of 1/64 octave over 40 octaves around the unit
_STEPS, _OCTAVES = 64, 40


@dataclass
class ScoreHistogram(Sums):
    """How many neurons of an FFN have which predicted score, and what leaving them out costs.

    Attributes:
        unit: a typical score, in the middle of the bins.
        sums: [2, bins] fp64: pairs of a token and a neuron, and their weighted squared error in the FFN's output.
        tokens: tokens seen, a fraction after `decay`.
    """

    _GIVEN = frozenset({"unit"})
    unit: float
    sums: Tensor
    tokens: float = 0

    @classmethod
    def around(cls, unit: float, device: torch.device | None = None) -> ScoreHistogram:
        """Empty bins around a typical score, on a device; default: the CPU."""
        return cls(unit, torch.zeros(2, _STEPS * _OCTAVES, dtype=torch.float64, device=device))

    def add(self, score: Tensor, error: Tensor) -> None:
        """Add predicted scores and weighted squared errors, both [tokens, h] fp32."""
        bins = ((score / self.unit).log2_().mul_(_STEPS).add_(_STEPS * _OCTAVES // 2)).nan_to_num_(1e9, 1e9, 0.0)
        bins = bins.clamp_(0, self.sums.shape[1] - 1).long().flatten()
        self.sums[0] += torch.bincount(bins, minlength=self.sums.shape[1])
        self.sums[1] += torch.bincount(bins, error.flatten().double(), self.sums.shape[1])
        self.tokens += len(score)

    def rate_above(self) -> Tensor:
        """[bins + 1] share of the pairs in bins from each on: the fix rate with that edge as threshold."""
        return F.pad(self.sums[0].flip(0).cumsum(0).flip(0), (0, 1)) / self.sums[0].sum().clamp_min(1)

    def error_below(self) -> Tensor:
        """[bins + 1] mean squared error per token of the bins below each edge, neurons taken as uncorrelated."""
        return F.pad(self.sums[1].cumsum(0), (1, 0)) / max(self.tokens, 1)

    def edge(self, number: Tensor | int) -> Tensor:
        """The lower edge of a bin; that of the first is 0 and that behind the last is infinite."""
        at = torch.as_tensor(number, dtype=torch.float64)
        value = self.unit * torch.exp2((at - _STEPS * _OCTAVES // 2) / _STEPS)
        return value.where(at > 0, 0.0).where(at < self.sums.shape[1], torch.inf)
