"""Memory that is used again belongs to one array at a time."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest

from doraemon import Index
from doraemon.memory import Pool, pool

INT64 = np.dtype(np.int64)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="memory is kept on POSIX systems only")


def test_memory_is_used_again_once_no_view_is_left() -> None:
    kept = Pool(least=1 << 12, most=1 << 20)
    array = kept.empty(1000, INT64)
    place, view = array.ctypes.data, array[10:].view(np.uint64)[5:]
    view[:] = 7
    del array
    gc.collect()
    assert kept.nbytes == 0
    assert kept.empty(1000, INT64).ctypes.data != place
    assert (view == 7).all()
    del view
    gc.collect()
    again = [kept.empty(count, INT64) for count in (900, 600)]
    assert place in {each.ctypes.data for each in again}


def test_no_more_is_kept_than_allowed() -> None:
    kept = Pool(least=1 << 12, most=1 << 14)
    arrays = [kept.empty(1 << 9, INT64) for _ in range(9)]
    assert len({array.ctypes.data for array in arrays}) == 9
    arrays.clear()
    gc.collect()
    assert kept.nbytes == 1 << 14


def test_small_arrays_and_objects_are_numpys() -> None:
    kept = Pool(least=1 << 12, most=1 << 20)
    for array in (kept.empty(100, INT64), kept.empty(10_000, np.dtype(object))):
        assert array.base is None


def test_snapshots_keep_what_a_merge_would_use_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "least", 1)
    rng = np.random.default_rng(1)
    index, frozen = Index(np.arange(5000), np.arange(5000)), []
    for round_ in range(6):
        index.extend(rng.integers(0, 10**6, 500), rng.integers(0, 10**6, 500))
        index.compact()
        index.extend([-round_ - 1], [round_])
        frozen.append((index.snapshot(), index.keys(), index.values()))
    for snapshot, keys, values in frozen:
        np.testing.assert_array_equal(snapshot.keys(), keys)
        np.testing.assert_array_equal(snapshot.values(), values)
        assert snapshot.searchsorted(keys).tolist() == list(range(len(keys)))
