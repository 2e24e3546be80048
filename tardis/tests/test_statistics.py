"""Statistics add up, subtract and decay as the texts do that they are of, and a fold is refitted from them alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import binned, correlated, fallback, forward, normal, quick, random_ffn, second_moments
from torch import Tensor

from tardis_llm.calibration.moments import BinnedMoments, SecondMoments, Sums
from tardis_llm.config import FoldConfig
from tardis_llm.errors import InvalidInputError
from tardis_llm.ffn.packed import PackedMatrix
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights
from tardis_llm.folding.fold import Inputs, choose_ranges, predict, refit_layer, solve
from tardis_llm.folding.statistics import Statistics, gather
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.reference import folded_ffn

D, H = 24, 96


def tensors(statistics: Any) -> list[Tensor]:
    """All numbers, in fp64."""
    found = []
    for _, value in statistics._sums():
        found += tensors(value) if isinstance(value, Sums) else [torch.as_tensor(value, dtype=torch.float64)]
    return found


def assert_same(one: Any, other: Any, rtol: float = 1e-9, atol: float = 1e-7) -> None:
    for mine, theirs in zip(tensors(one), tensors(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def second(seed: int, tokens: int) -> SecondMoments:
    x = normal(tokens, 5, seed=seed).double()
    return second_moments(x, x[:, :3] + 1)


def bins(seed: int, tokens: int) -> BinnedMoments:
    z = normal(tokens, 4, seed=seed)
    return binned(z, z, "gelu", like=binned(normal(50, 4), normal(50, 4), "gelu"))


@quick
@given(st.sampled_from([second, bins]), st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1))
def test_merging_subtracting_and_decaying_are_what_they_are_for_sums(
    make: Any, few: int, many: int, share: float
) -> None:
    one, two = make(1, few), make(2, many)
    assert_same(one.merge(two), two.merge(one))
    assert_same(one.merge(two).subtract(two), one)
    assert_same(one.merge(two).decay(share), one.decay(share).merge(two.decay(share)))
    assert_same(one.decay(0).merge(two), two)


def test_parts_of_a_text_merge_to_the_whole() -> None:
    x = normal(90, 5, seed=3).double()
    parts = [second_moments(part, part) for part in x.split(31)]
    whole = second_moments(x, x)
    assert_same(parts[0].merge(parts[1]).merge(parts[2]), whole)
    old, new = second_moments(x[:40], x[:40]), second_moments(x[40:], x[40:])
    weighed = torch.cat([x[:40] * 0.5**0.5, x[40:]])
    torch.testing.assert_close(old.decay(0.5).merge(new).cross, weighed.T @ weighed)
    assert old.decay(0.5).merge(new).count == 20 + 50


def test_statistics_that_do_not_belong_together_are_refused() -> None:
    one = bins(1, 10)
    for other in (replace(one, activation="relu"), replace(one, edge=one.edge + 1), replace(one, width=one.width[:2])):
        with pytest.raises(InvalidInputError, match="do not add up"):
            one.merge(other)
    with pytest.raises(InvalidInputError, match="do not add up"):
        second(1, 5).subtract(second_moments(normal(5, 4), normal(5, 4)))
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidInputError, match="share from 0 to 1"):
            one.decay(share)


@cache
def solved(storage: tuple[tuple[str, int], ...]) -> tuple[DenseFFN, FoldedWeights, Inputs]:
    """An FFN, its fold and the inputs that it was fitted on."""
    ffn, inputs = random_ffn(D, H), Inputs(correlated(3000, D, 1), correlated(1000, D, 2))
    config = FoldConfig(group_size=16, **dict(storage))  # type: ignore[arg-type]
    predicted = predict(ffn, inputs, 2, config)
    ranges = choose_ranges(ffn, predicted, 0.1, config)
    return ffn, solve(ffn, inputs, predicted, ranges, config, torch.float32).weights, inputs


STORAGES = [(), (("fold_bits", 8), ("fallback_bits", 4))]


def assert_equal(one: FoldedWeights, other: FoldedWeights) -> None:
    pairs = zip(FoldedFFN(one).state_dict().items(), FoldedFFN(other).state_dict().values(), strict=True)
    assert all(torch.equal(mine, theirs) for (_, mine), theirs in pairs)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_refit_on_its_own_inputs_is_the_fold_itself(storage: tuple[tuple[str, int], ...]) -> None:
    ffn, folded, inputs = solved(storage)
    fit, heldout = (gather(ffn, folded, x) for x in (inputs.fit, inputs.heldout))
    assert_equal(refit_layer(ffn, folded, fit, heldout), folded)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_refit_follows_the_inputs(storage: tuple[tuple[str, int], ...]) -> None:
    ffn, folded, _ = solved(storage)
    x = correlated(3000, D, 3) @ torch.linalg.qr(normal(D, D, seed=9)).Q + normal(D, seed=10)
    halves = [gather(ffn, folded, half) for half in x.split(1500)]
    statistics = halves[0].merge(halves[1])
    assert_same(statistics, gather(ffn, folded, x), rtol=1e-5, atol=0.05)  # products of chunks are in fp32
    assert 0 < statistics.targets.fix_rate < 1
    refitted = refit_layer(ffn, folded, statistics)
    assert refitted.format == folded.format
    before, after = (float(error(ffn, weights, x)) for weights in (folded, refitted))
    assert after < 0.7 * before
    module = FoldedFFN(folded)
    module.swap(refitted)  # what follows the traffic does
    torch.testing.assert_close(module.weights.bias, refitted.bias)


def error(ffn: DenseFFN, weights: FoldedWeights, x: Tensor) -> Tensor:
    """Squared error of the folded FFN."""
    return (folded_ffn(x, weights.beside(fallback(ffn))) - forward(ffn, x)).square().mean()


def test_old_traffic_is_forgotten() -> None:
    ffn, folded, inputs = solved(())
    new = correlated(1500, D, 3) + 3 * normal(D, seed=10)
    old, latest = gather(ffn, folded, inputs.fit), gather(ffn, folded, new)
    errors = [
        float(error(ffn, refit_layer(ffn, folded, old.decay(share).merge(latest)), new)) for share in (1.0, 0.1, 0.0)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert isinstance(old, Statistics) and isinstance(folded.predictor, PackedMatrix)
