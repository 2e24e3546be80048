"""Batches that several threads share: the same answers, errors included."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doraemon import Index, parallel
from doraemon.parallel import in_parts


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PART", 100)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 1000, 1501])
def test_slices_make_up_all_items_once(threads: int, count: int) -> None:
    done = np.zeros(count, dtype=np.int64)

    def work(part: slice) -> None:
        done[part] += 1

    in_parts(work, count, threads)
    assert (done == 1).all()


def test_short_work_stays_in_its_thread_and_long_work_is_spread() -> None:
    for count, spread in ((100, False), (1000, True)):
        names: set[int] = set()
        barrier = threading.Barrier(2, timeout=10)

        def work(part: slice, spread: bool = spread, names: set[int] = names, barrier: Any = barrier) -> None:
            names.add(threading.get_ident())
            if spread and part.start < 200:  # of 10 slices of 100 the first two meet, so two threads must be at work
                barrier.wait()

        in_parts(work, count, 2)
        assert (threading.get_ident() in names) != spread
        assert len(names) == 1 + spread


def test_what_the_work_raises_is_raised() -> None:
    def work(part: slice) -> None:
        if part.start > 500:
            raise RuntimeError("of a slice")

    with pytest.raises(RuntimeError, match="of a slice"):
        in_parts(work, 1000, 2)


def pair(engine: str, keys: Any, values: Any = None) -> tuple[Index, Index]:
    """The same index for one thread and for three, with changes that are not merged."""
    made = [Index(keys, values, engine=engine, merging="manual", threads=threads) for threads in (1, 3)]
    for index in made:
        index.discard(keys[3])
        index.extend(keys[:0] if values is None else keys[3:4], None if values is None else values[:1])
    return made[0], made[1]


@pytest.mark.parametrize("dtype", ["uint64", "float64", "int32", "datetime64[ns]"])
def test_batches_have_the_same_answers(engine: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 5000, 3000).astype(dtype)
    one, three = pair(engine, keys)
    for queries in (rng.integers(0, 5100, 2000).astype(dtype), keys[:150], keys[:0]):
        for side in ("left", "right"):
            expected = np.searchsorted(one.keys(), queries, side)  # type: ignore[call-overload]
            np.testing.assert_array_equal(three.searchsorted(queries, side), expected)  # type: ignore[arg-type]
        np.testing.assert_array_equal(three.contains(queries), np.isin(queries, one.keys()))
        np.testing.assert_array_equal(three.count(queries, queries[::-1]), one.count(queries, queries[::-1]))


def test_queries_of_other_dtypes_have_the_same_answers(engine: str) -> None:
    keys = np.arange(3000, dtype=np.uint32)
    one, three = pair(engine, keys)
    queries = np.arange(-500, 4000, dtype=np.int64)
    for side in ("left", "right"):
        np.testing.assert_array_equal(three.searchsorted(queries, side), one.searchsorted(queries, side))  # type: ignore[arg-type]
    np.testing.assert_array_equal(three.contains(queries), one.contains(queries))


@pytest.mark.parametrize("values", [np.arange(3000.0), np.arange(3000).astype(str), np.arange(3000).astype(object)])
def test_values_are_the_same(engine: str, values: Any) -> None:
    keys = np.arange(0, 6000, 2)
    one, three = pair(engine, keys, values)
    asked = np.random.default_rng(2).permutation(keys)
    np.testing.assert_array_equal(three.get_many(asked), one.get_many(asked))
    np.testing.assert_array_equal(three.get_many(asked + 1, default=values[0]), one.get_many(asked + 1, values[0]))
    asked[1700] = 17
    with pytest.raises(KeyError, match="query 1700, 17, is absent"):
        three.get_many(asked)


def test_a_batch_of_few_distinct_keys_has_the_same_answers(engine: str) -> None:
    keys = np.repeat(np.arange(50), 100)
    one, three = pair(engine, keys)
    queries = np.random.default_rng(3).integers(-2, 55, 1000)
    np.testing.assert_array_equal(three.searchsorted(queries), one.searchsorted(queries))
    np.testing.assert_array_equal(three.contains(queries), one.contains(queries))


def test_the_hot_table_has_the_same_answers() -> None:
    index = Index(np.arange(0, 40_000, 2), threads=3)
    state = index._state
    if state.engine == "numpy":
        pytest.skip("the NumPy engine has no hot table")
    index._state = state.with_hot(state.hot_table(state.run.codes[:2000]))
    queries = np.random.default_rng(4).integers(0, 8000, 3000)
    np.testing.assert_array_equal(index.searchsorted(queries), np.searchsorted(index.keys(), queries))
    np.testing.assert_array_equal(index.contains(queries), queries % 2 == 0)


def test_batches_of_several_threads_are_sampled(engine: str) -> None:
    index = Index(np.arange(30_000), engine=engine, threads=3)
    index.searchsorted(np.arange(30_000))
    taken = int(index._state.run.heat.samples.taken[0])
    assert taken <= 30_000 // 8 + 400
    assert taken >= (
        30_000 // 8 - 400 if engine == "numpy" else 1000
    )  # in C threads that meet may lose some of each other
    assert len(index._state.run.heat.samples.newest()) == taken


def test_the_number_of_threads_is_kept(tmp_path: Path) -> None:
    index = Index([1, 2], threads=3)
    index.save(tmp_path / "index.dora")
    copies = [index.snapshot(), index.copy(), copy.deepcopy(index), pickle.loads(pickle.dumps(index))]
    copies += [copy.copy(index.snapshot()), pickle.loads(pickle.dumps(index.snapshot()))]
    copies.append(Index.open(tmp_path / "index.dora", threads=3))
    assert [each._threads for each in copies] == [3] * len(copies)
    assert Index.open(tmp_path / "index.dora")._threads == 1


@pytest.mark.parametrize("threads", [0, -1])
def test_numbers_of_threads_that_are_none_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=r"threads .*: choose 1 or more"):
        Index([1], threads=threads)
