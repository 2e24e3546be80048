"""The contract of single methods: absent keys, wrong uses, values, engines."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from doraemon import Index
from doraemon import engine as engines


def test_an_empty_index_answers_everything(engine: str) -> None:
    index = Index(dtype="uint64", engine=engine)
    assert len(index) == index.bisect_right(2**64 - 1) == index.count(0, 2**64) == 0
    assert 0 not in index
    assert index.find_lt(5) is index.find_ge(5) is None
    assert index.keys().dtype == np.uint64
    assert index.searchsorted(np.arange(100, dtype=np.uint64), "right").tolist() == [0] * 100
    assert not index.contains(np.arange(3, dtype=np.uint64)).any()
    assert not index.discard(1)
    assert index.adapt().changed == 0
    index.compact()
    assert "0 keys" in str(index.explain())


def test_empty_batches_give_empty_answers(engine: str) -> None:
    index, none = Index([1, 2], [1, 2], engine=engine), np.zeros(0, dtype=np.int64)
    for answer in (index.searchsorted(none), index.contains([]), index.get_many(none), index.count(none, none)):
        assert answer.shape == (0,)
    index.extend(none, none)
    assert index.discard_many([]) == 0


def test_the_keys_given_are_copied(engine: str) -> None:
    given = np.array([1, 2, 3], dtype=np.uint64)
    index = Index(given, engine=engine)
    given[:] = 9
    assert index.keys().tolist() == [1, 2, 3]
    index.keys()[:] = 9
    assert index.keys().tolist() == [1, 2, 3]


def test_a_map_keeps_any_dtype_of_values(engine: str) -> None:
    record = np.array([(1, 2.0), (3, 4.0)], dtype=[("a", "i4"), ("b", "f8")])
    for values in (["one", "two"], [b"1", b"2"], [True, False], [1j, 2.0], record, np.array([[], None], object)):
        index = Index([20, 10], values, engine=engine)
        index.update(30, index[10])
        index.compact()
        expected = np.asarray(values)[[1, 0, 1]].tolist()
        assert index.values().tolist() == expected


@pytest.mark.parametrize(
    ("values", "more", "error"),
    [
        (np.zeros(1, np.uint8), 256, OverflowError),
        (np.zeros(1, np.uint8), -1, OverflowError),
        (np.zeros(1, np.int64), 0.5, TypeError),
        (["abc"], "abcd", TypeError),
        (np.zeros(1), "x", TypeError),
    ],
)
def test_values_that_would_be_cut_off_are_refused(values: Any, more: Any, error: type[Exception]) -> None:
    index = Index([1], values)
    with pytest.raises(error, match="make the map with"):
        index.update(1, more)


WRONG: list[tuple[Callable[[Index, Index], object], type[Exception], str]] = [
    (lambda keys, map_: keys[1], TypeError, "make it with values"),
    (lambda keys, map_: keys.get(9), TypeError, "make it with values"),
    (lambda keys, map_: keys.get_many([1]), TypeError, "make it with values"),
    (lambda keys, map_: keys.values(), TypeError, "make it with values"),
    (lambda keys, map_: keys.update(1, 1), TypeError, "make it with values"),
    (lambda keys, map_: keys.insert(1, 1), TypeError, "without values"),
    (lambda keys, map_: keys.extend([1], [1]), TypeError, "without values"),
    (lambda keys, map_: map_.insert(9), TypeError, "give a value"),
    (lambda keys, map_: map_.extend([9]), TypeError, "give a value"),
    (lambda keys, map_: map_.extend([9, 8], [1]), ValueError, "one per key"),
    (lambda keys, map_: map_.insert(1, 1), KeyError, "update"),
    (lambda keys, map_: map_[9], KeyError, "9"),
    (lambda keys, map_: map_.get_many([1, 9]), KeyError, "query 1, 9, is absent"),
    (lambda keys, map_: keys.select(3), IndexError, "from -3 to 2"),
    (lambda keys, map_: keys.searchsorted([1], "middle"), ValueError, "'left' or 'right'"),  # type: ignore[arg-type]
    (lambda keys, map_: keys.searchsorted(np.zeros((2, 2))), ValueError, "ravel"),
    (lambda keys, map_: keys.searchsorted(5), TypeError, "one key"),
    (lambda keys, map_: keys.contains("12"), TypeError, "one key"),
    (lambda keys, map_: Index([1, 1], [1, 2]), ValueError, "more than once"),
    (lambda keys, map_: Index([1], [[1]]), ValueError, "dimensions"),
    (lambda keys, map_: Index([1], merging="never"), ValueError, "'manual'"),  # type: ignore[arg-type]
    (lambda keys, map_: Index([1], engine="gpu"), ValueError, "'native' or 'numpy'"),
    (lambda keys, map_: Index([1], memory=-1), ValueError, "0 to remember nothing"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_uses_are_refused_with_a_remedy(number: int, engine: str) -> None:
    ask, error, remedy = WRONG[number]
    keys, map_ = Index([1, 2, 2], engine=engine), Index([1, 2], [10, 20], engine=engine)
    with pytest.raises(error, match=remedy):
        ask(keys, map_)
    assert (len(keys), len(map_)) == (3, 2)


def test_snapshots_have_no_way_to_change() -> None:
    snapshot = Index([1]).snapshot()
    assert not any(hasattr(snapshot, name) for name in ("insert", "extend", "update", "discard", "compact", "adapt"))
    assert pickle.loads(pickle.dumps(snapshot)).keys().tolist() == [1]


def test_a_copy_changes_by_itself(engine: str) -> None:
    first = Index(np.arange(100), np.arange(100), engine=engine)
    second = first.copy()
    second.update(5, -5)
    second.discard(6)
    second.compact()
    assert (first[5], 6 in first, second[5], 6 in second) == (5, True, -5, False)


def test_object_values_survive_a_pickle_but_not_a_file(tmp_path: Any) -> None:
    index = Index([1, 2], np.array([{"a": 1}, None], dtype=object))
    assert pickle.loads(pickle.dumps(index))[1] == {"a": 1}
    with pytest.raises(TypeError, match="pickle"):
        index.save(tmp_path / "index.dora")


def test_the_engine_is_visible_and_chosen_by_the_environment() -> None:
    command = "import doraemon; print(doraemon.Index([1]).explain().engine)"
    environment = os.environ | {"DORAEMON_ENGINE": "numpy"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "numpy"


def test_the_c_engine_is_refused_where_it_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "native", None)
    monkeypatch.delenv("DORAEMON_ENGINE", raising=False)
    assert Index([1]).explain().engine == "numpy"
    with pytest.raises(ImportError, match="C compiler"):
        Index([1], engine="native")


def test_ranges_may_share_an_end(engine: str) -> None:
    index = Index([1, 3, 3, 5], engine=engine)
    assert index.count(np.array([0, 3, 9]), 5).tolist() == [3, 2, 0]
    assert index.count(2, [3, 4, 10**30]).tolist() == [0, 2, 3]
    assert index.count(3, 4) == 2


def test_large_batches_of_changes(engine: str) -> None:
    rng = np.random.default_rng(3)
    index, expected = Index(dtype="uint64", engine=engine), np.zeros(0, dtype=np.uint64)
    for _ in range(12):
        more = rng.integers(0, 50_000, 3000, dtype=np.uint64)
        index.extend(more)
        gone = rng.permutation(expected)[: len(expected) // 3]
        assert index.discard_many(gone) == len(gone)
        values, counts = np.unique(np.concatenate([expected, more]), return_counts=True)
        counts[np.searchsorted(values, np.unique(gone))] -= np.unique(gone, return_counts=True)[1]
        expected = np.repeat(values, counts)
        np.testing.assert_array_equal(index.keys(), expected)
        asked = rng.integers(0, 50_000, 500, dtype=np.uint64)
        np.testing.assert_array_equal(index.searchsorted(asked), np.searchsorted(expected, asked))


@pytest.mark.parametrize("kind", ["crowded", "spread", "few", "copies", "gone"])
def test_batches_count_unmerged_changes_of_every_kind(kind: str, engine: str) -> None:
    rng, top = np.random.default_rng(4), 2**64 - 1
    keys = np.append(rng.integers(0, 2**64 - 1, 20_000, dtype=np.uint64), np.array([0, 0, top, top], np.uint64))
    crowd = np.arange(500, dtype=np.uint64) + keys[7]
    more = {
        "crowded": np.concatenate([crowd, crowd, np.array([0, top], np.uint64)]),
        "spread": rng.integers(0, 2**64 - 1, 3000, dtype=np.uint64),
        "few": keys[:3],
        "copies": np.repeat(np.append(keys[:40], np.array([0, top], np.uint64)), 300),
        "gone": keys[:1],
    }[kind]
    gone = keys[-9000:] if kind == "gone" else more[:5]
    index = Index(keys, merging="manual", engine=engine)
    index.extend(more)
    index.discard_many(gone)
    counts: dict[int, int] = {}
    for part, change in ((keys, 1), (more, 1), (gone, -1)):
        for key in part.tolist():
            counts[key] = counts.get(key, 0) + change
    held = np.sort(np.repeat(np.array(list(counts), np.uint64), list(counts.values())))
    queries = np.concatenate([keys, more, more + np.uint64(1), keys - np.uint64(1)])
    for side in ("left", "right"):
        for _ in range(2):  # the second batch of so many finds all changes put together
            assert index.searchsorted(queries, side).tolist() == np.searchsorted(held, queries, side).tolist()
    assert index.contains(queries).tolist() == np.isin(queries, held).tolist()
