"""Single changes one after another, in the level in front of the delta, and what is asked and frozen in between."""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left, bisect_right
from typing import Any

import numpy as np
import pytest
from domains import DTYPES, keys, plain, plain_list, queries
from hypothesis import given, settings
from hypothesis import strategies as st

from doraemon import Index, Snapshot
from doraemon.state import REQUIRED

STEPS = ["insert", "insert", "update", "discard", "ask", "freeze", "batch"]


class Twin:
    """An index and what it should hold, of which only questions of one key are asked, so that its level fills."""

    def __init__(self, dtype: str, engine: str, is_map: bool, first: list[Any]) -> None:
        values = np.arange(len(first)) if is_map else None
        self.index = Index(np.array(first, dtype=dtype), values, engine=engine)
        self.is_map, self.keys = is_map, sorted(plain(key) for key in first)
        self.values = {plain(key): place for place, key in enumerate(first)}
        self.frozen: list[tuple[Index | Snapshot, list[Any], dict[Any, int]]] = []

    def put(self, key: Any, value: int, replace: bool) -> None:
        number = plain(key)
        if not self.is_map:
            self.index.insert(key)
        elif number not in self.values or replace:
            (self.index.update if replace else self.index.insert)(key, value)
        else:
            with pytest.raises(KeyError, match="update"):
                self.index.insert(key, value)
            return
        if not self.is_map or number not in self.values:
            self.keys.insert(bisect_right(self.keys, number), number)
        self.values[number] = value

    def discard(self, key: Any) -> None:
        number = plain(key)
        there = number in self.keys
        assert self.index.discard(key) == there
        if there:
            self.keys.remove(number)
            if number not in self.keys:
                del self.values[number]

    def freeze(self, copied: bool) -> None:
        frozen = self.index.copy() if copied else self.index.snapshot()
        self.frozen.append((frozen, self.keys.copy(), self.values.copy()))

    def ask(self, key: Any) -> None:
        for index, held, values in [*self.frozen[-2:], (self.index, self.keys, self.values)]:
            number = plain(key)
            assert len(index) == len(held)
            assert index.bisect_left(key) == bisect_left(held, number)
            assert index.bisect_right(key) == bisect_right(held, number)
            assert (key in index) == (number in held)
            if self.is_map:
                assert index.get(key, -1) == values.get(number, -1)

    def check(self) -> None:
        for index, held, values in [*self.frozen, (self.index, self.keys, self.values)]:
            assert plain_list(index.keys()) == held
            if self.is_map:
                assert index.values().tolist() == [values[key] for key in held]


