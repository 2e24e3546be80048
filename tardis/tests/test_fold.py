"""One FFN, from weights and inputs to what is stored: exact where it should be, its quality as the runtime has it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from synthetic import correlated, fallback, fitted, forward, normal, random_ffn, residuals
from torch import Tensor

from tardis_llm.calibration.neurons import BINS, SPAN
from tardis_llm.calibration.tokens import Tokens
from tardis_llm.config import FoldConfig
from tardis_llm.ffn.activations import ACTIVATIONS, activation
from tardis_llm.ffn.neuron import Neurons
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights
from tardis_llm.folding.fold import (
    FoldQuality,
    Inputs,
    choose_ranges,
    error_curve,
    finish,
    predict,
    stored_neurons,
)
from tardis_llm.folding.ranges import Ranges, error_ranges, highest_price
from tardis_llm.folding.rounding import quantise
from tardis_llm.folding.statistics import Statistics
from tardis_llm.runtime.reference import fixed_neurons, folded_ffn

D, H = 24, 96
every_activation = pytest.mark.parametrize("name", list(ACTIVATIONS))
some_activations = pytest.mark.parametrize("name", ["gelu", "relu"])
both_policies = pytest.mark.parametrize("policy", ["error", "coverage"])


def inputs_for(tokens: int = 2000, dtype: torch.dtype = torch.float32) -> Inputs:
    """Inputs to fit on, and a quarter as many kept apart."""
    return Inputs(*(Tokens(correlated(count, D, seed).to(dtype)) for count, seed in ((tokens, 1), (tokens // 4, 2))))


def output_error(folded: FoldedWeights, ffn: DenseFFN, x: Tensor) -> float:
    """Squared error of the folded FFN as the runtime computes it, over the output's variance."""
    y = forward(ffn, x)
    error = (folded_ffn(x, folded.beside(fallback(ffn))) - y).square().sum(1).mean()
    return float(error / y.var(0, correction=0).sum())


def neurons_of(**values: Tensor) -> Neurons:
    """A few neurons with the values given, and 0 or infinity for the rest."""
    size = len(next(iter(values.values())))
    bounds = {"low": torch.full((size,), -torch.inf), "high": torch.full((size,), torch.inf)}
    lines = {"slope": torch.zeros(size), "offset": torch.zeros(size)}
    return Neurons("gelu", **{**bounds, **lines, **values})


