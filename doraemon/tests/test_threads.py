"""Readers see each write whole and wait for nobody; a merge in the background loses no write made meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doraemon import Index
from doraemon.state import State

PAIR = 10_000  #: the stress writer adds and removes k and k + PAIR together


class Threads:
    """Threads that run until told to stop; the first exception in one is raised in the test."""

    def __init__(self, *steps: Callable[[], None]) -> None:
        self.errors: list[BaseException] = []
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self._loop, args=(step,)) for step in steps]

    def _loop(self, step: Callable[[], None]) -> None:
        try:
            while not self.stopped.is_set():
                step()
        except BaseException as error:
            self.errors.append(error)
            self.stopped.set()

    def run(self, seconds: float) -> None:
        for thread in self.threads:
            thread.start()
        self.stopped.wait(seconds)
        self.stopped.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]


@pytest.mark.parametrize("merging", ["inline", "background"])
@pytest.mark.usefixtures("small_parts")
def test_readers_see_every_write_whole(request: pytest.FixtureRequest, engine: str, merging: Any) -> None:
    """`--stress 600` for ten minutes."""
    adapt: Any = "auto" if merging == "background" else "manual"
    index = Index(np.arange(0, 2 * PAIR, 4), engine=engine, merging=merging, adapt=adapt)

    def write() -> None:
        rng = np.random.default_rng()
        keys = rng.integers(0, PAIR, rng.integers(1, 40))
        index.extend(np.concatenate([keys, keys + PAIR]))
        index.discard_many(np.concatenate([keys, keys + PAIR]))
        action = rng.integers(60)
        if action == 0:
            index.compact()
        elif action < 10:
            index._state.run.heat.decayed = rng.pareto(0.5, len(index._state.run.heat.bounds)) * 1000
            index.adapt()
        elif action < 20 and engine == "native":
            with index._lock:
                state = index._state
                codes = state.key_type.encode_any(np.unique(rng.integers(0, 2 * PAIR, 30)))
                index._state = state.with_hot(state.hot_table(codes))

    def read() -> None:
        frozen = index.snapshot()
        keys = frozen.keys()
        assert len(keys) % 2 == 0
        assert (np.diff(keys) >= 0).all()
        half = len(keys) // 2
        np.testing.assert_array_equal(keys[:half] + PAIR, keys[half:])
        asked = np.random.default_rng().integers(-5, 2 * PAIR + 5, 50)
        np.testing.assert_array_equal(frozen.searchsorted(asked), np.searchsorted(keys, asked))
        low = int(asked[0]) % PAIR
        assert index.count(low, low) == 0
        assert frozen.bisect_left(low) == np.searchsorted(keys, low)
        assert index.contains(np.array([0, 4, 8])).all()

    Threads(write, read, read).run(request.config.getoption("--stress"))
    np.testing.assert_array_equal(index.keys(), np.arange(0, 2 * PAIR, 4))


def test_readers_share_a_table_that_learns(request: pytest.FixtureRequest, engine: str) -> None:
    """Each asks for what the others lack, in batches that go on without the GIL and one by one."""
    if engine == "numpy":
        pytest.skip("the NumPy engine has no hot table")
    keys = np.sort(np.random.default_rng(7).integers(0, 2**62, 100_000)).astype(np.uint64)
    index = Index(keys, engine=engine)
    state = index._state
    index._state = state.with_hot(state.hot_table(state.run.codes[:300]))

    def read() -> None:
        rng = np.random.default_rng()
        ranks = rng.integers(0, 99_000) + rng.integers(0, 1000, 20_000)
        np.testing.assert_array_equal(index.searchsorted(keys[ranks]), ranks)
        for rank in ranks[:200].tolist():
            assert index.bisect_left(int(keys[rank])) == rank

    Threads(read, read, read, lambda: index.adapt() and time.sleep(0.01)).run(request.config.getoption("--stress"))
    assert int(index._state.run.heat.samples.taken[0]) > 20_000 // 16


@pytest.mark.usefixtures("small_parts")
def test_many_writers_take_turns(engine: str) -> None:
    index = Index(dtype="int64", engine=engine, merging="background")

    def write(first: int) -> None:
        for key in range(first, 2000, 4):
            index.insert(key)
            if key % 3 == 0:
                index.discard(key)

    threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.keys().tolist() == [key for key in range(2000) if key % 3]


def test_a_reader_does_not_wait_for_a_writer(engine: str) -> None:
    index = Index([1, 2, 3], engine=engine)
    with index._lock:  # as a writer that takes long would hold it
        answers: list[int] = []
        reader = threading.Thread(target=lambda: answers.append(index.bisect_right(2)))
        reader.start()
        reader.join(5)
    assert answers == [2]


def test_a_background_merge_happens(engine: str) -> None:
    index = Index(np.arange(1000), engine=engine, merging="background")
    index.extend(np.arange(5000))
    for _ in range(500):
        if index.explain().delta_entries == 0:
            break
        time.sleep(0.01)
    assert index.explain().run_keys == len(index) == 6000


@pytest.mark.usefixtures("small_parts", "leaves_alone")
def test_what_is_saved_is_of_one_moment(request: pytest.FixtureRequest, tmp_path: Path, engine: str) -> None:
    """A merge changes the number of buckets, and with it the shares that are remembered of each workload."""
    index = Index(np.arange(20_000), engine=engine, merging="manual")
    index.searchsorted(np.tile(np.arange(2000), 100))
    assert index.adapt().changed > 0

    def write() -> None:
        more = np.random.default_rng().integers(0, 20_000, 3000)
        index.extend(more)
        index.compact()
        index.discard_many(more)
        index.compact()

    def save() -> None:
        index.save(tmp_path / "index.dora")
        assert Index.open(tmp_path / "index.dora", engine=engine).explain().remembered == 2

    Threads(write, save).run(request.config.getoption("--stress") / 2)


OPERATIONS = st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=12)


def apply(index: Index, operations: list[tuple[bool, int]], value: int) -> None:
    for add, key in operations:
        if not add:
            index.discard(key)
        elif index.is_map:
            index.update(key, value)
        else:
            index.insert(key)


@given(OPERATIONS, OPERATIONS, st.booleans())
def test_a_merge_keeps_what_was_written_while_it_went_on(
    engine: str, before: list[tuple[bool, int]], during: list[tuple[bool, int]], is_map: bool
) -> None:
    values = np.zeros(4, dtype=np.int64) if is_map else None
    index = Index([0, 4, 8, 12], values, engine=engine, merging="manual")
    apply(index, before, 1)
    earlier = index._state
    merged = earlier.merged()
    apply(index, during, 2)
    now: State = index._state
    other = index.copy()
    other._state = now.after_merge(earlier, merged)
    assert other.keys().tolist() == index.keys().tolist()
    if is_map:
        assert other.values().tolist() == index.values().tolist()
    other.compact()
    assert other.keys().tolist() == index.keys().tolist()
