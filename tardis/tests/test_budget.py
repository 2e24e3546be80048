"""Bytes as stored, and a model-wide budget split over layers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import correlated, fitted, quick, random_ffn

from tardis_llm.calibration.tokens import Tokens
from tardis_llm.config import PREDICTOR_BITS
from tardis_llm.errors import InfeasibleBudgetError
from tardis_llm.ffn import accounting
from tardis_llm.ffn.accounting import planned
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights, FoldFormat, Storage
from tardis_llm.folding.budget import Option, check_feasible, convex_hull, split_budget
from tardis_llm.folding.fold import Inputs
from tardis_llm.folding.rounding import quantise
from tardis_llm.runtime.modules import FoldedFFN


def shaped(d: int, h: int, weight_bytes: int, biases: bool) -> DenseFFN:
    """An FFN of these sizes without content."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype={2: torch.bfloat16, 4: torch.float32}[weight_bytes], device="meta")

    b1, b2 = (empty(h), empty(d)) if biases else (None, None)
    return DenseFFN(empty(h, d), b1, empty(d, h), b2, "gelu")


LARGE = shaped(4096, 4 * 4096, 2, True)

points = st.builds(
    lambda touched, loss: Option(2, 0.0, float(touched), loss / 8), st.integers(1, 20), st.integers(0, 80)
)
layers = st.lists(st.lists(points, min_size=1, max_size=5), min_size=1, max_size=4)


def total(options: list[Option] | tuple[Option, ...], name: str) -> float:
    """Sum of an attribute."""
    return sum(getattr(option, name) for option in options)


@pytest.mark.parametrize("bits", PREDICTOR_BITS)
@pytest.mark.parametrize("group_size", [16, 24, 1000])
@pytest.mark.parametrize("d", [20, 32])
def test_bytes_equal_those_of_the_stored_tensors(bits: int, group_size: int, d: int) -> None:
    ffn = random_ffn(d, 48)
    inputs = Inputs(Tokens(correlated(300, d, 1)), Tokens(correlated(100, d, 2)))
    weights, _ = fitted(ffn, inputs, 0.1)
    weights = replace(weights, predictor=quantise(ffn.w1, bits, group_size))
    stored = sum(tensor.nbytes for tensor in FoldedFFN(weights).state_dict().values())
    with_biases, without = shaped(d, 48, 4, True), shaped(d, 48, 4, False)
    storage = Storage(group_size)
    assert planned(without, storage, bits).always == stored
    assert planned(with_biases, storage, bits).always == stored + ffn.b1.nbytes
    in_fp32 = replace(weights, neurons=weights.neurons.map(torch.Tensor.float))
    assert accounting.cost(without, in_fp32).always == stored + 4 * 2 * 48
    assert without.nbytes == ffn.w1.nbytes + ffn.w2.nbytes
    assert with_biases.nbytes == without.nbytes + ffn.b1.nbytes + ffn.b2.nbytes
    assert planned(with_biases, storage, bits).fixing / 48 == ffn.w1[0].nbytes + ffn.w2[:, 0].nbytes


def test_bytes_of_an_example_by_hand() -> None:
    shape = shaped(4, 8, 2, True)
    assert shape.nbytes == 2 * (4 * 8 + 8 + 8 * 4 + 4)  # 152
    assert planned(shape, Storage(2), 2).fixing / shape.h == 2 * (4 + 4)
    # fold 4 x 4 + 4; 2 planes of 1 byte a row; 2 groups of 2 columns; 4 ranges and lines; up bias
    assert planned(shape, Storage(2), 2).always == 2 * 20 + 8 * 2 + 8 * 2 * 2 + 8 * 4 * 2 + 8 * 2 == 168
    assert planned(shape, Storage(2), 2).touched(0.25) == 168 + 0.25 * 8 * 16 == 200