@cache
def calibrated(name: str, rate: float, refit: bool, policy: str) -> tuple[FoldedWeights, FoldQuality]:
    """A fold that several tests look at."""
    return fitted(random_ffn(D, H, name), inputs_for(), rate, refit=refit, policy=policy)


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an activation that is a line."""
    monkeypatch.setitem(ACTIVATIONS, "twice", lambda z: 2 * z + 1)
    return "twice"


@pytest.mark.parametrize("refit", [False, True])
def test_a_linear_activation_folds_exactly_without_fixing(linear: str, refit: bool) -> None:
    ffn, inputs = random_ffn(D, H, linear), inputs_for()
    predicted = predict(ffn, inputs, 2, FoldConfig(group_size=16))
    neurons = neurons_of(slope=torch.full((H,), 2.0), offset=torch.ones(H))
    ranges = Ranges(replace(neurons, activation=linear), torch.ones(H, 1, dtype=torch.bool))
    folded, quality = finish(ffn, inputs, predicted, ranges, FoldConfig(refit=refit), torch.float32)
    assert quality.fix_rate == 0
    assert quality.error < 1e-6
    assert quality.linearity < 1e-6
    x = correlated(50, D, 3)
    y = folded_ffn(x, folded.beside(fallback(ffn)))
    torch.testing.assert_close(y, forward(ffn, x).float(), rtol=1e-3, atol=5e-3 if refit else 1e-4)


def test_the_lines_of_a_linear_activation_are_found(linear: str) -> None:
    ffn = random_ffn(D, H, linear)
    folded, quality = fitted(ffn, inputs_for(), 0.0, refit=False)
    assert quality.error < 1e-4
    torch.testing.assert_close(folded.neurons.slope.float(), torch.full((H,), 2.0), rtol=1e-3, atol=0)


@every_activation
def test_without_refit_the_fold_is_that_of_the_lines(name: str) -> None:
    ffn = random_ffn(D, H, name)
    folded, quality = fitted(ffn, inputs_for(), 0.05, refit=False)
    slope, offset = folded.neurons.slope.double(), folded.neurons.offset.double()
    C = ffn.w2.double() @ torch.diag(slope) @ ffn.w1.double()
    c = ffn.w2.double() @ (slope * ffn.b1 + offset) + ffn.b2.double()
    torch.testing.assert_close(folded.fold, C.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded.bias, c.float(), rtol=1e-4, atol=1e-5)
    assert quality.damping is None


@every_activation
def test_without_refit_fold_and_all_residuals_make_the_dense_output(name: str) -> None:
    ffn = random_ffn(D, H, name)
    folded, _ = fitted(ffn, inputs_for(), 0.05, refit=False)
    x = correlated(100, D, 3).double()
    z = x @ ffn.w1.double().T + ffn.b1.double()
    r = residuals(activation(name), z, folded.neurons.slope, folded.neurons.offset)
    y = x @ folded.fold.double().T + folded.bias.double() + r @ ffn.w2.double().T
    torch.testing.assert_close(y, forward(ffn, x), rtol=1e-5, atol=1e-5)


@some_activations
@both_policies
@pytest.mark.parametrize("refit", [False, True])
def test_the_quality_is_what_the_runtime_gives_on_the_held_out_tokens(name: str, policy: str, refit: bool) -> None:
    ffn, inputs = random_ffn(D, H, name), inputs_for()
    folded, quality = calibrated(name, 0.02, refit, policy)
    fixed = fixed_neurons(inputs.heldout.x, folded.beside(ffn))
    assert quality.fix_rate == pytest.approx(float(fixed.double().mean()), abs=1e-4)
    assert quality.error == pytest.approx(output_error(folded, ffn, inputs.heldout.x), rel=1e-2)


@some_activations
@both_policies
@pytest.mark.parametrize("rate", [0.02, 0.2])
def test_the_fix_rate_is_kept_on_the_held_out_tokens(name: str, policy: str, rate: float) -> None:
    _, quality = calibrated(name, rate, True, policy)
    assert rate * 0.9 - 0.002 <= quality.fix_rate <= rate + 1e-4


@some_activations
@both_policies
@pytest.mark.parametrize("rate", [0.02, 0.2])
def test_refitting_lowers_the_error_on_text_not_seen(name: str, policy: str, rate: float) -> None:
    ffn, other = random_ffn(D, H, name), correlated(500, D, 5)
    without, refitted = (calibrated(name, rate, refit, policy)[0] for refit in (False, True))
    assert output_error(refitted, ffn, other) < output_error(without, ffn, other)


@some_activations
def test_linearity_is_the_error_of_the_best_affine_map(name: str) -> None:
    ffn, inputs = random_ffn(D, H, name), inputs_for(8000)
    _, quality = fitted(ffn, inputs, 0.02)
    ones = [torch.cat([x, torch.ones(len(x), 1)], 1).double().numpy() for x in (inputs.fit.x, inputs.heldout.x)]
    y, y_held = forward(ffn, inputs.fit.x).numpy(), forward(ffn, inputs.heldout.x).numpy()
    left = ones[1] @ np.linalg.lstsq(ones[0], y, rcond=None)[0] - y_held
    assert quality.linearity == pytest.approx((left**2).sum() / len(left) / y_held.var(0).sum(), rel=0.02)


def test_more_fixing_and_a_finer_predictor_leave_less_error() -> None:
    ffn, inputs = random_ffn(D, H), inputs_for()
    by_rate = [fitted(ffn, inputs, rate)[1].error for rate in (0.0, 0.05, 0.2, 1.0)]
    assert by_rate == sorted(by_rate, reverse=True)
    assert by_rate[-1] < 1e-6
    by_bits = [fitted(ffn, inputs, 0.1, bits=bits)[1].error for bits in (1, 2, 4)]
    assert by_bits == sorted(by_bits, reverse=True)


def test_the_fold_is_rounded_to_the_dtype_of_the_model_and_its_error_counted() -> None:
    ffn, inputs = random_ffn(D, H), inputs_for(dtype=torch.bfloat16)
    predicted = predict(ffn, inputs, 2, FoldConfig(group_size=16))
    nothing = torch.full((H,), torch.inf)
    neurons = neurons_of(low=nothing, high=-nothing, slope=torch.full((H,), 0.5))
    ranges = Ranges(neurons, torch.ones(H, 1, dtype=torch.bool))
    folded, quality = finish(ffn, inputs, predicted, ranges, FoldConfig(), torch.bfloat16)
    assert folded.fold.dtype == folded.bias.dtype == torch.bfloat16
    assert folded.neurons.low.dtype == torch.float16
    assert quality.fix_rate == 1
    assert 1e-7 < quality.error < 1e-4


def test_targets_are_the_output_and_what_fixing_leaves_of_it() -> None:
    ffn, x = random_ffn(D, H), correlated(200, D, 4)
    neurons = neurons_of(low=ffn.b1 - 0.3, high=ffn.b1 + 0.5, slope=0.4 + 0 * ffn.b1, offset=0.1 + 0 * ffn.b1)
    predictor = quantise(ffn.w1, 2, 16)
    found, w_hat = Statistics.zeros(D, H), predictor.dequantise()
    found.add(x, ffn, FoldedWeights(None, None, predictor, neurons))
    zhat, z = x @ w_hat.T + ffn.b1, x @ ffn.w1.T + ffn.b1
    fixed = (zhat < neurons.low) | (zhat > neurons.high)
    y = forward(ffn, x)
    left = y - (residuals(ffn.act, z, neurons.slope, neurons.offset) * fixed) @ ffn.w2.double().T
    assert found.fix_rate == pytest.approx(float(fixed.double().mean()))
    assert 0.2 < found.fix_rate < 0.8
    for moments, target in ((found.x, x.double()), (found.output, y), (found.left, left)):
        torch.testing.assert_close(moments.cross, x.double().T @ target, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(moments.y_sum, target.sum(0), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(moments.y_square, target.square().sum(0), rtol=1e-4, atol=1e-4)


@every_activation
def test_the_error_curve_runs_from_fixing_nothing_to_much(name: str) -> None:
    ffn, inputs = random_ffn(D, H, name), inputs_for()
    predicted = predict(ffn, inputs, 2, FoldConfig(group_size=16))
    curve = error_curve(ffn, predicted, 12)
    rates, errors = zip(*curve, strict=True)
    assert len(curve) == 12
    assert rates[0] < 0.005
    assert rates[-1] > 0.2
    assert errors[-1] < 0.05 * errors[0]
    assert all(a <= b + 1e-3 for a, b in pairwise(rates))


def test_predictions_are_binned_by_the_rounded_weights() -> None:
    ffn, inputs = random_ffn(D, H), inputs_for()
    predicted = predict(ffn, inputs, 2, FoldConfig(group_size=16))
    zhat = inputs.heldout.x @ predicted.predictor.dequantise().T + ffn.b1
    z = inputs.heldout.x @ ffn.w1.T + ffn.b1
    inner = predicted.heldout.edges()[:, 48]
    torch.testing.assert_close(predicted.heldout.count[:, :48].sum(1), (zhat < inner).double().sum(0), rtol=0, atol=1)
    torch.testing.assert_close(predicted.heldout.sums[2].sum(1), z.double().sum(0), rtol=1e-4, atol=1e-2)
    assert torch.equal(predicted.fit.edges(), predicted.heldout.edges())
    zhat = inputs.fit.x @ predicted.predictor.dequantise().T + ffn.b1
    torch.testing.assert_close(predicted.fit.width * BINS / (2 * SPAN), zhat.std(0), rtol=1e-2, atol=0)
    torch.testing.assert_close(predicted.fit.edge + SPAN * zhat.std(0), zhat.mean(0), rtol=0, atol=2e-2)


def test_gptq_follows_the_inputs_and_nearest_does_not() -> None:
    ffn, inputs = random_ffn(D, H), inputs_for()
    z = inputs.heldout.x @ ffn.w1.T
    error = {}
    for rounding in ("gptq", "nearest"):
        w_hat = predict(ffn, inputs, 2, FoldConfig(group_size=16, rounding=rounding)).predictor.dequantise()
        error[rounding] = float((inputs.heldout.x @ w_hat.T - z).square().mean())
    assert error["gptq"] < 0.8 * error["nearest"]


@both_policies
def test_neurons_that_are_always_the_same_are_not_fixed(policy: str) -> None:
    ffn, inputs = random_ffn(D, H), inputs_for()
    ffn.w1[:16] = 0
    ffn.b1[:16] = torch.linspace(-5, 5, 16)
    folded, quality = fitted(ffn, inputs, 0.02, policy=policy)
    assert fixed_neurons(inputs.heldout.x, folded.beside(ffn))[:, :16].float().mean() < 0.01
    assert quality.fix_rate <= 0.0201


def test_ranges_and_lines_are_stored_in_fp16() -> None:
    values = stored_neurons(neurons_of(low=torch.tensor([-1.25, -torch.inf]), offset=torch.tensor([0.5, -2.0])))
    assert [v.dtype for v in values.tensors] == [torch.float16] * 4
    assert [v.tolist() for v in values.tensors] == [[-1.25, -torch.inf], [torch.inf] * 2, [0, 0], [0.5, -2.0]]


@pytest.mark.parametrize("field", ["low", "high", "slope", "offset"])
@pytest.mark.parametrize("value", [7e4, -1e30])
def test_all_are_stored_in_fp32_if_one_overflows_fp16(field: str, value: float) -> None:
    neurons = neurons_of(**{field: torch.tensor([0.1, value])})
    stored = stored_neurons(neurons)
    assert [v.dtype for v in stored.tensors] == [torch.float32] * 4
    for v, original in zip(stored.tensors, neurons.tensors, strict=True):
        assert torch.equal(v, original)


def test_storing_rounds_ranges_outwards_by_no_more_than_fp16_does() -> None:
    low = torch.cat([10 * normal(500), 1e-4 * normal(500, seed=1)])
    high = low + normal(1000, seed=2).abs()
    rounded = stored_neurons(neurons_of(low=low, high=high))
    for stored, exact, outwards in ((rounded.low, low, -1), (rounded.high, high, 1)):
        moved = (stored.float() - exact) * outwards
        assert (moved >= 0).all()
        assert (moved <= 1e-3 * exact.abs() + 6e-8).all()


def test_empty_ranges_stay_empty() -> None:
    nothing = torch.full((3,), torch.inf)
    stored = stored_neurons(neurons_of(low=nothing, high=-nothing))
    assert (stored.low > stored.high).all()


def test_the_gain_is_the_square_of_the_column() -> None:
    ffn = random_ffn(D, H)
    assert float(ffn.gain[7]) == pytest.approx(float(ffn.w2[:, 7].norm() ** 2), rel=1e-5)


@both_policies
def test_ranges_follow_the_policy(policy: str) -> None:
    ffn, inputs = random_ffn(D, H), inputs_for()
    config = FoldConfig(policy=policy, group_size=16)  # type: ignore[arg-type]
    predicted = predict(ffn, inputs, 2, config)
    ranges = choose_ranges(ffn, predicted, 0.05, config)
    by_error = choose_ranges(ffn, predicted, 0.05, FoldConfig(group_size=16))
    left = ranges.error(predicted.heldout, ffn.gain)
    assert (
        left > 1.1 * by_error.error(predicted.heldout, ffn.gain)
        if policy == "coverage"
        else ranges.neurons.low.equal(by_error.neurons.low)
    )


def test_an_ffn_of_a_relu_model_folds_to_contextual_sparsity() -> None:
    ffn, inputs = random_ffn(D, H, "relu"), inputs_for()
    predicted = predict(ffn, inputs, 8, FoldConfig(group_size=16))
    ranges = error_ranges(predicted.fit, ffn.gain, 1e-6 * highest_price(predicted.fit, ffn.gain))
    folded, quality = finish(ffn, inputs, predicted, ranges, FoldConfig(refit=False), torch.float32)
    assert folded.fold.abs().max() < 0.01
    assert quality.error < 1e-3
    z = inputs.heldout.x @ ffn.w1.T + ffn.b1
    assert quality.fix_rate == pytest.approx(float((z > 0).float().mean()), abs=0.03)
