"""Statistics add up, subtract and decay as the texts do that they are of, and a fold is refitted from them alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import binned, correlated, fallback, forward, neuron_major, normal, quick, random_ffn, second_moments
from torch import Tensor

from tardis_llm.calibration.moments import SecondMoments
from tardis_llm.calibration.neurons import BinnedMoments
from tardis_llm.calibration.sums import Sums
from tardis_llm.calibration.tokens import Tokens
from tardis_llm.config import FoldConfig
from tardis_llm.errors import InvalidInputError
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights, written_out
from tardis_llm.folding.fold import Inputs, choose_ranges, predict, solve
from tardis_llm.folding.lines import fit_lines
from tardis_llm.folding.ranges import highest_price
from tardis_llm.folding.refit import fold_error, fold_of_lines, refit_layer
from tardis_llm.folding.statistics import Statistics
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


def test_neurons_seen_by_less_than_one_token_have_their_lines() -> None:
    z = normal(40, 4, seed=5)
    whole = binned(z, z, "gelu")
    few, inside = whole.decay(0.001), whole.count > 0
    for exact, faded in zip(fit_lines(whole, inside), fit_lines(few, inside), strict=True):
        torch.testing.assert_close(faded, exact)
    assert highest_price(few, torch.ones(4)) == pytest.approx(highest_price(whole, torch.ones(4)))


def gather(dense: DenseFFN, folded: FoldedWeights, *parts: Tensor) -> Statistics:
    """Statistics of inputs, added part by part."""
    statistics = Statistics.zeros(D, H)
    for x in parts:
        statistics.add(x, dense, folded)
    return statistics


@cache
def solved(storage: tuple[tuple[str, int], ...]) -> tuple[DenseFFN, FoldedWeights, Inputs]:
    """An FFN, its fold and the inputs that it was fitted on."""
    ffn, inputs = random_ffn(D, H), Inputs(Tokens(correlated(3000, D, 1)), Tokens(correlated(1000, D, 2)))
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
    fit, heldout = (gather(ffn, folded, x) for x in (inputs.fit.x, inputs.heldout.x))
    assert_equal(refit_layer(ffn, folded, fit, heldout), folded)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_refit_follows_the_inputs(storage: tuple[tuple[str, int], ...]) -> None:
    ffn, folded, _ = solved(storage)
    x = correlated(3000, D, 3) @ torch.linalg.qr(normal(D, D, seed=9)).Q + normal(D, seed=10)
    halves = [gather(ffn, folded, half) for half in x.split(1500)]
    statistics = halves[0].merge(halves[1])
    assert_same(statistics, gather(ffn, folded, x), rtol=1e-5, atol=0.05)  # products of chunks are in fp32
    assert 0 < statistics.fix_rate < 1
    refitted = refit_layer(ffn, folded, statistics)
    assert refitted.format == folded.format
    before, after = (float(error(ffn, weights, x)) for weights in (folded, refitted))
    assert after < 0.7 * before
    scale = float(forward(ffn, x).var(0, correction=0).sum()) / D
    for weights, found in ((folded, before), (refitted, after)):
        assert fold_error(weights, statistics) == pytest.approx(found / scale, rel=0.02)
    module = FoldedFFN(folded)
    module.swap(refitted)  # what follows the traffic does
    torch.testing.assert_close(module.weights.bias, refitted.bias)


def error(ffn: DenseFFN, weights: FoldedWeights, x: Tensor) -> Tensor:
    """Squared error of the folded FFN."""
    return (folded_ffn(x, weights.beside(fallback(ffn))) - forward(ffn, x)).square().mean()


def test_old_traffic_is_forgotten() -> None:
    ffn, folded, inputs = solved(())
    new = correlated(1500, D, 3) + 3 * normal(D, seed=10)
    old, latest = gather(ffn, folded, inputs.fit.x), gather(ffn, folded, new)
    errors = [
        float(error(ffn, refit_layer(ffn, folded, old.decay(share).merge(latest)), new)) for share in (1.0, 0.1, 0.0)
    ]
    assert errors[0] > errors[1] > errors[2]


@quick
@given(st.lists(st.integers(1, 299), max_size=4))
def test_statistics_gathered_in_parts_and_merged_are_those_gathered_at_once(cuts: list[int]) -> None:
    ffn, folded, inputs = solved(STORAGES[1])
    parts = inputs.fit.x[:300].tensor_split(sorted(cuts))
    merged = Statistics.zeros(D, H)
    for part in parts:
        merged = merged.merge(gather(ffn, folded, part))
    assert_same(merged, gather(ffn, folded, *parts), rtol=1e-12)
    assert_same(merged, gather(ffn, folded, inputs.fit.x[:300]), rtol=1e-5, atol=1e-2)
    assert merged.x.count == 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_a_model_in_half_precision_are_gathered_from_its_own_weights(dtype: torch.dtype) -> None:
    tokens = Tokens(correlated(3000, D, 1).to(dtype)), Tokens(correlated(900, D, 2))
    ffn, inputs = fallback(random_ffn(D, H), dtype), Inputs(*tokens)
    config = FoldConfig(group_size=16, fallback_bits=4)
    predicted = predict(ffn.in_fp32(), inputs, 2, config)
    ranges = choose_ranges(ffn.in_fp32(), predicted, 0.1, config)
    folded = solve(ffn.in_fp32(), inputs, predicted, ranges, config, dtype).weights
    kept = [gather(neuron_major(ffn), folded, x) for x in (inputs.fit.x[None], inputs.heldout.x)]
    assert_equal(refit_layer(neuron_major(ffn), folded, *kept), folded)


def test_a_refit_takes_damping_and_rounding_as_told() -> None:
    ffn, folded, inputs = solved(STORAGES[1])
    fit, heldout = gather(ffn, folded, inputs.fit.x), gather(ffn, folded, inputs.heldout.x)
    nearest = refit_layer(ffn, folded, fit, heldout, rounding="nearest")
    assert not torch.equal(written_out(nearest.fold), written_out(folded.fold))
    heavy = [refit_layer(ffn, folded, fit, *held, damping=1e6) for held in ([], [heldout])]
    assert_equal(*heavy)
    lines, _ = fold_of_lines(ffn, folded.neurons)
    torch.testing.assert_close(written_out(heavy[0].fold), lines, rtol=0, atol=0.05)


def test_statistics_from_which_no_fold_follows_are_refused() -> None:
    ffn, folded, inputs = solved(())
    few = gather(ffn, folded, inputs.heldout.x)
    with pytest.raises(InvalidInputError, match="hold no tokens"):
        refit_layer(ffn, folded, few.decay(0))
    with pytest.raises(InvalidInputError, match=f"width {D} with {H - 1} neurons"):
        refit_layer(ffn, folded, few, replace(few, neurons=H - 1))
    with pytest.raises(InvalidInputError, match="NaN or infinite"):
        refit_layer(ffn, folded, gather(ffn, folded, torch.full((3, D), torch.nan)))
    with pytest.raises(InvalidInputError, match="another neurons"):
        few.merge(replace(few, neurons=H - 1))
