"""Hot ranges: for each neuron the interval of predicted pre-activations in which its line stands for it.

Both policies choose whole bins of the calibration statistics, `start <= bin < stop`, and fit the line inside.

`error` fixes a neuron where the squared output error that its line would leave, `E[r_i^2 | zhat] |W2[:, i]|^2`,
exceeds a price. That is the rule `|r_i(zhat)| |W2[:, i]| > tau` with tau^2 = price, except that the residual is
the measured one: a coarse predictor's noise is counted, not assumed away.

`coverage` is the published method (arXiv 2501.10054, section 4): start at the peak of the density, estimated with a
Gaussian kernel, and grow greedily towards the denser side until the range covers the neuron's threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.neurons import BINS, BinnedMoments
from ..calibration.sums import divisor
from ..ffn.neuron import Neurons
from .lines import fit_lines, squared_residuals

_ROUNDS = 5  # of fitting line and range in turn; each lowers one objective, and few are needed
_BISECTIONS = 16  # of an interval of 60 in the logarithm of a price: to 0.1 %


@dataclass(frozen=True)
class Ranges:
    """Hot ranges of an FFN's neurons, chosen by bins of calibration statistics.

    Attributes:
        neurons: their ranges and lines, fp32.
        inside: [h, BINS] bool, the bins in range.
    """

    neurons: Neurons
    inside: Tensor

    def fix_rate(self, moments: BinnedMoments) -> float:
        """Mean share of neurons fixed per token, on the tokens of `moments`, in the bins of `inside`."""
        return _fix_rate(moments, self.inside)

    def error(self, moments: BinnedMoments, gain: Tensor) -> float:
        """Mean squared output error per token that is left inside the ranges, neurons taken as uncorrelated.

        Args:
            moments: of any tokens, in the bins of `inside`.
            gain: [h] |W2[:, i]|^2.
        """
        left = squared_residuals(moments, self.neurons.slope, self.neurons.offset) * self.inside
        return float((left.sum(1) * gain).sum() / moments.tokens)


def error_ranges(moments: BinnedMoments, gain: Tensor, price: float) -> Ranges:
    """Ranges and lines that minimise output error + price x fixed neurons, line and range in turn.

    Args:
        moments: of the calibration tokens.
        gain: [h] fp64, |W2[:, i]|^2.
        price: squared output error that one fixed neuron must save.
    """
    return _ranges(moments, _cheapest_bins(moments, gain, price, _error_unfixed(moments, gain)))


def error_ranges_at(moments: BinnedMoments, counts: BinnedMoments, gain: Tensor, fix_rate: float) -> Ranges:
    """Ranges and lines of least output error with which `fix_rate` of the neurons are fixed on the tokens of `counts`.

    The rate is met from below as closely as bins allow, so that a byte budget is kept.

    Args:
        moments: calibration tokens on which lines and ranges are fitted.
        counts: tokens on which the rate is met, in the bins of `moments`.
        gain: [h] fp64.
        fix_rate: in [0, 1].
    """
    if fix_rate >= 1:
        return _fix_all(moments)
    unfixed = _error_unfixed(moments, gain)
    high = math.log(highest_price(moments, gain))
    low = high - 60
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _fix_rate(counts, _cheapest_bins(moments, gain, math.exp(middle), unfixed)) > fix_rate:
            low = middle
        else:
            high = middle
    return _ranges(moments, _cheapest_bins(moments, gain, math.exp(high), unfixed))


def range_curve(moments: BinnedMoments, counts: BinnedMoments, gain: Tensor, points: int) -> list[tuple[float, float]]:
    """(fix rate, squared output error left) of `error_ranges`, at prices from fixing none to nearly all.

    Args:
        moments: calibration tokens on which lines and ranges are fitted.
        counts: tokens on which rate and error are taken, in the bins of `moments`.
        gain: [h] fp64.
        points: how many.
    """
    unfixed, curve = _error_unfixed(moments, gain), []
    prices = 1.05 * highest_price(moments, gain) * torch.logspace(0, -7, points, dtype=torch.float64)
    for price in prices.tolist():
        ranges = _ranges(moments, _cheapest_bins(moments, gain, price, unfixed))
        curve.append((ranges.fix_rate(counts), ranges.error(counts, gain)))
    return curve


def _cheapest_bins(moments: BinnedMoments, gain: Tensor, price: float, unfixed: Tensor) -> Tensor:
    """[h, BINS] bool, the bins of `error_ranges`, where `unfixed` is `_error_unfixed(moments, gain)`.

    Neurons do not depend on each other: one whose range stays in a round has found it.
    """
    before = _bins_between(*cheapest_interval(unfixed - price * moments.count))
    inside = _anew(moments, gain, price, before)
    rows = (inside != before).any(1).nonzero()[:, 0]
    for _ in range(_ROUNDS - 2):
        if not len(rows):
            break
        before = inside[rows]
        inside[rows] = after = _anew(moments.at(rows), gain[rows], price, before)
        rows = rows[(after != before).any(1)]
    return inside


def _anew(moments: BinnedMoments, gain: Tensor, price: float, inside: Tensor) -> Tensor:
    """[h, BINS] bool, the cheapest bins for the lines that are fitted inside the present ones."""
    cost = squared_residuals(moments, *fit_lines(moments, inside)) * gain[:, None]
    return _bins_between(*cheapest_interval(cost - price * moments.count))


def _error_unfixed(moments: BinnedMoments, gain: Tensor) -> Tensor:
    """[h, BINS] squared output error in each bin, of lines that are fitted to all bins."""
    everywhere = torch.ones_like(moments.count, dtype=torch.bool)
    return squared_residuals(moments, *fit_lines(moments, everywhere)) * gain[:, None]


def highest_price(moments: BinnedMoments, gain: Tensor) -> float:
    """A price at which no neuron is worth fixing."""
    residual = squared_residuals(moments, *fit_lines(moments, torch.ones_like(moments.count, dtype=torch.bool)))
    return 2 * float((residual / divisor(moments.count) * gain[:, None]).max()) + 1e-30


def coverage_ranges(moments: BinnedMoments, threshold: Tensor) -> Ranges:
    """Ranges that cover at least `threshold` [h] of each neuron's inputs, grown greedily from the density's peak."""
    return _grown(moments, kernel_density(moments.count), threshold)


def _grown(moments: BinnedMoments, density: Tensor, threshold: Tensor) -> Ranges:
    """Ranges grown from the peak of a density [h, BINS] until they cover `threshold` [h] of each neuron's inputs."""
    share = moments.count / moments.tokens
    rows = torch.arange(len(density), device=density.device)
    start = density.argmax(1)
    stop = start + 1
    covered = share[rows, start]
    closed = F.pad(density, (1, 1), value=-1.0)  # a side that reached the end is never the denser one
    for _ in range(BINS - 1):
        growing = covered < threshold - 1e-12
        left, right = closed[rows, start], closed[rows, stop + 1]
        go_left = growing & (left > right)
        go_right = growing & ~go_left & (stop < BINS)
        start = start - go_left.long()
        covered = covered + torch.where(go_left, share[rows, start], 0.0)
        covered = covered + torch.where(go_right, share[rows, stop.clamp_max(BINS - 1)], 0.0)
        stop = stop + go_right.long()
    return _ranges(moments, _bins_between(start, stop))


