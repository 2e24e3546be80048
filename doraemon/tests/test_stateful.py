"""Any sequence of changes, asked anything, against a sorted list or a dict."""

from __future__ import annotations

import pickle
from bisect import bisect_left, bisect_right
from typing import Any

import numpy as np
import pytest
from domains import DTYPES, keys, plain, plain_list, queries
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from doraemon import Index, Snapshot
from doraemon.model import refit


class Contents:
    """What an index should hold: sorted keys, and the values of a map."""

    def __init__(self, keys: list[Any], values: dict[Any, int]) -> None:
        self.keys, self.values = keys, values

    def copy(self) -> Contents:
        return Contents(self.keys.copy(), self.values.copy())


def check_answers(index: Index | Snapshot, contents: Contents, asked: list[Any]) -> None:
    """Every question, one by one and as a batch."""
    ordered, numbers = contents.keys, [plain(query) for query in asked]
    left, right = [bisect_left(ordered, q) for q in numbers], [bisect_right(ordered, q) for q in numbers]
    for query, number, low, high in zip(asked, numbers, left, right, strict=True):
        assert index.bisect_left(query) == index.rank(query) == low
        assert index.bisect_right(query) == high
        assert (query in index) == (low < high)
        found = [index.find_lt(query), index.find_le(query), index.find_gt(query), index.find_ge(query)]
        expected = [ordered[i] if 0 <= i < len(ordered) else None for i in (low - 1, high - 1, high, low)]
        assert [None if key is None else plain(key) for key in found] == expected
        if index.is_map:
            assert index.get(query, -1) == contents.values.get(number, -1)
    batch: Any = np.array(asked, dtype=index.dtype) if index.dtype.kind == "M" else asked
    assert index.searchsorted(batch).tolist() == left
    assert index.searchsorted(batch, "right").tolist() == right
    assert index.contains(batch).tolist() == [low < high for low, high in zip(left, right, strict=True)]
    if index.is_map:
        assert index.get_many(batch, -1).tolist() == [contents.values.get(number, -1) for number in numbers]


def check_contents(index: Index | Snapshot, contents: Contents) -> None:
    assert len(index) == len(contents.keys)
    assert plain_list(index.keys()) == contents.keys
    if index.is_map:
        assert index.values().tolist() == [contents.values[key] for key in contents.keys]


