"""Ridge regression from second moments equals ridge regression on the tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import correlated, normal, quick, second_moments
from torch import Tensor

from tardis_llm.folding.ridge import DAMPINGS, AffineMap, Spectrum, affine_error, ridge


def solve(x: Tensor, y: Tensor, x_held: Tensor, y_held: Tensor) -> AffineMap:
    """`ridge` of y on x from their tokens."""
    gram = second_moments(x, x)
    held = second_moments(x_held, x_held), second_moments(x_held, y_held)
    return ridge(Spectrum.of(gram), gram, second_moments(x, y), *held)


def noisy(tokens: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Inputs [tokens, 12] and targets [tokens, 4], affine in them up to noise."""
    x = correlated(tokens, 12, seed)
    return x, x @ normal(12, 4, seed=1) + normal(4, seed=2) + noise * normal(tokens, 4, seed=seed + 1)


def by_numpy(x: Tensor, y: Tensor, damping: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """C and c by numpy, the penalty of each output relative to the mean variance."""
    X, Y = x.double().numpy(), y.double().numpy()
    centred = X - X.mean(0)
    gram, cross = centred.T @ centred, centred.T @ (Y - Y.mean(0))
    penalties = damping.numpy() * np.trace(gram) / len(gram)
    pairs = zip(penalties, cross.T, strict=True)
    rows = [np.linalg.solve(gram + penalty * np.eye(len(gram)), each) for penalty, each in pairs]
    C = np.stack(rows)
    return C, Y.mean(0) - C @ X.mean(0)


def held_errors(line: tuple[np.ndarray, np.ndarray], x: Tensor, y: Tensor) -> np.ndarray:
    """Mean squared error of each output on tokens."""
    return ((x.double().numpy() @ line[0].T + line[1] - y.double().numpy()) ** 2).mean(0)


def test_an_affine_target_is_recovered() -> None:
    x, y = noisy(500, 3, noise=0)
    fold = solve(x, y, *noisy(100, 5, noise=0))
    torch.testing.assert_close(fold.weight, normal(12, 4, seed=1).T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fold.bias, normal(4, seed=2), rtol=1e-3, atol=1e-3)
    assert set(fold.damping.tolist()) == {DAMPINGS[0]}


@quick
@given(st.integers(0, 1000), st.sampled_from([0.01, 1.0, 10.0]))
def test_the_fold_equals_numpy_ridge_regression(seed: int, noise: float) -> None:
    x, y = noisy(60, seed, noise)
    fold = solve(x, y, *noisy(60, seed + 2, noise))
    C, c = by_numpy(x, y, fold.damping)
    np.testing.assert_allclose(fold.weight, C, rtol=1e-3, atol=2e-3 * (1 + noise))
    np.testing.assert_allclose(fold.bias, c, rtol=1e-3, atol=2e-3 * (1 + noise))


@quick
@given(st.integers(0, 1000), st.sampled_from([0.1, 1.0, 10.0]))
def test_the_damping_of_each_output_is_the_one_of_least_held_out_error(seed: int, noise: float) -> None:
    (x, y), (x_held, y_held) = noisy(40, seed, noise), noisy(30, seed + 2, noise)
    errors = {each: held_errors(by_numpy(x, y, torch.full((4,), each)), x_held, y_held) for each in DAMPINGS}
    least = np.stack(list(errors.values())).min(0)
    for output, chosen in enumerate(solve(x, y, x_held, y_held).damping.tolist()):
        assert errors[chosen][output] <= least[output] * (1 + 1e-4)


def test_noise_is_damped_as_heavily_as_possible_and_what_is_affine_beside_it_as_lightly() -> None:
    x, x_held = correlated(20, 12, 3), correlated(5000, 12, 5)
    y, y_held = (torch.cat([normal(len(some), 4, seed=4), some[:, :1]], 1) for some in (x, x_held))
    assert solve(x, y, x_held, y_held).damping.tolist() == [*[DAMPINGS[-1]] * 4, DAMPINGS[0]]


@quick
@given(st.integers(0, 1000))
def test_affine_error_equals_brute_force(seed: int) -> None:
    x, y = correlated(50, 6, seed), normal(50, 3, seed=seed + 1) + 1
    C, c = normal(3, 6, seed=seed + 2), normal(3, seed=seed + 3)
    expected = float((x @ C.T + c - y).square().sum(1).mean())
    found = affine_error(C, c, second_moments(x, x), second_moments(x, y))
    assert found == pytest.approx(expected, rel=1e-4)


def test_inputs_in_a_subspace_give_a_finite_fold_that_fits() -> None:
    x = correlated(200, 4, 1) @ normal(4, 12, seed=2)
    y = x @ normal(12, 4, seed=3)
    fold = solve(x[:150], y[:150], x[150:], y[150:])
    assert torch.isfinite(fold.weight).all()
    assert float((x @ fold.weight.T + fold.bias - y).square().mean() / y.square().mean()) < 1e-4


@pytest.mark.parametrize("x", [torch.zeros(64, 12), torch.ones(64, 12), normal(1, 12).expand(64, 12)])
def test_constant_inputs_give_the_mean_of_the_target(x: Tensor) -> None:
    y = normal(64, 4)
    fold = solve(x, y, x, y)
    assert fold.weight.abs().max() < 100
    torch.testing.assert_close(x @ fold.weight.T + fold.bias, y.mean(0).expand(64, 4), rtol=1e-4, atol=1e-4)


def test_the_spectrum_decomposes_the_covariance() -> None:
    gram = second_moments(correlated(100, 6), correlated(100, 6))
    spectrum = Spectrum.of(gram)
    rebuilt = spectrum.vectors * spectrum.values @ spectrum.vectors.T
    torch.testing.assert_close(rebuilt, gram.centred, rtol=1e-5, atol=1e-4)
    assert (spectrum.values >= 0).all()


def test_with_a_prior_the_penalty_draws_towards_it_and_not_towards_zero():
    generator = torch.Generator().manual_seed(3)
    x, held = (torch.randn(n, 12, generator=generator) for n in (16, 400))
    weight = torch.randn(5, 12, generator=generator)
    target, held_target = x @ weight.T + torch.randn(16, 5, generator=generator), held @ weight.T
    gram, gram_held = second_moments(x, x), second_moments(held, held)
    moments = gram, second_moments(x, target), gram_held, second_moments(held, held_target)
    plain = ridge(Spectrum.of(gram), *moments)
    told = ridge(Spectrum.of(gram), *moments, prior=weight)
    error = [affine_error(fit.weight, fit.bias, gram_held, moments[3]) for fit in (plain, told)]
    assert error[1] < 0.5 * error[0]
    torch.testing.assert_close(ridge(Spectrum.of(gram), *moments, prior=torch.zeros(5, 12)).weight, plain.weight)