def coverage_ranges_at(moments: BinnedMoments, counts: BinnedMoments, gain: Tensor, fix_rate: float) -> Ranges:
    """Coverage ranges with which `fix_rate` of the neurons are fixed on the tokens of `counts`.

    A neuron whose line is worse gets the larger share of the tokens outside (the paper's error-aware thresholds).

    Args:
        moments: calibration tokens on which lines and ranges are fitted.
        counts: tokens on which the rate is met, in the bins of `moments`.
        gain: [h] fp64, |W2[:, i]|^2.
        fix_rate: in [0, 1].
    """
    if fix_rate >= 1:
        return _fix_all(moments)
    everywhere = torch.ones_like(moments.count, dtype=torch.bool)
    error = squared_residuals(moments, *fit_lines(moments, everywhere)).sum(1) * gain
    density = kernel_density(moments.count)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        ranges = _grown(moments, density, 1 - share_by_error(error, middle))
        low, high = (low, middle) if ranges.fix_rate(counts) > fix_rate else (middle, high)
    return _grown(moments, density, 1 - share_by_error(error, low))


def share_by_error(error: Tensor, mean: float) -> Tensor:
    """Shares in [0, 1], proportional to `error` [k] until one is full, whose mean is `mean` in [0, 1].

    Where there is no error there is no share, so the mean may stay below; no error at all gives equal shares.
    """
    if mean >= 1 or not bool((error > 0).any()):
        return torch.full_like(error, min(mean, 1.0))
    ordered = error.sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)  # what errors and shares are left after the first 0, 1, ... full ones
    left = mean * len(error) - torch.arange(len(error), dtype=error.dtype, device=error.device)
    full = int((left * ordered <= rest).int().argmax())  # the fewest with which the next is not more than full
    return torch.where(error > 0, error / rest[full] * left[full], 0.0).clamp_max(1)


