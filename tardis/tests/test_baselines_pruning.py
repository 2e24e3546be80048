"""Pruning by score: which weights go, and how many in each block."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import generator, normal, quick
from torch import Tensor

from tardis_llm.baselines.owl import block_sparsities, outlier_share
from tardis_llm.baselines.pruning import (
    prune_magnitude,
    prune_ria,
    prune_wanda,
    removed,
    ria_scores,
    smallest,
    smallest_per_row,
    wanda_scores,
)

sparsities = st.floats(0.01, 0.99)
seeds = st.integers(0, 1000)


def coarse(rows: int, columns: int, seed: int) -> Tensor:
    """A matrix with many equal entries, and some zeros."""
    return torch.randint(-3, 4, (rows, columns), generator=generator(seed)).float()


@quick
@given(st.integers(1, 30), st.floats(0, 1), seeds)
def test_masks_hold_exactly_as_many_as_asked_for_and_none_larger_than_what_stays(n: int, share: float, seed: int):
    scores = coarse(n, 5, seed)
    count = math.floor(share * scores.numel())
    mask = smallest(scores, count)
    assert int(mask.sum()) == count
    if 0 < count < scores.numel():
        assert scores[mask].max() <= scores[~mask].min()


def test_of_equal_scores_the_first_go():
    assert smallest(torch.tensor([[2.0, 1, 1], [1, 0, 1]]), 3).tolist() == [[False, True, True], [False, True, False]]
    assert smallest_per_row(torch.tensor([[1.0, 1, 0], [2, 2, 2]]), 2).tolist() == [
        [True, False, True],
        [True, True, False],
    ]


def test_a_mask_of_a_transposed_matrix_is_the_mask_of_the_matrix():
    scores = normal(4, 6)
    assert torch.equal(smallest(scores.T.contiguous().T, 9), smallest(scores, 9))


def test_counts_are_floors_of_the_decimal_product():
    assert [removed(100, 0.29), removed(10, 0.7), removed(3, 0.5), removed(7, 0.99)] == [29, 7, 1, 6]
    assert math.floor(100 * 0.29) == 28  # what fp64 makes of it


def test_magnitude_on_an_example():
    w = torch.tensor([[1.0, -4, 3], [-2, 6, 0.5]])
    # sizes in order 0.5 1 2 3 4 6; half of six weights go, wherever they are
    assert prune_magnitude(w, 0.5).tolist() == [[0, -4, 3], [0, 6, 0]]


def test_wanda_on_an_example():
    w, norms = torch.tensor([[1.0, -4, 3], [-2, 6, 0.5]]), torch.tensor([10.0, 1, 2])
    assert wanda_scores(w, norms).tolist() == [[10, 4, 6], [20, 6, 1]]
    # a third of three: one per row
    assert prune_wanda(w, norms, 0.34).tolist() == [[1, 0, 3], [-2, 6, 0]]


def test_ria_on_an_example():
    w, norms = torch.tensor([[1.0, -3], [3.0, 1]]), torch.tensor([4.0, 1])
    # sums of rows and of columns are all 4: (1/4 + 1/4) sqrt 4 = 1, (3/4 + 3/4) sqrt 1 = 1.5, ...
    assert ria_scores(w, norms).tolist() == [[1, 1.5], [3, 0.5]]
    assert prune_ria(w, norms, 0.5).tolist() == [[0, -3], [3, 0]]


def test_ria_tells_rows_from_columns():
    w = torch.tensor([[1.0, 3, 0], [1, 1, 2]])  # rows sum to 4 and 4, columns to 2, 4, 2
    expected = [[1 / 2 + 1 / 4, 3 / 4 + 3 / 4, 0], [1 / 2 + 1 / 4, 1 / 4 + 1 / 4, 1 + 2 / 4]]
    torch.testing.assert_close(ria_scores(w, torch.ones(3)), torch.tensor(expected))


def test_ria_scores_rows_and_columns_of_zeros():
    w = torch.tensor([[0.0, 0], [0, 5]])
    assert ria_scores(w, torch.tensor([1.0, 4])).tolist() == [[0, 0], [0, 4]]


@quick
@given(st.integers(1, 6), st.integers(1, 30), sparsities, seeds)
def test_wanda_with_inputs_of_one_norm_is_magnitude_row_by_row(rows: int, columns: int, sparsity: float, seed: int):
    w = normal(rows, columns, seed=seed)
    by_row = torch.cat([prune_magnitude(row[None], sparsity) for row in w])
    assert torch.equal(prune_wanda(w, torch.ones(columns), sparsity), by_row)


@quick
@given(st.integers(1, 6), st.integers(1, 30), sparsities, seeds)
def test_exactly_the_share_asked_for_goes_and_the_rest_stays_as_it_is(
    rows: int, columns: int, sparsity: float, seed: int
):
    w, norms = normal(rows, columns, seed=seed), normal(columns, seed=seed + 1).abs() + 0.1
    expected = {
        "magnitude": (prune_magnitude(w, sparsity), removed(w.numel(), sparsity)),
        "wanda": (prune_wanda(w, norms, sparsity), rows * removed(columns, sparsity)),
        "ria": (prune_ria(w, norms, sparsity), removed(w.numel(), sparsity)),
    }
    for name, (pruned, gone) in expected.items():
        assert int((pruned == 0).sum()) == gone, name
        assert torch.equal(pruned[pruned != 0], w[pruned != 0]), name


@quick
@given(sparsities, seeds)
def test_ties_do_not_change_how_many_go(sparsity: float, seed: int):
    w = coarse(4, 20, seed)
    w[w == 0] = 1
    assert int((prune_magnitude(w, sparsity) == 0).sum()) == removed(80, sparsity)
    assert (prune_wanda(w, torch.ones(20), sparsity) == 0).sum(1).tolist() == [removed(20, sparsity)] * 4


def test_outliers_are_counted_over_all_matrices_of_a_block():
    # 9 ones and one 91: mean 10, and one of ten scores is above 50
    assert outlier_share([torch.ones(3, 3), torch.tensor([[91.0]])]) == pytest.approx(0.1)
    assert outlier_share([torch.ones(2, 2)]) == 0


def test_owl_on_an_example():
    # densities 0.16 * (0, 0.25, 1) around their mean 0.2/3 and 0.3: the block with most outliers keeps most
    expected = [0.7 + 0.2 / 3, 0.7 + 0.2 / 3 - 0.04, 0.7 + 0.2 / 3 - 0.16]
    assert block_sparsities([0.01, 0.02, 0.05], 0.7) == pytest.approx(expected)


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), sparsities)
def test_owl_keeps_the_mean_and_its_spread_and_stays_between_none_and_all(shares: list[float], target: float):
    chosen = block_sparsities(shares, target)
    assert sum(chosen) / len(chosen) == pytest.approx(target, abs=1e-9)
    assert max(chosen) - min(chosen) <= 2 * 0.08 + 1e-9
    assert all(0 <= sparsity <= 1 for sparsity in chosen)


@quick
@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.floats(0.2, 0.8))
def test_more_outliers_never_mean_more_sparsity(shares: list[float], target: float):
    chosen = block_sparsities(shares, target)
    in_order = [sparsity for _, sparsity in sorted(zip(shares, chosen, strict=True), key=lambda pair: pair[0])]
    assert in_order == sorted(in_order, reverse=True)
    if max(shares) - min(shares) > 1e-6:
        assert max(chosen) - min(chosen) == pytest.approx(0.16)


def test_two_blocks_are_lambda_from_the_target():
    assert block_sparsities([0.1, 0.3], 0.5) == pytest.approx([0.58, 0.42])


def test_blocks_that_do_not_differ_get_the_target():
    assert block_sparsities([0.2, 0.2, 0.2], 0.6) == [0.6] * 3