def test_bytes_of_a_stacked_example_by_hand() -> None:
    shape, storage = shaped(16, 8, 2, True), Storage(8, fold_bits=4, fallback_bits=4)
    # fold: 16 rows of 4 planes of 2 bytes and 2 scales, and its bias; predictor: 8 rows of 1 plane and 2 scales
    assert planned(shape, storage, 1).fold == 16 * (8 + 4) + 2 * 16
    assert planned(shape, storage, 1).always == 224 + 8 * (2 + 4) + 8 * 4 * 2 + 8 * 2 == 352
    # what the predictor lacks of W1's row: 3 planes and scales; the column of W2: 4 planes and scales
    assert planned(shape, storage, 1).fixing / shape.h == (6 + 4) + (8 + 4) == 22
    assert planned(shape, storage, 4).fixing / shape.h == 8 + 4
    assert planned(shape, storage, 1).touched(0.5) == 352 + 4 * 22


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("fallback_bits", [4, 8])
@pytest.mark.parametrize("fold_bits", [None, 4, 8])
def test_stacked_bytes_equal_those_of_the_stored_tensors(bits: int, fallback_bits: int, fold_bits: int | None) -> None:
    left = 3 if (bits, fallback_bits) == (2, 4) else None  # one bit more than two steps of rounding would have
    form = FoldFormat("gelu", bits, 24, "float16", fold_bits, fallback_bits, left, down_zero=True)
    shape, storage = shaped(40, 48, 2, False), Storage(24, fold_bits, fallback_bits)
    ffn = FoldedFFN(FoldedWeights.empty(form, 40, 48, torch.bfloat16, torch.device("meta")))
    assert ffn.weights.format == form and storage.format("gelu", bits) == form
    expected, stored = planned(shape, storage, bits), sum(tensor.nbytes for tensor in ffn.state_dict().values())
    assert accounting.cost(shape, ffn.weights) == expected
    assert expected.resident == expected.always + expected.fixing == stored == ffn.weights.nbytes


def test_a_predictor_wider_than_the_fallback_weights_is_not_considered() -> None:
    assert check_feasible([LARGE], (1, 4, 8), Storage(256, 4, 4), 0.5) == (1, 4)


def test_the_shares_of_the_design_come_out() -> None:
    whole_row = Storage(LARGE.d)
    planes = 2 * (planned(LARGE, whole_row, 2).always - planned(LARGE, whole_row, 1).always)
    scales, ranges, bias = 2 * LARGE.h, 8 * LARGE.h, 2 * LARGE.h
    fold = planned(LARGE, whole_row, 2).always - planes - scales - ranges - bias
    assert fold / LARGE.nbytes == pytest.approx(0.125, rel=1e-3)
    assert planes / LARGE.nbytes == pytest.approx(0.0625, rel=1e-3)
    assert planned(LARGE, Storage(256), 2).always - planned(LARGE, whole_row, 2).always == (LARGE.d // 256 - 1) * scales


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("group_size", "least"), [(256, 0.009), (128, 0.007)])
@pytest.mark.parametrize("d", [2048, 4096])
def test_at_a_reduction_of_80_percent_there_is_room_for_fixing(
    d: int, group_size: int, least: float, biases: bool
) -> None:
    shape = shaped(d, 4 * d, 2, biases)
    assert check_feasible([shape], PREDICTOR_BITS, Storage(group_size), 0.8) == (1, 2)
    assert planned(shape, Storage(group_size), 2).affordable_fix_rate(0.8) >= least


@quick
@given(
    st.sampled_from(PREDICTOR_BITS),
    st.integers(1, 300),
    st.floats(0.05, 0.95),
    st.builds(shaped, st.integers(8, 300), st.integers(8, 1200), st.sampled_from([2, 4]), st.booleans()),
)
def test_the_affordable_fix_rate_reads_just_what_the_reduction_leaves(
    bits: int, group_size: int, reduction: float, shape: DenseFFN
) -> None:
    storage = Storage(group_size)
    rate = planned(shape, storage, bits).affordable_fix_rate(reduction)
    allowed = (1 - reduction) * shape.nbytes
    if rate < 1:
        assert planned(shape, storage, bits).touched(rate) == pytest.approx(allowed)
    else:
        assert planned(shape, storage, bits).touched(1.0) <= allowed * (1 + 1e-9)
    assert (rate < 0) == (planned(shape, storage, bits).always > allowed)


@quick
@given(st.lists(points, min_size=1, max_size=12))
def test_the_hull_is_convex_and_below_every_option(options: list[Option]) -> None:
    hull = convex_hull(options)
    assert hull[0].touched == min(o.touched for o in options)
    assert hull[-1].loss == min(o.loss for o in options)
    slopes = [(b.loss - a.loss) / (b.touched - a.touched) for a, b in itertools.pairwise(hull)]
    assert all(slope < 0 for slope in slopes)
    assert all(a < b for a, b in itertools.pairwise(slopes))
    for option in options:
        for a, b in itertools.pairwise(hull):
            if a.touched <= option.touched <= b.touched:
                line = a.loss + (b.loss - a.loss) * (option.touched - a.touched) / (b.touched - a.touched)
                assert option.loss >= line - 1e-9


