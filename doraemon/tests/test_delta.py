"""What C knows of a delta in short tells what its entries tell, whatever they change and however many lie together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from doraemon import Index
from doraemon import engine as engines
from doraemon.arrays import Codes
from doraemon.delta import Delta
from doraemon.run import Run
from doraemon.search import NumpyView, View, make_view, telling

pytestmark = pytest.mark.skipif(engines.choose() != "native", reason="only the C engine has summaries")
LAST = 2**64 - 1
#: by how many keys an entry shifts ranks: most by 1, which summaries count, and some by more than they have room for
NET = st.sampled_from([1, 1, 1, 1, 1, 1, 0, -1, 2, 2**24, 2**40])


def delta_of(run: Run, changes: dict[int, int]) -> Delta:
    """The changes of a multiset's counts, none of which falls below 0."""
    codes = np.array(sorted(changes), dtype=np.uint64)
    left = np.searchsorted(run.codes, codes)
    present = np.searchsorted(run.codes, codes, side="right") - left
    net = np.maximum([changes[code] for code in codes.tolist()], -present).astype(np.int64)
    return Delta(codes, left, net, present, None, np.ones(len(codes), np.int64), "native")


def answers(view: View, queries: Codes) -> list[list[int]]:
    """Of batches; single questions, some of which are asked as well, must have the same."""
    found: list[list[int]] = []
    some = slice(None, None, 5)
    for right in (False, True):
        ranks = np.empty(len(queries), dtype=np.int64)
        view.ranks(queries, right, False, ranks)
        single = view.right if right else view.left
        assert [single(code) for code in queries[some].tolist()] == ranks[some].tolist()
        found.append(ranks.tolist())
    present = np.empty(len(queries), dtype=np.bool_)
    layers, positions = np.empty(len(queries), dtype=np.uint8), np.empty(len(queries), dtype=np.int64)
    view.find_many(queries, present, layers, positions)
    assert [view.contains(code) for code in queries[some].tolist()] == present[some].tolist()
    ranks, counts = np.empty(len(queries), dtype=np.int64), np.empty(len(queries), dtype=np.int64)
    view.count_many(queries, ranks, counts)
    places = (present, layers[present], positions[present])
    return [*found, *(each.tolist() for each in (*places, ranks, counts))]


@settings(max_examples=25)
@given(
    step=st.sampled_from([1, 3, 1000]),
    older=st.dictionaries(st.integers(0, 3000) | st.sampled_from([LAST - 1, LAST]), NET, max_size=300),
    newer=st.dictionaries(st.integers(0, 3000) | st.just(LAST), st.just(1), max_size=60),
)
@example(step=3, older=dict.fromkeys(range(0, 3000, 7), 1), newer={})
@example(step=1000, older=dict.fromkeys(range(2500), 1), newer={})
def test_summaries_tell_what_the_entries_do(step: int, older: dict[int, int], newer: dict[int, int]) -> None:
    keys = np.append(np.arange(0, 2900, step, dtype=np.uint64), np.uint64(LAST))
    state = Index(keys, engine="native")._state
    deltas = (delta_of(state.run, older), delta_of(state.run, {k: v for k, v in newer.items() if k not in older}))
    queries = np.append(np.arange(3010, dtype=np.uint64), np.array([LAST - 1, LAST], dtype=np.uint64))
    native, plain = make_view("native", state.key_type, state.run, deltas), NumpyView(state.key_type, state.run, deltas)
    assert answers(native, queries) == answers(plain, queries)
    hot = state.hot_table(queries[::2].copy())
    warm = make_view("native", state.key_type, state.with_hot(hot).run, deltas)
    assert answers(warm, queries) == answers(plain, queries)


@settings(max_examples=25)
@given(
    step=st.sampled_from([1, 3, 1000]),
    changes=st.dictionaries(st.integers(0, 3000) | st.sampled_from([LAST - 1, LAST]), NET, max_size=300),
    apart=st.sampled_from([0, 3, 50]),
    swapped=st.booleans(),
)
@example(step=3, changes=dict.fromkeys(range(0, 3000, 7), 1), apart=0, swapped=False)
@example(step=1000, changes=dict.fromkeys(range(2500), 1), apart=11, swapped=True)
def test_leaves_tell_what_the_entries_do(step: int, changes: dict[int, int], apart: int, swapped: bool) -> None:
    keys = np.append(np.arange(0, 2900, step, dtype=np.uint64), np.uint64(LAST))
    state = Index(keys, engine="native")._state
    delta = delta_of(state.run, changes)
    newer = delta_of(state.run, {code: 1 for code in range(5, 3000, apart) if code not in changes} if apart else {})
    if swapped:
        delta, newer = newer, delta
    queries = np.append(np.arange(3010, dtype=np.uint64), np.array([LAST - 1, LAST], dtype=np.uint64))
    plain = NumpyView(state.key_type, state.run, (delta, newer))
    hot = state.hot_table(queries[::2].copy())
    for run in (state.run, state.with_hot(hot).run):
        assert answers(telling("native", state.key_type, run, plain.deltas), queries) == answers(plain, queries)


@pytest.mark.parametrize("more", [1, 5, 60])
def test_any_number_of_changes_per_window_is_counted(more: int) -> None:
    keys = np.arange(0, 4000, 4, dtype=np.uint64)
    index, numbers = Index(keys, engine="native", merging="manual"), np.random.default_rng(more)
    added = numbers.integers(0, 4000, 20 * more, dtype=np.uint64)
    index.extend(added)
    queries = np.arange(4100, dtype=np.uint64)
    for side in ("left", "right"):
        expected = np.searchsorted(np.sort(np.concatenate([keys, added])), queries, side=side)
        for _ in range(2):  # the second time all changes are searched at once
            np.testing.assert_array_equal(index.searchsorted(queries, side), expected)


def test_leaves_tell_of_codes_that_both_deltas_change() -> None:
    keys, numbers = np.arange(0, 40_000, 4, dtype=np.uint64), np.random.default_rng(3)
    index = Index(keys, engine="native", merging="manual")
    for count in (3000, 400):
        more = numbers.integers(0, 40_000, count, dtype=np.uint64)
        index.extend(more)
        index.discard_many(more[::5])
    state = index._state
    recent = index.copy()
    recent.extend(state.delta.codes[::9])
    state = recent._state
    assert len(state.older)
    assert np.isin(state.recent.codes, state.older.codes).any()
    queries, everything = np.arange(40_100, dtype=np.uint64), recent.keys()
    for side in ("left", "right"):
        expected = np.searchsorted(everything, queries, side=side)
        for _ in range(3):
            np.testing.assert_array_equal(recent.searchsorted(queries, side), expected)
    assert "_telling_view" in state.__dict__
    np.testing.assert_array_equal(recent.contains(queries), np.isin(queries, everything))
