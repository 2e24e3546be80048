"""Batches of a multiset wait to be sorted until they are asked for, and nobody can tell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doraemon import Index
from doraemon.splicing import LONG, distinct, in_order
from doraemon.state import MIN_DELTA, PUTTING_OFF

KEYS = np.arange(0, 400_000, 4, dtype=np.uint64)
BATCHES = st.lists(st.lists(st.integers(0, 400_000), min_size=1, max_size=40), min_size=1, max_size=12)


def batches(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 399_000, (count, size), dtype=np.uint64)


def test_a_batch_is_sorted_when_it_is_first_asked_for(engine: str) -> None:
    index = Index(KEYS, engine=engine, merging="manual")
    for batch in batches(5, 10):
        index.extend(batch)
    state = index._state
    assert state.put_off == 50
    assert len(index) == len(KEYS) + 50
    assert "recent" not in state.__dict__
    everything = np.sort(np.concatenate([KEYS, batches(5, 10).ravel()]))
    np.testing.assert_array_equal(index.searchsorted(KEYS), np.searchsorted(everything, KEYS))
    assert len(state.recent) == len(np.unique(batches(5, 10)))
    index.extend([1])
    assert index._state.joined is state.recent  # what was sorted once is not sorted again
    assert index._state.put_off == 1


def test_a_snapshot_sorts_nothing_and_has_what_was_pending() -> None:
    index = Index(KEYS, merging="manual")
    index.extend([7, 5])
    frozen, copied = index.snapshot(), index.copy()
    index.extend([6])
    assert "recent" not in index._state.__dict__
    assert (frozen.count(5, 8), copied.count(5, 8), index.count(5, 8)) == (2, 2, 3)


def test_the_keys_given_may_change_while_they_are_pending(engine: str) -> None:
    index, given_keys = Index(KEYS, engine=engine, merging="manual"), np.array([5, 6], dtype=np.uint64)
    index.extend(given_keys)
    given_keys[:] = 9
    assert (index.count(5, 8), index.count(9, 10)) == (2, 0)


def test_pending_arrays_are_few_and_become_older_changes_in_time() -> None:
    index = Index(KEYS, merging="manual")
    for batch in batches(3000, 3):
        index.extend(batch)
        state = index._state
        assert len(state.pending) <= 2 + np.log2(1 + state.put_off)
        assert PUTTING_OFF * state.put_off <= max(MIN_DELTA, state.changes)
    assert len(state.older)
    everything = np.sort(np.concatenate([KEYS, batches(3000, 3).ravel()]))
    np.testing.assert_array_equal(index.keys(), everything)


def test_keys_above_all_others_do_not_wait(engine: str) -> None:
    index = Index(KEYS, engine=engine, merging="manual")
    index.extend([5])
    index.extend([7, 500_000])
    assert index._state.put_off == 0
    index.extend([500_001, 450_000])
    assert index.range(399_997).tolist() == [450_000, 500_000, 500_001]


@given(BATCHES, st.data())
def test_answers_are_those_of_sorted_keys(added: list[list[int]], data: st.DataObject) -> None:
    index, held = Index(KEYS, merging="manual"), KEYS.tolist()
    for batch in added:
        index.extend(batch)
        held += batch
        step = data.draw(st.sampled_from(["ask", "discard", "adapt", "compact", "copy", "go on"]))
        if step == "ask":
            assert (
                index.searchsorted(batch, "right").tolist() == np.searchsorted(np.sort(held), batch, "right").tolist()
            )
        elif step == "discard":
            index.discard_many(batch)
            held = held[: -len(batch)]
        elif step == "copy":
            index = index.copy()
        elif step != "go on":
            getattr(index, step)()
        assert len(index) == len(held)
    assert index.keys().tolist() == sorted(held)


@pytest.mark.parametrize("highest", [1, 255, 256, 2**40, 2**64 - 1])
@pytest.mark.parametrize("count", [0, 1, LONG - 1, LONG, 5000])
def test_codes_are_put_in_order(count: int, highest: int, engine: str) -> None:
    codes = np.random.default_rng(count).integers(0, highest, count, dtype=np.uint64, endpoint=True)
    before = codes.copy()
    np.testing.assert_array_equal(in_order(codes, engine), np.sort(codes))
    once, counts = np.unique(codes, return_counts=True)
    for ours, expected in zip(distinct(codes, engine), (once, counts), strict=True):
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(codes, before)


def test_sorting_needs_as_much_room_as_there_are_codes() -> None:
    native = pytest.importorskip("doraemon._native")
    with pytest.raises(ValueError, match="room to sort"):
        native.sort(np.zeros(3, np.uint64), np.zeros(2, np.uint64))