@pytest.mark.parametrize("is_map", [False, True], ids=["multiset", "map"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_parts")
@settings(max_examples=15)
@given(data=st.data())
def test_any_single_changes_answer_like_a_sorted_list(
    data: st.DataObject, dtype: str, engine: str, is_map: bool
) -> None:
    first = data.draw(st.lists(keys(dtype), max_size=20, unique_by=plain))
    twin = Twin(dtype, engine, is_map, first)
    steps = st.tuples(st.sampled_from(STEPS), keys(dtype), queries(dtype), st.booleans())
    for number, (step, key, query, choice) in enumerate(data.draw(st.lists(steps, max_size=60))):
        if step in ("insert", "update"):
            twin.put(key, 100 + number, step == "update")
        elif step == "discard":
            twin.discard(query if choice else key)
        elif step == "freeze":
            twin.freeze(copied=choice)
        elif step == "batch":
            assert twin.index.contains(np.array([key], dtype=dtype)).tolist() == [plain(key) in twin.keys]
        twin.ask(query)
    twin.check()


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "few"])
@pytest.mark.parametrize("is_map", [False, True], ids=["multiset", "map"])
def test_thousands_of_single_changes(order: str, engine: str, is_map: bool) -> None:
    """Enough for blocks to be halved, appended to, and folded into the delta, where an engine has blocks."""
    rng, count = np.random.default_rng(7), 6000 if engine == "native" else 1500
    drawn = {"random": rng.integers(0, 10**6, count), "few": rng.integers(0, 40, count)}
    some = drawn.get(order, np.arange(count)[:: -1 if order == "descending" else 1]).tolist()
    twin = Twin("int64", engine, is_map, list(range(0, 500_000, 499)))
    for number, key in enumerate(some):
        twin.put(key, number, replace=True)
        if number % 3 == 0:
            twin.discard(some[number // 2])
        if number % 97 == 0:
            twin.ask(some[number // 3])
        if number % 1999 == 0:
            twin.freeze(copied=False)
    twin.check()


def test_a_snapshot_and_a_copy_keep_what_they_saw_while_single_changes_go_on(engine: str) -> None:
    index = Index([1, 2], [10, 20], engine=engine)
    index.update(3, 30)
    frozen, copied = index.snapshot(), index.copy()
    index.update(3, 31)
    copied.update(4, 40)
    index.discard(1)
    assert (frozen[3], len(frozen), 1 in frozen, 4 in frozen) == (30, 3, True, False)
    assert (index[3], len(index), copied[3], len(copied)) == (31, 2, 30, 4)


def test_the_level_holds_what_is_not_asked_for_in_batches(engine: str) -> None:
    index = Index(range(100), engine=engine)
    index.insert(5)
    changes_in_delta = len(index._front.state.delta)
    assert changes_in_delta == (0 if engine == "native" else 1)
    assert index.bisect_right(5) == 7
    assert index.count(np.array([5]), 6).tolist() == [2]
    assert len(index._front.state.delta) == changes_in_delta


def test_values_of_every_kind_pass_through_the_level_unchanged(engine: str) -> None:
    record = np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
    cases: list[tuple[Any, Any]] = [([1], 2**62), ([0.5], 7), (["one"], "two"), ([b"1"], b"2"), ([True], False)]
    cases += [
        (np.array([None, []], object)[:1], [1, 2]),
        (record, (3, 4.0)),
        (np.zeros(1, "M8[s]"), np.datetime64("2020-01-01")),
    ]
    for values, new in cases:
        index = Index([1], values, engine=engine)
        batch = index.copy()
        index.update(2, new)
        before = index[2]
        batch.extend([2], [new])
        assert type(before) is type(batch[2])
        assert before == batch[2] == index.values()[1] == index[2]


@pytest.mark.parametrize("numbers", [[0, -1, 2**63 - 1, -(2**63), np.int32(-7), True], [0.0, -0.5, 1e300, 3, np.inf]])
def test_numbers_are_folded_as_they_were_given(engine: str, numbers: list[Any]) -> None:
    values = np.zeros(1, np.float64 if 1e300 in numbers else np.int64)
    index = Index([-1], values, engine=engine)
    for key, number in enumerate([7, *numbers]):
        index.update(key, number)
    index.update(0, numbers[1])
    index.discard(1)
    expected = [numbers[1], *numbers[1:]]
    assert [index[key] for key in (0, *range(2, len(numbers) + 1))] == expected
    assert index.get_many([0, *range(2, len(numbers) + 1)]).tolist() == expected  # of the delta
    with pytest.raises(OverflowError if values.dtype.kind == "i" else TypeError):
        index.update(9, 2**63 if values.dtype.kind == "i" else "text")
    assert 9 not in index and 1 not in index


def test_a_record_that_was_handed_out_is_a_copy(engine: str) -> None:
    index = Index([1], np.zeros(1, [("a", "i4")]), engine=engine)
    index.update(2, (5,))
    index[2]["a"] = 9
    assert index[2]["a"] == 5


def test_values_are_let_go_when_they_are_replaced(engine: str) -> None:
    class Tracked:
        pass

    index = Index([1], np.array([None], object), engine=engine)
    first = Tracked()
    index.update(2, first)
    index.update(2, None)
    gone = weakref.ref(first)
    del first
    assert gone() is None


def test_writers_of_single_keys_lose_nothing_to_batches_and_snapshots() -> None:
    index = Index(dtype="int64", merging="background")
    done = threading.Event()

    def write(first: int) -> None:
        for key in range(first, 8000, 4):
            index.insert(key)

    def disturb() -> None:
        while not done.is_set():
            frozen = index.snapshot()
            assert len(frozen.keys()) == len(frozen)
            index.extend([-1])
            index.discard(-1)

    disturber = threading.Thread(target=disturb)
    writers = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    for thread in (disturber, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    disturber.join()
    assert index.keys().tolist() == list(range(8000))


@pytest.mark.parametrize("frozen_by", ["snapshot", "copy", "batch"])
def test_a_level_is_made_when_it_is_asked_for(engine: str, frozen_by: str) -> None:
    index = Index([1, 3], engine=engine)
    index.extend([5])
    assert not index._front._is_open
    front = index._front
    seen: Any = index.snapshot() if frozen_by == "snapshot" else index.copy() if frozen_by == "copy" else None
    if frozen_by == "batch":
        index.extend([7])
        assert front.insert(9, REQUIRED) is None  # a writer that was slower than the batch
    assert len(front) == 3
    index.insert(2)
    assert 2 in index and index.bisect_left(5) == 3
    if seen is not None:
        assert 2 not in seen and seen.keys().tolist() == [1, 3, 5]


def test_threads_that_open_a_front_share_its_level() -> None:
    for round_ in range(50):
        index = Index([0])
        index.extend([1])
        barrier = threading.Barrier(4)

        def insert(number: int, index: Index = index, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            index.insert(number)

        threads = [threading.Thread(target=insert, args=(10 * round_ + number,)) for number in range(2, 6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert index.keys().tolist() == [0, 1, *range(10 * round_ + 2, 10 * round_ + 6)]