def kernel_density(count: Tensor) -> Tensor:
    """[h, BINS] Gaussian kernel density of histograms [h, BINS], bandwidth by Silverman's rule per neuron."""
    position = torch.arange(BINS, dtype=torch.float64, device=count.device)
    total = divisor(count.sum(1, keepdim=True))
    mean = (count * position).sum(1, keepdim=True) / total
    deviation = ((count * (position - mean) ** 2).sum(1, keepdim=True) / total).sqrt()
    bandwidth = (1.06 * deviation * total**-0.2).clamp_min(0.5)  # bins; below half a bin nothing is smoothed
    distance = position[:, None] - position[None, :]
    density = torch.empty_like(count)
    for rows in torch.arange(len(count), device=count.device).split(256):
        kernel = torch.exp(-0.5 * (distance / bandwidth[rows, :, None]) ** 2)  # [rows, BINS, BINS]
        density[rows] = (kernel / kernel.sum(1, keepdim=True) @ count[rows, :, None])[..., 0]
    return density


def cheapest_interval(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of cost [h, BINS], the non-empty interval `start <= bin < stop` of least sum; both [h].

    The sum is a difference of two prefix sums: for every stop the best start is where the prefix was highest.
    """
    prefix = F.pad(cost.cumsum(1), (1, 0))
    highest, where = prefix[:, :-1].cummax(1)
    stop = (prefix[:, 1:] - highest).argmin(1)
    start = where.gather(1, stop[:, None])[:, 0]
    return start, stop + 1


def _fix_rate(moments: BinnedMoments, inside: Tensor) -> float:
    return 1 - float((moments.count * inside).sum() / moments.count.sum())


def _bins_between(start: Tensor, stop: Tensor) -> Tensor:
    position = torch.arange(BINS, device=start.device)
    return (position >= start[:, None]) & (position < stop[:, None])


def _ranges(moments: BinnedMoments, inside: Tensor) -> Ranges:
    slope, offset = fit_lines(moments, inside)
    edges = moments.edges()
    start = inside.int().argmax(1)
    stop = start + inside.sum(1)
    low, high = (edges.gather(1, end[:, None])[:, 0] for end in (start, stop))
    return Ranges(Neurons(moments.activation, low, high, slope.float(), offset.float()), inside)


def _fix_all(moments: BinnedMoments) -> Ranges:
    """Empty ranges: every neuron is fixed for every token."""
    slope, offset = fit_lines(moments, torch.ones_like(moments.count, dtype=torch.bool))
    nothing = torch.full((len(slope),), torch.inf, device=slope.device)
    neurons = Neurons(moments.activation, nothing, -nothing, slope.float(), offset.float())
    return Ranges(neurons, torch.zeros_like(moments.count, dtype=torch.bool))
