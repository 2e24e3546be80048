"""Lines fitted from binned sums equal least squares on the tokens themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import bin_of, binned, normal, quick, residuals

from tardis_llm.calibration.neurons import BINS
from tardis_llm.ffn.activations import ACTIVATIONS, activation, gelu
from tardis_llm.folding.lines import fit_lines, squared_residuals

everywhere = torch.ones(1, BINS, dtype=torch.bool)


@quick
@given(st.integers(0, 1000), st.sampled_from(list(ACTIVATIONS)), st.integers(20, 45), st.integers(50, 80))
def test_lines_equal_polyfit_on_the_points_inside(seed: int, name: str, start: int, stop: int) -> None:
    u = normal(400, 3, seed=seed) * 1.5 - 0.3
    z = u + 0.2 * normal(400, 3, seed=seed + 1)
    moments = binned(u, z, name)
    inside = torch.zeros(3, BINS, dtype=torch.bool)
    inside[:, start:stop] = True
    slope, offset = fit_lines(moments, inside)
    bins = bin_of(moments, u)
    chosen = (bins >= start) & (bins < stop)
    for neuron in range(3):
        points = z[chosen[:, neuron], neuron].double()
        expected = np.polyfit(points.numpy(), activation(name)(points).numpy(), 1)
        assert [float(slope[neuron]), float(offset[neuron])] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("value", [-100.3, -2.3, 0.0, 0.1, 3.7, 100.3])
def test_a_constant_neuron_gets_slope_zero_and_its_value(value: float) -> None:
    z = torch.full((60_000, 1), value)
    slope, offset = fit_lines(binned(z, z, "gelu"), everywhere)
    assert float(slope) == 0
    assert float(offset) == pytest.approx(float(gelu(z[0])), abs=1e-7, rel=1e-6)


def test_a_neuron_of_little_spread_around_a_large_mean_keeps_its_slope() -> None:
    z = 3.7 + 1e-3 * normal(2000, 1)
    slope, _ = fit_lines(binned(z, z, "gelu"), everywhere)
    exact = z[:, 0].double()
    assert float(slope) == pytest.approx(np.polyfit(exact.numpy(), gelu(exact).numpy(), 1)[0], abs=1e-3)


def test_an_empty_range_gets_the_line_zero() -> None:
    z = normal(50, 2)
    slope, offset = fit_lines(binned(z, z, "gelu"), torch.zeros(2, BINS, dtype=torch.bool))
    assert slope.tolist() == offset.tolist() == [0, 0]


@quick
@given(st.integers(0, 1000), st.sampled_from(list(ACTIVATIONS)), st.floats(-2, 2), st.floats(-2, 2))
def test_squared_residuals_of_any_line_equal_brute_force(seed: int, name: str, slope: float, offset: float) -> None:
    u = normal(200, 2, seed=seed)
    z = u + 0.5 * normal(200, 2, seed=seed + 1)
    moments = binned(u, z, name)
    line = torch.tensor([slope, -slope]), torch.tensor([offset, 0.5])
    square = residuals(activation(name), z, *line).square()
    expected = torch.zeros(2, BINS, dtype=torch.float64).scatter_add_(1, bin_of(moments, u).T, square.T)
    torch.testing.assert_close(squared_residuals(moments, *line), expected, rtol=1e-5, atol=1e-5)


def test_squared_residuals_of_an_exact_line_are_not_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACTIVATIONS, "line", lambda z: 0.3 * z)
    z = 1e3 * normal(1000, 4)
    residual = squared_residuals(binned(z, z, "line"), torch.full((4,), 0.3), torch.zeros(4))
    assert (residual >= 0).all()
    assert residual.max() < 1e-3  # of sums of about 1e6