class Machine(RuleBasedStateMachine):
    """Changes to an index; `dtype`, `engine`, `is_map` and `path` are set by the test."""

    dtype: str
    engine: str
    is_map: bool
    path: str

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        first = data.draw(st.lists(keys(self.dtype), max_size=40, unique=self.is_map))
        array = np.array(first, dtype=self.dtype)
        values = np.arange(len(first)) if self.is_map else None
        self.index = Index(array, values, engine=self.engine, merging=data.draw(st.sampled_from(["inline", "manual"])))
        numbers = [plain(key) for key in first]
        self.contents = Contents(sorted(numbers), dict(zip(numbers, range(len(first)), strict=True)))
        self.snapshots: list[tuple[Index | Snapshot, Contents]] = []
        self.next_value = 100

    def _put(self, number: Any) -> int:
        """Make a key part of the expected contents; its new value."""
        self.next_value += 1
        if not self.is_map or number not in self.contents.values:
            self.contents.keys.insert(bisect_right(self.contents.keys, number), number)
        self.contents.values[number] = self.next_value
        return self.next_value

    def _take(self, number: Any) -> bool:
        at = bisect_left(self.contents.keys, number)
        there = at < len(self.contents.keys) and self.contents.keys[at] == number
        if there:
            del self.contents.keys[at]
            self.contents.values.pop(number, None)
        return there

    @rule(data=st.data())
    def insert(self, data: st.DataObject) -> None:
        key = data.draw(keys(self.dtype))
        if not self.is_map:
            self._put(plain(key))
            self.index.insert(key)
        elif plain(key) in self.contents.values:
            with pytest.raises(KeyError, match="update"):
                self.index.insert(key, 0)
        else:
            self.index.insert(key, self._put(plain(key)))

    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        more = data.draw(st.lists(keys(self.dtype), max_size=20))
        values = [self._put(plain(key)) for key in more]
        array = np.array(more, dtype=self.dtype)
        self.index.extend(array, np.array(values, dtype=np.int64) if self.is_map else None)

    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        """Keys above all others, which go behind the run if a merge left room there."""
        drawn = data.draw(st.lists(keys(self.dtype), max_size=20))
        more = [key for key in drawn if not self.contents.keys or plain(key) > self.contents.keys[-1]]
        values = [self._put(plain(key)) for key in more]
        array = np.array(more, dtype=self.dtype)
        self.index.extend(array, np.array(values, dtype=np.int64) if self.is_map else None)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        query = data.draw(queries(self.dtype))
        assert self.index.discard(query) == self._take(plain(query))

    @rule(data=st.data())
    def discard_many_that_exist(self, data: st.DataObject) -> None:
        if self.contents.keys:
            numbers = data.draw(st.lists(st.sampled_from(self.contents.keys), max_size=12))
            array = np.array(numbers, dtype=np.int64 if self.dtype[0] == "d" else self.dtype).astype(self.dtype)
            assert self.index.discard_many(array) == sum(self._take(number) for number in numbers)

    @rule()
    def compact(self) -> None:
        self.index.compact()

    @rule()
    def snapshot(self) -> None:
        self.snapshots.append((self.index.snapshot(), self.contents.copy()))

    @rule(mmap=st.booleans(), verify=st.booleans())
    def save_and_open(self, mmap: bool, verify: bool) -> None:
        self.index.save(self.path)
        self.index = Index.open(self.path, mmap, verify=verify, engine=self.engine)

    @rule()
    def pickle(self) -> None:
        self.index = pickle.loads(pickle.dumps(self.index))

    @rule(seed=st.integers(0, 100))
    def adapt_to_any_heat(self, seed: int) -> None:
        heat = self.index._state.run.heat
        heat.decayed = np.random.default_rng(seed).pareto(0.5, len(heat.bounds)) * 1000
        self.index.adapt()

    @rule(seed=st.integers(0, 100))
    def choose_any_leaves(self, seed: int) -> None:
        state = self.index._state
        bits = np.random.default_rng(seed).integers(0, 7, len(state.run.model.bits)).astype(np.uint8)
        model, _ = refit(state.run.model, state.run.codes, bits, state.engine)
        self.index._state = state.remodelled(model, state.run.trained, state.run.memory)

    @rule(data=st.data())
    def heat_any_keys(self, data: st.DataObject) -> None:
        """A hot table of any codes, there or not: what is merged, changed and asked afterwards has to know better."""
        state = self.index._state
        if self.engine == "native" and len(state.run):
            hot = data.draw(st.lists(keys(self.dtype), max_size=20))
            codes = state.key_type.encode_any(np.array(hot, dtype=self.dtype))
            self.index._state = state.with_hot(state.hot_table(np.unique(codes)))

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        asked = data.draw(st.lists(queries(self.dtype), min_size=1, max_size=12))
        check_answers(self.index, self.contents, asked)
        for frozen, contents in self.snapshots[-2:]:
            check_answers(frozen, contents, asked)

    @rule(data=st.data())
    def ask_for_ranges(self, data: st.DataObject) -> None:
        low, high = data.draw(queries(self.dtype)), data.draw(queries(self.dtype))
        first, last = (bisect_left(self.contents.keys, plain(end)) for end in (low, high))
        assert self.index.count(low, high) == max(0, last - first)
        limit = data.draw(st.integers(0, 12))
        for ends, found in (
            ((low, high), self.contents.keys[first:last]),
            ((low, high, limit), self.contents.keys[first:last][:limit]),
            ((low, None, limit), self.contents.keys[first:][:limit]),
        ):
            assert plain_list(self.index.range(*ends)) == found
            if self.is_map:
                values = [self.contents.values[key] for key in found]
                assert self.index.values(*ends).tolist() == self.index.items(*ends)[1].tolist() == values
        for rank in (first, last - 1):
            if 0 <= rank < len(self.contents.keys):
                assert plain(self.index.select(rank)) == self.contents.keys[rank]

    @invariant()
    def contents_agree(self) -> None:
        if hasattr(self, "index"):
            check_contents(self.index, self.contents)
            for frozen, contents in self.snapshots[-2:]:
                check_contents(frozen, contents)


@pytest.mark.parametrize("is_map", [False, True], ids=["multiset", "map"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_parts")
def test_any_history_answers_like_a_sorted_list(
    request: pytest.FixtureRequest, tmp_path: Any, dtype: str, engine: str, is_map: bool
) -> None:
    parts = {"dtype": dtype, "engine": engine, "is_map": is_map, "path": str(tmp_path / "index.dora")}
    machine = type("ThisMachine", (Machine,), parts)
    examples = request.config.getoption("--examples")
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=25))
