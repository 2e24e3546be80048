"""Hot ranges of gated neurons: one threshold on the predicted score, shared by the neurons of an FFN.

A neuron is fixed where its predicted score, `|residual| * |W2[:, i]|`, exceeds the threshold. The format has an
interval of the predicted residual per neuron: `+- threshold / |W2[:, i]|`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.neurons import ScoreHistogram
from ..ffn.neuron import Neurons


@dataclass(frozen=True)
class Thresholds:
    """Hot ranges of an FFN's gated neurons.

    Attributes:
        neurons: their ranges and lines, fp32.
        edge: number of the lowest bin of scores that is fixed.
    """

    neurons: Neurons
    edge: int

    def fix_rate(self, scores: ScoreHistogram) -> float:
        """Mean share of neurons fixed per token, on the tokens of `scores`."""
        return float(scores.rate_above()[self.edge])

    def error(self, scores: ScoreHistogram) -> float:
        """Mean squared output error per token that is left inside the ranges, neurons taken as uncorrelated.

        Args:
            scores: of any tokens, in the bins that the threshold was chosen in.
        """
        return float(scores.error_below()[self.edge])


def thresholds_at(lines: Neurons, gain: Tensor, scores: ScoreHistogram, fix_rate: float) -> Thresholds:
    """Ranges with which `fix_rate` of the neurons are fixed on the tokens of `scores`, or as little less as bins allow.

    Args:
        lines: the neurons with any ranges.
        gain: [h] fp64, |W2[:, i]|^2.
        scores: tokens on which the rate is met.
        fix_rate: in [0, 1].
    """
    edge = 0 if fix_rate >= 1 else int((scores.rate_above() <= fix_rate).int().argmax())
    limit = scores.edge(edge) / gain.sqrt()
    limit = torch.where(gain > 0, limit, torch.inf).float()
    if edge == 0:  # all are fixed, those with a score of 0 too
        limit = torch.full_like(limit, -torch.inf)
    return Thresholds(replace(lines, low=-limit, high=limit), edge)


def score_curve(scores: ScoreHistogram, points: int) -> list[tuple[float, float]]:
    """(fix rate, squared output error left) at thresholds from fixing none to nearly all, by rates that grow evenly."""
    rates, errors = scores.rate_above(), scores.error_below()
    wanted = torch.cat([torch.zeros(1), torch.logspace(-3, -0.05, points - 1)]).double()
    edges = [int((rates <= rate).int().argmax()) for rate in wanted.tolist()]
    return [(float(rates[edge]), float(errors[edge])) for edge in dict.fromkeys(edges)]
