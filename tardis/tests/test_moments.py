"""Streamed statistics equal those of the whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import bin_of, binned, correlated, normal, quick, second_moments

from tardis_llm.calibration import tokens as module
from tardis_llm.calibration.moments import SecondMoments, pre_activation_moments
from tardis_llm.calibration.neurons import BINS, SPAN, BinnedMoments
from tardis_llm.calibration.tokens import chunks
from tardis_llm.ffn.activations import gelu

cuts = st.lists(st.integers(0, 60), max_size=5).map(lambda inner: [0, *sorted(inner), 60])


@quick
@given(cuts)
def test_second_moments_in_any_chunking_equal_numpy_on_the_whole(ends: list[int]) -> None:
    x, y = correlated(60, 5), normal(60, 3, seed=1) + 2
    moments = SecondMoments.zeros(5, 3)
    for start, stop in pairwise(ends):
        moments.add(x[start:stop], y[start:stop])
    X, Y = x.double().numpy(), y.double().numpy()
    assert moments.count == 60
    np.testing.assert_allclose(moments.x_sum, X.sum(0), rtol=1e-6)
    np.testing.assert_allclose(moments.y_sum, Y.sum(0), rtol=1e-6)
    np.testing.assert_allclose(moments.cross, X.T @ Y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.y_square, (Y * Y).sum(0), rtol=1e-6)


def test_centred_moments_and_variance_are_those_of_numpy() -> None:
    x, y = correlated(500, 5), normal(500, 3, seed=1) + 2
    moments = second_moments(x, y)
    X, Y = x.double().numpy(), y.double().numpy()
    np.testing.assert_allclose(moments.centred, (X - X.mean(0)).T @ (Y - Y.mean(0)), atol=1e-2)
    assert moments.y_variance == pytest.approx(Y.var(0).sum(), rel=1e-5)


def test_the_variance_of_a_constant_is_above_zero() -> None:
    assert 0 < second_moments(torch.ones(9, 2), torch.full((9, 2), 0.3)).y_variance < 1e-6


@quick
@given(st.integers(0, 1000))
def test_pre_activation_moments_are_mean_and_deviation_of_the_real_pre_activations(seed: int) -> None:
    x, w, b = correlated(300, 12, seed), normal(7, 12, seed=seed + 1), normal(7, seed=seed + 2)
    mean, deviation = pre_activation_moments(second_moments(x, x), w, b)
    z = x @ w.T + b
    torch.testing.assert_close(mean, z.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deviation, z.std(0, correction=0), rtol=1e-3, atol=1e-4)


def test_constant_inputs_have_no_deviation() -> None:
    x = correlated(1, 12).expand(50, 12)
    _, deviation = pre_activation_moments(second_moments(x, x), normal(7, 12), normal(7))
    assert torch.isfinite(deviation).all()
    assert deviation.max() < 1e-2


@quick
@given(st.integers(0, 1000), cuts)
def test_binned_sums_equal_brute_force_in_any_chunking(seed: int, ends: list[int]) -> None:
    u = normal(60, 2, seed=seed) * 2 + 1
    z = u + 0.3 * normal(60, 2, seed=seed + 1)
    moments = BinnedMoments.around("gelu", torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.5]))
    weight = normal(60, seed=seed + 2).abs()
    for start, stop in pairwise(ends):
        moments.add(u[start:stop], z[start:stop], weight[start:stop])
    expected = torch.zeros(7, 2, BINS, dtype=torch.float64)
    bins, a = bin_of(moments, u), gelu(z).tolist()
    for token in range(60):
        for neuron in range(2):
            value, out = float(z[token, neuron]), a[token][neuron]
            terms = (1, value, value**2, out, out * value, out**2)
            weighted = [float(weight[token]) * term for term in terms]
            expected[:, neuron, bins[token, neuron]] += torch.tensor([1, *weighted], dtype=torch.float64)
    torch.testing.assert_close(moments.sums, expected, rtol=1e-9, atol=1e-9)
    assert moments.tokens == 60
    assert torch.equal(moments.count.sum(1), torch.full((2,), 60.0, dtype=torch.float64))


def test_sums_do_not_drift_over_many_tokens() -> None:
    z = torch.full((20_000, 1), 3.7)
    moments = binned(z, z, "gelu")
    exact = float(z[0, 0])  # 3.7 as fp32 has it
    assert float(moments.sums[3].sum()) == pytest.approx(20_000 * exact**2, rel=1e-11)


def test_the_outer_bins_are_open() -> None:
    moments = BinnedMoments.around("gelu", torch.zeros(1), torch.ones(1))
    u = torch.tensor([[-1e30], [-SPAN - 0.1], [SPAN + 0.1], [1e30]])
    moments.add(u, torch.zeros(4, 1))
    assert moments.count[0, 0] == 2
    assert moments.count[0, -1] == 2
    edges = moments.edges()
    assert edges[0, 0] == -torch.inf
    assert edges[0, -1] == torch.inf


def test_inner_edges_divide_the_span_evenly() -> None:
    edges = BinnedMoments.around("gelu", torch.tensor([1.0]), torch.tensor([2.0])).edges()
    assert edges.shape == (1, BINS + 1)
    expected = torch.linspace(1 - 2 * SPAN, 1 + 2 * SPAN, BINS + 1)
    torch.testing.assert_close(edges[0, 1:-1], expected[1:-1])


def test_a_neuron_without_spread_has_bins_of_positive_width() -> None:
    mean = torch.tensor([0.0, 3.0, -1000.0])
    moments = BinnedMoments.around("gelu", mean, torch.zeros(3))
    inner = moments.edges()[:, 1:-1]
    assert (moments.width > 0).all()
    assert ((inner[:, 0] < mean) & (inner[:, -1] > mean)).all()


@pytest.mark.parametrize("width", [1, 7, 50, 1000])
def test_chunks_are_small_and_keep_every_token_in_order(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 100)
    x = torch.arange(37.0)[:, None]
    parts = list(chunks(x, width))
    assert torch.equal(torch.cat(parts), x)
    assert all(len(part) == 1 or len(part) * width <= 100 for part in parts)
    assert len(parts) == -(-37 // max(1, 100 // width))
