"""Runs of few distinct keys are searched through the list of them, and answer the same."""

from __future__ import annotations

import numpy as np
import pytest
from domains import DTYPES

from doraemon import Index
from doraemon.steps import MAX_DISTINCT, find_steps


@pytest.mark.parametrize("distinct", [1, 2, 3, 64, 1000, MAX_DISTINCT, MAX_DISTINCT + 1])
@pytest.mark.parametrize("even", [True, False])
def test_steps_are_the_distinct_codes(distinct: int, even: bool) -> None:
    rng = np.random.default_rng(distinct)
    codes = np.unique(rng.integers(0, 2**64, 2 * distinct, dtype=np.uint64))[:distinct]
    counts = np.full(distinct, 5) if even else 3 + rng.geometric(0.1, distinct)
    steps = find_steps(np.repeat(codes, counts))
    if distinct > MAX_DISTINCT:
        assert steps is None
        return
    assert steps is not None
    np.testing.assert_array_equal(steps.codes, codes)
    np.testing.assert_array_equal(steps.starts, np.concatenate([[0], np.cumsum(counts)]))


def test_keys_of_which_there_are_few_copies_have_a_model_only() -> None:
    assert find_steps(np.zeros(0, np.uint64)) is None
    assert find_steps(np.array([5, 5, 5], np.uint64)) is None
    assert find_steps(np.arange(100_000, dtype=np.uint64)) is None
    assert find_steps(np.repeat(np.arange(1000, dtype=np.uint64), 3)) is None


def test_steps_are_found_once_for_all_that_is_made_of_the_same_codes() -> None:
    run = Index(np.repeat(np.arange(50), 9))._state.run
    assert run.steps is not None
    assert run.with_parts(hot=None).steps is run.steps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distinct", [1, 2, 7, 300])
def test_answers_are_those_of_numpy(dtype: str, distinct: int, engine: str) -> None:
    rng = np.random.default_rng(distinct)
    keys = np.sort(rng.integers(5, 5 + distinct, 6000)).astype(dtype)
    asked = np.arange(300).astype(dtype)
    if np.dtype(dtype).kind in "iu":
        asked = np.append(asked, np.iinfo(dtype).max).astype(dtype)
        keys = np.append(keys, np.repeat(np.iinfo(dtype).max, 9)).astype(dtype)
    index = Index(keys, engine=engine)
    assert index._state._step_view is not None
    for _ in range(3):
        for side in ("left", "right"):
            np.testing.assert_array_equal(index.searchsorted(asked, side), np.searchsorted(keys, asked, side))
        np.testing.assert_array_equal(index.contains(asked), np.isin(asked, keys))
        np.testing.assert_array_equal(
            index.count(asked, asked[::-1])[:100],
            [index.count(low, high) for low, high in zip(asked[:100], asked[::-1], strict=False)],
        )
        index.extend(asked[:100])
        removed = index.discard_many(keys[:70])
        keys = np.sort(np.append(keys[removed:], asked[:100]))
    index.compact()
    np.testing.assert_array_equal(index.keys(), keys)


def test_a_map_has_a_model_only(engine: str) -> None:
    index = Index(np.arange(5000), np.arange(5000), engine=engine)
    assert index._state._step_view is None
