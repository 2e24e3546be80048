"""Hot ranges: the two policies, and what each promises."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from marks import mostly_long
from synthetic import binned, normal, quick, residuals
from torch import Tensor

from tardis_llm.calibration.neurons import BINS, BinnedMoments
from tardis_llm.ffn.activations import ACTIVATIONS, gelu
from tardis_llm.folding.lines import fit_lines, squared_residuals
from tardis_llm.folding.ranges import (
    Ranges,
    cheapest_interval,
    coverage_ranges,
    coverage_ranges_at,
    error_ranges,
    error_ranges_at,
    highest_price,
    kernel_density,
    share_by_error,
)

every_activation = pytest.mark.parametrize("name", list(ACTIVATIONS))
both_policies = pytest.mark.parametrize("at_rate", [error_ranges_at, coverage_ranges_at])
NEURONS = 24


def neurons(tokens: int, seed: int, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """Predicted and real pre-activations [tokens, NEURONS] of neurons that differ in mean and spread."""
    mean, spread = normal(NEURONS, seed=1) - 0.7, 0.4 + normal(NEURONS, seed=2).abs()
    z = mean + spread * normal(tokens, NEURONS, seed=seed)
    return z + noise * spread * normal(tokens, NEURONS, seed=seed + 1), z


def calibrated(name: str, noise: float = 0.2) -> tuple[BinnedMoments, BinnedMoments, Tensor]:
    """Moments of calibration tokens, of held-out ones in the same bins, and gains."""
    fit = binned(*neurons(4000, 10, noise), name)
    held = binned(*neurons(1000, 20, noise), name, like=fit)
    return fit, held, 0.1 + normal(NEURONS, seed=3).double().square()


def histogram(*counts: list[float]) -> BinnedMoments:
    """Moments with these counts, one list per neuron, from the first bin on, and nothing else."""
    moments = BinnedMoments.around("gelu", torch.zeros(len(counts)), torch.ones(len(counts)))
    for row, count in zip(moments.count, counts, strict=True):
        row[: len(count)] = torch.tensor(count, dtype=torch.float64)
    moments.tokens = int(moments.count[0].sum())
    return moments


def objective(ranges: Ranges, moments: BinnedMoments, gain: Tensor, price: float) -> float:
    """What `error_ranges` minimises, per token."""
    fixed = ranges.fix_rate(moments) * len(gain)
    return ranges.error(moments, gain) + price * fixed


def outside(ranges: Ranges, u: Tensor) -> Tensor:
    """[tokens, h] where u is out of its range, as the runtime decides it."""
    return ranges.neurons.outside(u)


@quick
@given(st.integers(0, 10_000), st.integers(1, 12), st.booleans())
def test_the_cheapest_interval_equals_brute_force(seed: int, bins: int, integers: bool) -> None:
    cost = normal(5, bins, seed=seed).double()
    cost = cost.round() if integers else cost  # integers: many ties
    start, stop = cheapest_interval(cost)
    assert ((start >= 0) & (start < stop) & (stop <= bins)).all()
    for row, first, end in zip(cost, start.tolist(), stop.tolist(), strict=True):
        best = min(float(row[i:j].sum()) for i, j in combinations(range(bins + 1), 2))
        assert float(row[first:end].sum()) == pytest.approx(best, abs=1e-12)


@every_activation
@pytest.mark.parametrize("price", [1e-6, 1e-4, 1e-2, 1.0])
def test_error_ranges_are_no_worse_than_fixing_nothing_or_everything(name: str, price: float) -> None:
    fit, _, gain = calibrated(name)
    ranges = error_ranges(fit, gain, price)
    everywhere = torch.ones_like(ranges.inside)
    line = squared_residuals(fit, *fit_lines(fit, everywhere))
    nothing_fixed = float((line.sum(1) * gain).sum() / fit.tokens)
    everything_fixed = price * NEURONS
    assert objective(ranges, fit, gain, price) <= min(nothing_fixed, everything_fixed) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "price"),
    mostly_long(
        [*((name, 1e-1) for name in ACTIVATIONS), ("gelu", 1e-2), ("relu", 1e-2), ("gelu", 1.0)],
        [("gelu", 1e-1), ("relu", 1e-2), ("gelu", 1.0)],
    ),
)
def test_error_ranges_are_close_to_the_best_of_all_intervals(name: str, price: float) -> None:
    fit, _, gain = calibrated(name)
    intervals = list(combinations(range(BINS + 1), 2))
    best = torch.full((NEURONS,), torch.inf, dtype=torch.float64)
    for start, stop in intervals:
        n, z, zz, a, az, aa = fit.sums[1:, :, start:stop].sum(-1)
        n = n.clamp_min(1)
        spread, slant = zz - z * z / n, az - a * z / n
        left = (aa - a * a / n - torch.where(spread > 1e-9, slant**2 / spread, 0)).clamp_min(0)
        best = torch.minimum(best, left * gain + price * (fit.tokens - fit.count[:, start:stop].sum(1)))
    found = objective(error_ranges(fit, gain, price), fit, gain, price)
    assert found <= 1.05 * float(best.sum()) / fit.tokens
    assert found >= 0.999 * float(best.sum()) / fit.tokens


def test_free_fixing_leaves_no_error() -> None:
    fit, _, gain = calibrated("gelu")
    ranges = error_ranges(fit, gain, 0.0)
    assert ranges.error(fit, gain) < 1e-9
    assert ranges.fix_rate(fit) > 0.99


@every_activation
def test_at_the_highest_price_nothing_is_fixed(name: str) -> None:
    fit, _, gain = calibrated(name)
    ranges = error_ranges(fit, gain, highest_price(fit, gain))
    assert ranges.fix_rate(fit) == 0
    slope, offset = fit_lines(fit, torch.ones_like(ranges.inside))
    torch.testing.assert_close(ranges.neurons.slope, slope.float())
    torch.testing.assert_close(ranges.neurons.offset, offset.float())


def test_rate_and_error_of_ranges_equal_those_on_the_tokens() -> None:
    fit, held, gain = calibrated("gelu")
    ranges = error_ranges(fit, gain, 1e-3)
    u, z = neurons(1000, 20)
    fixed = outside(ranges, u)
    assert ranges.fix_rate(held) == pytest.approx(float(fixed.double().mean()), abs=1e-9)
    left = residuals(gelu, z, ranges.neurons.slope, ranges.neurons.offset).square() * ~fixed
    assert ranges.error(held, gain) == pytest.approx(float((left * gain).sum(1).mean()), rel=1e-5)


def test_ranges_are_the_edges_of_their_bins() -> None:
    fit, _, gain = calibrated("silu")
    ranges = error_ranges(fit, gain, 1e-3)
    edges = fit.edges()
    for neuron in range(NEURONS):
        bins = ranges.inside[neuron].nonzero()[:, 0]
        assert len(bins) == bins[-1] - bins[0] + 1
        assert ranges.neurons.low[neuron] == edges[neuron, bins[0]]
        assert ranges.neurons.high[neuron] == edges[neuron, bins[-1] + 1]


@both_policies
@every_activation
@pytest.mark.parametrize("rate", mostly_long([0.003, 0.02, 0.1, 0.25], [0.003, 0.1]))
def test_the_fix_rate_is_met_from_below_and_closely(at_rate, name: str, rate: float) -> None:  # type: ignore[no-untyped-def]
    fit, held, gain = calibrated(name)
    met = at_rate(fit, held, gain, rate).fix_rate(held)
    assert met <= rate
    assert met >= rate * 0.9 - 0.002


@both_policies
def test_a_fix_rate_of_one_fixes_everything(at_rate) -> None:  # type: ignore[no-untyped-def]
    fit, held, gain = calibrated("gelu")
    ranges = at_rate(fit, held, gain, 1.0)
    assert ranges.fix_rate(held) == 1
    assert outside(ranges, torch.tensor([[-torch.inf], [-3.0], [0.0], [torch.inf]]).expand(4, NEURONS)).all()


@pytest.mark.parametrize("name", ["gelu", "relu", "silu"])
def test_the_error_rule_fixes_where_residual_times_gain_exceeds_a_threshold(name: str) -> None:
    fit, _, gain = calibrated(name, noise=0)
    _, z = neurons(4000, 10, noise=0)
    price = 1e-2
    ranges = error_ranges(fit, gain, price)
    exceeds = ranges.neurons.score(z, gain.sqrt()) > price**0.5
    near = ((z - ranges.neurons.low).abs() <= fit.width) | ((z - ranges.neurons.high).abs() <= fit.width)
    differs = (exceeds != outside(ranges, z)) & ~near
    # a range is one piece, so a neuron whose residual is small in two pieces gives one of them up
    one_piece = [not bool(d.any()) for d in differs.T]
    assert sum(one_piece) >= 0.8 * NEURONS
    assert 0.01 < float(exceeds.float().mean()) < 0.5


def test_relu_becomes_contextual_sparsity() -> None:
    z = normal(4000, NEURONS, seed=10) - 0.8
    fit = binned(z, z, "relu")
    ranges = error_ranges(fit, torch.ones(NEURONS, dtype=torch.float64), 1e-8)
    assert ranges.neurons.slope.tolist() == ranges.neurons.offset.tolist() == [0] * NEURONS
    assert ranges.error(fit, torch.ones(NEURONS, dtype=torch.float64)) == 0
    assert (ranges.neurons.low < z.min(0).values).all()
    assert ((ranges.neurons.high <= 1e-6) & (ranges.neurons.high > -1.01 * fit.width)).all()


@quick
@given(st.lists(st.integers(0, 50), min_size=BINS, max_size=BINS).filter(any))
def test_kernel_density_keeps_the_mass(counts: list[int]) -> None:
    moments = histogram(list(map(float, counts)), [float(BINS)] * BINS)
    density = kernel_density(moments.count)
    torch.testing.assert_close(density.sum(1), moments.count.sum(1))
    assert (density >= 0).all()


def test_kernel_density_finds_the_peak_between_outliers() -> None:
    position = torch.arange(BINS)
    bell = 1000 * torch.exp(-0.5 * ((position - 30) / 6.0) ** 2)
    spike = torch.where(position == 70, 1200.0, 0.0)  # the highest bin, but no mass around it
    density = kernel_density((bell + spike).double()[None])
    assert abs(int(density.argmax()) - 30) <= 1


def test_the_bandwidth_of_the_kernel_follows_silvermans_rule() -> None:
    position = torch.arange(BINS, dtype=torch.float64)
    count = 500 * torch.exp(-0.5 * ((position - 48) / 7) ** 2)[None]

    def variance(histogram: Tensor) -> float:
        mean = (histogram * position).sum() / histogram.sum()
        return float((histogram * (position - mean) ** 2).sum() / histogram.sum())

    bandwidth = 1.06 * variance(count) ** 0.5 * float(count.sum()) ** -0.2
    smoothed = kernel_density(count)
    assert variance(smoothed) == pytest.approx(variance(count) + bandwidth**2, rel=1e-3)


def test_kernel_density_of_one_bin_stays_there() -> None:
    moments = histogram([0.0, 0.0, 5.0])
    density = kernel_density(moments.count)
    assert int(density.argmax()) == 2
    assert density[0, 2] > 0.7 * 5


@every_activation
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_coverage_ranges_contain_the_peak_and_cover_the_threshold_barely(name: str, threshold: float) -> None:
    fit, _, _ = calibrated(name)
    ranges = coverage_ranges(fit, torch.full((NEURONS,), threshold, dtype=torch.float64))
    covered = (fit.count * ranges.inside).sum(1) / fit.tokens
    assert (covered >= threshold - 1e-9).all()
    peak = kernel_density(fit.count).argmax(1)
    assert ranges.inside[torch.arange(NEURONS), peak].all()
    largest_bin = fit.count.max(1).values / fit.tokens
    assert (covered <= threshold + largest_bin + 1e-6).all()


def test_coverage_ranges_grow_greedily_to_the_denser_side() -> None:
    fit, _, _ = calibrated("gelu")
    threshold = torch.linspace(0.05, 1, NEURONS, dtype=torch.float64)
    ranges = coverage_ranges(fit, threshold)
    density = kernel_density(fit.count)
    for neuron in range(NEURONS):
        start = int(density[neuron].argmax())
        stop = start + 1
        while fit.count[neuron, start:stop].sum() / fit.tokens < float(threshold[neuron]) - 1e-9:
            left = float(density[neuron, start - 1]) if start else -1.0
            right = float(density[neuron, stop]) if stop < BINS else -1.0
            start, stop = (start - 1, stop) if left > right else (start, stop + 1)
        assert ranges.inside[neuron].nonzero()[:, 0].tolist() == list(range(start, stop))


def test_coverage_lines_are_fitted_inside_the_range() -> None:
    fit, _, _ = calibrated("silu")
    ranges = coverage_ranges(fit, torch.full((NEURONS,), 0.7, dtype=torch.float64))
    slope, offset = fit_lines(fit, ranges.inside)
    torch.testing.assert_close(ranges.neurons.slope, slope.float())
    torch.testing.assert_close(ranges.neurons.offset, offset.float())


def test_adaptive_coverage_fixes_more_of_the_neurons_with_more_error() -> None:
    fit, held, gain = calibrated("gelu")
    ranges = coverage_ranges_at(fit, held, gain, 0.05)
    everywhere = torch.ones_like(ranges.inside)
    error = squared_residuals(fit, *fit_lines(fit, everywhere)).sum(1) * gain
    fixed = 1 - (fit.count * ranges.inside).sum(1) / fit.tokens
    order = error.argsort()
    assert fixed[order[-6:]].mean() > 2 * fixed[order[:6]].mean()


@both_policies
def test_of_two_equal_neurons_the_one_of_more_gain_is_fixed_more(at_rate) -> None:  # type: ignore[no-untyped-def]
    u, z = neurons(4000, 10)
    fit = binned(u[:, [0, 0]], z[:, [0, 0]], "gelu")
    ranges = at_rate(fit, fit, torch.tensor([1.0, 10.0], dtype=torch.float64), 0.1)
    kept = (fit.count * ranges.inside).sum(1)
    assert kept[1] < kept[0]


errors = st.lists(
    st.one_of(st.just(0.0), st.floats(-40, 3).map(lambda power: 10.0**power)), min_size=1, max_size=20
).filter(any)


@quick
@given(errors, st.floats(0, 1))
def test_shares_are_proportional_to_the_error_and_have_the_mean(values: list[float], mean: float) -> None:
    error = torch.tensor(values, dtype=torch.float64)
    share = share_by_error(error, mean)
    assert ((share >= 0) & (share <= 1)).all()
    most = 1.0 if mean == 1 else float((error > 0).double().mean())
    assert float(share.mean()) == pytest.approx(min(mean, most), abs=1e-9)
    part = (share < 1) & (error > 0)
    if part.sum() > 1 and mean > 0:
        ratio = share[part] / error[part]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-9, atol=0)


def test_shares_without_any_error_are_equal() -> None:
    assert share_by_error(torch.zeros(3), 0.25).tolist() == [0.25] * 3