@quick
@given(layers, st.floats(0, 1))
def test_the_split_is_within_one_step_of_brute_force_and_in_budget(options: list[list[Option]], room: float) -> None:
    cheapest = sum(min(o.touched for o in layer) for layer in options)
    dearest = sum(max(o.touched for o in layer) for layer in options)
    budget = cheapest + room * (dearest - cheapest)
    chosen = split_budget(options, budget)
    assert len(chosen) == len(options)
    assert all(option in layer for option, layer in zip(chosen, options, strict=True))
    assert total(chosen, "touched") <= budget + 1e-9
    within = [choice for choice in itertools.product(*options) if total(choice, "touched") <= budget + 1e-9]
    best = min(total(choice, "loss") for choice in within)
    steps = [a.loss - b.loss for layer in options for a, b in itertools.pairwise(convex_hull(layer))]
    assert total(chosen, "loss") <= best + max(steps, default=0.0) + 1e-9


@quick
@given(layers)
def test_a_budget_that_ends_between_steps_is_split_exactly(options: list[list[Option]]) -> None:
    """Where the budget is used up by whole steps, the greedy walk is the optimum."""
    hulls = [convex_hull(layer) for layer in options]
    steps = sorted(
        ((a.loss - b.loss) / (b.touched - a.touched), b.touched - a.touched)
        for hull in hulls
        for a, b in itertools.pairwise(hull)
    )[::-1]
    budget = sum(hull[0].touched for hull in hulls)
    for _, cost in [(0.0, 0.0), *steps]:
        budget += cost
        within = [choice for choice in itertools.product(*options) if total(choice, "touched") <= budget + 1e-9]
        best = min(total(choice, "loss") for choice in within)
        ties = len({steepness for steepness, _ in steps}) < len(steps)
        assert ties or total(split_budget(options, budget + 1e-6), "loss") == pytest.approx(best)


def test_a_step_that_does_not_fit_is_passed_over_for_a_smaller_one() -> None:
    large = [Option(2, 0, 1, 100), Option(2, 0, 50, 0)]
    small = [Option(2, 0, 1, 10), Option(2, 0, 3, 9)]
    assert split_budget([large, small], 10) == [large[0], small[1]]


def test_a_step_behind_one_that_does_not_fit_is_not_taken_for_its_own_price() -> None:
    layer = [Option(2, 0, 1, 100), Option(2, 0, 50, 10), Option(2, 0, 51, 9)]
    assert split_budget([layer], 10) == [layer[0]]
    assert split_budget([layer], 50) == [layer[1]]


def test_bits_are_chosen_layer_by_layer() -> None:
    needs_bits = [Option(1, 0.1, 10, 50), Option(4, 0.1, 20, 1)]
    does_not = [Option(1, 0.1, 10, 1.1), Option(4, 0.1, 20, 1)]
    assert [option.bits for option in split_budget([needs_bits, does_not], 30)] == [4, 1]


def test_a_budget_below_the_cheapest_options_is_refused() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"reads 30 bytes a token, 5 more .* lower the reduction"):
        split_budget([[Option(2, 0, 10, 1), Option(2, 0, 40, 0)], [Option(2, 0, 20, 1)]], 25)


def test_widths_that_leave_no_room_are_dropped() -> None:
    assert check_feasible([LARGE], PREDICTOR_BITS, Storage(), 0.5) == PREDICTOR_BITS
    assert check_feasible([LARGE, LARGE], PREDICTOR_BITS, Storage(), 0.8) == (1, 2)
    assert check_feasible([LARGE], (2,), Storage(), 0.8) == (2,)


@pytest.mark.parametrize("bits", [PREDICTOR_BITS, (2,), (4, 8)])
@pytest.mark.parametrize("shape", [LARGE, shaped(64, 256, 4, False), shaped(100, 256, 2, True)])
def test_an_infeasible_reduction_is_refused_with_the_largest_feasible_one(
    bits: tuple[int, ...], shape: DenseFFN
) -> None:
    with pytest.raises(InfeasibleBudgetError) as raised:
        check_feasible([shape, shape], bits, Storage(), 0.97)
    message = str(raised.value)
    largest = float(message.split("the largest is ")[1].split(". The limit")[0])
    assert check_feasible([shape, shape], bits, Storage(), largest)
    with pytest.raises(InfeasibleBudgetError):
        check_feasible([shape, shape], bits, Storage(), largest + 2e-4)
    for part in ("0.97", "the fold takes", f"the {min(bits)}-bit predictor", "ranges and lines", "Lower --reduction"):
        assert part in message
    shares = [float(word.rstrip("%,.")) for word in message.split() if word.rstrip(",.").endswith("%")]
    assert sum(shares) == pytest.approx(100 * (1 - largest), abs=0.05)


def test_the_model_counts_as_a_whole() -> None:
    small, large = shaped(64, 256, 2, True), shaped(2048, 8192, 2, True)
    with pytest.raises(InfeasibleBudgetError):
        check_feasible([small], (2,), Storage(), 0.8)
    assert check_feasible([small, large], (2,), Storage(), 0.8) == (2,)
