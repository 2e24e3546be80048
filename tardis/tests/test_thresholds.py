"""Gated neurons: lines in two variables, scores by histogram, and the threshold that meets a fix rate."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from synthetic import correlated, forward, normal, random_ffn

from tardis_llm.calibration.neurons import PairMoments, ScoreHistogram
from tardis_llm.calibration.tokens import Tokens
from tardis_llm.config import FoldConfig
from tardis_llm.ffn.neuron import Neurons
from tardis_llm.folding.fold import (
    Inputs,
    _fit_lines,
    _gated_lines,
    _products,
    _scores,
    choose_ranges,
    error_curve,
    error_left,
    finish,
    predict,
)
from tardis_llm.folding.lines import fit_gated_lines
from tardis_llm.folding.rounding import quantise
from tardis_llm.folding.thresholds import score_curve, thresholds_at
from tardis_llm.runtime.reference import fixed_neurons, folded_ffn

D, H = 24, 40
STACKED = {"fold_bits": 8, "fallback_bits": 4, "remainder_bits": 3}


def scores() -> tuple[torch.Tensor, torch.Tensor, ScoreHistogram]:
    """Scores and errors [tokens, H], and their histogram."""
    score, error = normal(500, H, seed=1).abs(), normal(500, H, seed=2).square()
    found = ScoreHistogram.around(float(score.mean()))
    for some, its in zip(score.split(190), error.split(190), strict=True):
        found.add(some, its)
    return score, error, found


def gated_inputs(dtype: torch.dtype = torch.float32) -> Inputs:
    return Inputs(Tokens(correlated(2500, D, 1).to(dtype)), Tokens(correlated(900, D, 2).to(dtype)))


@pytest.mark.parametrize("weighed", [False, True])
def test_gated_lines_are_the_least_squares_lines_of_every_neuron(weighed: bool) -> None:
    v, a = normal(300, 2 * H, seed=1), normal(300, H, seed=2)
    weight = normal(300, seed=3).abs() if weighed else None
    moments = PairMoments.zeros(H)
    for at in (slice(0, 120), slice(120, None)):
        moments.add(v[at], a[at], None if weight is None else weight[at])
    slope, offset = fit_gated_lines(moments)
    for i in range(0, H, 7):
        x = torch.stack([v[:, i], v[:, H + i], torch.ones(300)], 1).double()
        root = (torch.ones(300) if weight is None else weight).double().sqrt()[:, None]
        best = torch.linalg.lstsq(x * root, a[:, i : i + 1].double() * root).solution[:, 0]
        torch.testing.assert_close(torch.stack([slope[i], slope[H + i], offset[i]]), best, rtol=1e-4, atol=1e-5)


def test_neurons_whose_input_never_changes_have_a_flat_line() -> None:
    v, a = normal(100, 2 * H, seed=1), normal(100, H, seed=2)
    v[:, 3], v[:, H + 3], a[:, 3] = 2.0, -1.0, 0.5
    moments = PairMoments.zeros(H)
    moments.add(v, a)
    slope, offset = fit_gated_lines(moments)
    line = Neurons("silu", *torch.zeros(2, H), slope.float(), offset.float()).line(v)
    torch.testing.assert_close(line[:, 3], torch.full((100,), 0.5), rtol=0, atol=1e-3)


def test_rates_and_errors_are_those_of_the_scores_themselves() -> None:
    score, error, found = scores()
    rates, errors = found.rate_above(), found.error_below()
    for number in (0, 900, 1280, 1300, 1400, len(rates) - 1):
        edge = float(found.edge(number))
        above = score >= edge
        assert float(rates[number]) == pytest.approx(float(above.double().mean()), abs=2e-4)
        assert float(errors[number]) == pytest.approx(float((error * ~above).sum() / 500), rel=2e-3, abs=1e-6)
    assert found.edge(0) == 0 and found.edge(len(rates) - 1) == torch.inf


def test_scores_that_are_zero_or_no_number_have_a_bin() -> None:
    found = ScoreHistogram.around(1.0)
    found.add(torch.tensor([[0.0, torch.nan, torch.inf]]), torch.zeros(1, 3))
    assert found.sums[0, 0] == 1 and found.sums[0, -1] == 2


@pytest.mark.parametrize("rate", [0.0, 0.03, 0.2, 0.9, 1.0])
def test_a_threshold_meets_its_rate_from_below(rate: float) -> None:
    score, _, found = scores()
    lines, norm = Neurons("silu", *torch.zeros(2, H), torch.zeros(2 * H), torch.zeros(H)), normal(H, seed=4).abs() + 0.1
    chosen = thresholds_at(lines, norm.double().square(), found, rate)
    assert rate - 0.01 <= chosen.fix_rate(found) <= rate
    residual = score / norm
    outside = ~((residual >= chosen.neurons.low) & (residual <= chosen.neurons.high))
    assert float(outside.double().mean()) == pytest.approx(chosen.fix_rate(found), abs=2e-4)


def test_a_neuron_without_a_column_is_never_fixed() -> None:
    _, _, found = scores()
    lines = Neurons("silu", *torch.zeros(2, H), torch.zeros(2 * H), torch.zeros(H))
    gain = torch.ones(H, dtype=torch.float64).index_fill(0, torch.tensor([5]), 0.0)
    assert thresholds_at(lines, gain, found, 0.2).neurons.high[5] == torch.inf


def test_the_curve_runs_from_fixing_nothing_to_nearly_all() -> None:
    _, _, found = scores()
    curve = score_curve(found, 20)
    assert curve[0][0] == 0 and curve[-1][0] > 0.8 and len(curve) > 10
    assert all(one[0] < other[0] and one[1] >= other[1] for one, other in pairwise(curve))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("settings", [{}, STACKED])
def test_a_gated_fold_has_the_quality_that_the_runtime_gives(activation: str, settings: dict[str, int]) -> None:
    ffn, inputs, config = random_ffn(D, H, activation, k=2), gated_inputs(), FoldConfig(group_size=12, **settings)
    predicted = predict(ffn, inputs, 2, config)
    ranges = choose_ranges(ffn, predicted, 0.25, config)
    weights, quality = finish(ffn, inputs, predicted, ranges, config, torch.float32)
    x = inputs.heldout.x
    wanted, folded = forward(ffn, x), folded_ffn(x, weights.beside(ffn)).double()
    error = (folded - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert quality.error == pytest.approx(float(error), rel=2e-2)
    assert quality.error < quality.linearity, "fixing must gain on the best affine map"
    rate = float(fixed_neurons(x, weights.beside(ffn)).double().mean())
    assert rate == pytest.approx(quality.fix_rate, abs=1e-3) and 0.2 < rate <= 0.26
    assert weights.format.gated and weights.format.down_zero == bool(settings)


def test_fixing_more_gated_neurons_leaves_less_error() -> None:
    ffn, inputs, config = random_ffn(D, H, "silu", k=2), gated_inputs(), FoldConfig(group_size=12)
    predicted = predict(ffn, inputs, 2, config)
    chosen = [choose_ranges(ffn, predicted, rate, config) for rate in (0.0, 0.1, 0.3, 1.0)]
    errors = [finish(ffn, inputs, predicted, ranges, config, torch.float32)[1].error for ranges in chosen]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6
    left = [error_left(ffn, predicted, ranges) for ranges in chosen]
    assert left == sorted(left, reverse=True) and left[-1] == 0
    assert error_curve(ffn, predicted, 8)[0] == (0.0, pytest.approx(left[0]))


def test_tokens_that_count_for_more_are_fitted_better() -> None:
    ffn, config = random_ffn(D, H, "silu", k=2), FoldConfig(group_size=12)
    x = torch.cat([correlated(1500, D, 1), 3 * normal(300, D, seed=9)])
    few = torch.arange(1800) >= 1500
    errors = []
    for share in (0.01, 100.0):
        weight = torch.where(few, share, 1.0)
        inputs = Inputs(Tokens(x, None, weight), Tokens(x, None, weight))
        predicted = predict(ffn, inputs, 2, config)
        ranges = choose_ranges(ffn, predicted, 0.0, config)
        weights, _ = finish(ffn, inputs, predicted, ranges, config, torch.float32)
        error = (folded_ffn(x, weights.beside(ffn)).double() - forward(ffn, x)).square().sum(1)
        errors.append((float(error[few].mean()), float(error[~few].mean())))
    assert errors[0][0] > errors[1][0] and errors[0][1] < errors[1][1]


def test_the_target_of_a_fold_may_be_other_outputs_than_its_own() -> None:
    ffn, config = random_ffn(D, H, "silu", k=2), FoldConfig(group_size=12)
    shift = normal(D, seed=11)
    parts = [Tokens(x, (forward(ffn, x) + shift).float()) for x in (correlated(1500, D, 1), correlated(500, D, 2))]
    inputs = Inputs(*parts)
    predicted = predict(ffn, inputs, 2, config)
    weights, quality = finish(ffn, inputs, predicted, choose_ranges(ffn, predicted, 0.2, config), config, torch.float32)
    x = inputs.heldout.x
    moved = folded_ffn(x, weights.beside(ffn)).double() - forward(ffn, x)
    torch.testing.assert_close(moved.mean(0), shift.double(), rtol=0.1, atol=0.1)
    assert quality.error < 0.3


def test_lines_are_of_the_outputs_that_fixing_leaves_to_them() -> None:
    """Rounds within a threshold leave less error inside it than lines that have to suit all outputs."""
    ffn, inputs = random_ffn(D, H, "silu", k=2), gated_inputs()
    predictor = quantise(ffn.w1, 4, 12).dequantise()
    every = _fit_lines(ffn, _products(ffn, inputs.fit, predictor), None)
    left = []
    for lines in (every, _gated_lines(ffn, inputs.fit, predictor)):
        scores = _scores(ffn, _products(ffn, inputs.heldout, predictor), lines)
        left.append(thresholds_at(lines, ffn.gain, scores, 0.25).error(scores))
    assert left[1] < 0.95 * left[0], left


def test_tokens_are_spread_over_the_text() -> None:
    tokens = Tokens(torch.arange(10.0)[:, None], None, torch.arange(10.0))
    few = tokens.spread(4)
    assert few.x.flatten().tolist() == few.weight.tolist() == [0, 3, 6, 9]
    assert tokens.spread(10).x.equal(tokens.x) and tokens.spread(99).x.equal(tokens.x)
