"""Keys above all others, which go behind the run, and what is asked, frozen, adapted and saved around that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doraemon import Index, adaptation
from doraemon.state import State


def with_room(engine: str, is_map: bool = False, **options: Any) -> Index:
    """An index of 0, 2, ... 39998 that a merge left room in."""
    keys = np.arange(0, 39_998, 2)
    index = Index(keys, keys if is_map else None, engine=engine, **options)
    index.extend([39_998], [39_998] if is_map else None)
    index.compact()
    return index


def check(index: Any, keys: Any) -> None:
    """Every way to ask, against the sorted keys, whose values are their own."""
    keys = np.asarray(keys)
    asked = np.concatenate([keys[:: max(1, len(keys) // 500)], keys[-300:], keys[-300:] + 1, [-5, 10**9]])
    for side in ("left", "right"):
        expected = np.searchsorted(keys, asked, side)
        np.testing.assert_array_equal(index.searchsorted(asked, side), expected)
        single = index.bisect_left if side == "left" else index.bisect_right
        assert [single(key) for key in asked[-9:].tolist()] == expected[-9:].tolist()
    np.testing.assert_array_equal(index.contains(asked), np.isin(asked, keys))
    assert index.select(-1) == keys[-1]
    low = int(keys[-200])
    np.testing.assert_array_equal(index.range(low), keys[np.searchsorted(keys, low) :])
    np.testing.assert_array_equal(index.keys(), keys)
    if index.is_map:
        np.testing.assert_array_equal(index.get_many(keys), keys)
        np.testing.assert_array_equal(index.items(low)[1], index.range(low))


@pytest.mark.parametrize("is_map", [False, True], ids=["multiset", "map"])
@pytest.mark.parametrize("order", [1, -1, None], ids=["made in order", "made of others", "merged"])
def test_appended_keys_go_behind_the_run(engine: str, is_map: bool, order: int | None) -> None:
    keys = np.arange(0, 40_000, 2)
    given = keys[::order].copy()
    index = Index(given, given if is_map else None, engine=engine) if order else with_room(engine, is_map)
    for first in range(40_000, 44_000, 1000):
        more = np.arange(first, first + 1000)
        index.extend(more[::-1], more[::-1] if is_map else None)
        keys = np.append(keys, more)
        check(index, keys)
    assert index.explain().delta_entries == 0
    assert index.explain().run_keys == len(keys)
    given[:] = 7  # what an index is made of stays the caller's
    check(index, keys)


def test_keys_among_the_others_and_copies_of_the_last_go_to_the_delta(engine: str) -> None:
    index = with_room(engine)
    index.extend([5, 39_998, 50_000, 50_000])
    assert index.explain().delta_entries == 2
    check(index, sorted([*range(0, 40_000, 2), 5, 39_998, 50_000, 50_000]))
    index.discard_many([50_000, 50_000])
    index.extend([50_000, 50_001])
    check(index, sorted([*range(0, 40_000, 2), 5, 39_998, 50_000, 50_001]))


def test_single_keys_are_appended_as_well(engine: str) -> None:
    index = with_room(engine, is_map=True)
    for key in range(40_000, 46_000):
        index.update(key, key)
    index.discard(45_999)
    check(index, [*range(0, 40_000, 2), *range(40_000, 45_999)])


def test_copies_and_snapshots_of_one_run_do_not_see_each_others_keys(engine: str) -> None:
    index, keys = with_room(engine), list(range(0, 40_000, 2))
    other, frozen = index.copy(), index.snapshot()
    index.extend([50_000, 60_000])
    other.extend([55_000])
    other.extend([70_000])
    later = index.copy()
    later.extend([80_000])
    index.extend([90_000])
    check(frozen, keys)
    check(other, [*keys, 55_000, 70_000])
    check(index, [*keys, 50_000, 60_000, 90_000])
    check(later, [*keys, 50_000, 60_000, 80_000])


def test_a_room_that_is_used_up_is_made_again(engine: str) -> None:
    index, keys = with_room(engine), np.arange(0, 40_000, 2)
    for first in range(40_000, 80_000, 4000):
        index.extend(np.arange(first, first + 4000))
        keys = np.append(keys, np.arange(first, first + 4000))
    check(index, keys)


def test_the_model_is_fitted_to_appended_keys_before_a_file_is_written(engine: str, tmp_path: Path) -> None:
    index = with_room(engine)
    index.extend(np.arange(40_000, 40_100))
    assert index._state.run.tail == 100
    index.save(tmp_path / "index")
    check(Index.open(tmp_path / "index", verify=True, engine=engine), [*range(0, 40_000, 2), *range(40_000, 40_100)])
    index.compact()
    assert index._state.run.tail == 0
    assert index._state.view.within_error_bounds()


def test_many_appends_keep_the_number_of_buckets_small(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doraemon.model.DEPTH", 64)
    monkeypatch.setattr("doraemon.model.MAX_BUCKETS", 8)
    monkeypatch.setattr("doraemon.appending.MAX_BUCKETS", 8)
    index, keys = Index([0], engine=engine), np.arange(3000)
    for first in range(1, 3000, 29):
        index.extend(keys[first : first + 29])
        index.compact()
    check(index, keys)
    assert index._state.view.within_error_bounds()
    assert index.explain().buckets <= 24


def test_a_hot_table_that_knows_of_keys_before_they_are_appended_stays_true(engine: str) -> None:
    if engine == "numpy":
        pytest.skip("the NumPy engine has no hot table")
    index = with_room(engine)
    state = index._state
    codes = state.key_type.encode(np.array([4, 5, 50_000, 50_001, 60_000]))
    index._state = state.with_hot(state.hot_table(codes))
    index.extend([45_000, 50_001, 50_001])
    check(index, [*range(0, 40_000, 2), 45_000, 50_001, 50_001])
    assert index.searchsorted(np.array([4, 50_000, 50_001, 60_000]), "right").tolist() == [3, 20_001, 20_003, 20_003]
    assert index._state.run.hot is not None


def test_a_merge_in_the_background_takes_over_what_was_appended_meanwhile(engine: str) -> None:
    index = with_room(engine)
    index.extend([5])
    before = index._state
    merged = before.merged()
    index.extend([7, 50_000, 50_001])
    index.discard(50_001)
    after = index._state.after_merge(before, merged)
    assert after is not None
    index._state = after
    assert index.explain().run_keys == 20_003
    check(index, sorted([*range(0, 40_000, 2), 5, 7, 50_000]))


@pytest.mark.parametrize("meanwhile", ["extend", "append", "much", "compact"])
def test_writers_go_on_while_an_index_adapts(engine: str, meanwhile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, keys, adapt = with_room(engine), list(range(0, 40_000, 2)), adaptation.adapt
    more = {"extend": [5], "append": [50_000], "much": list(range(50_000, 59_000)), "compact": [5]}[meanwhile]
    index.searchsorted(np.tile(np.arange(2000, 3000), 100))

    def slowly(state: State) -> Any:
        if len(index) == len(keys):
            index.extend(more)  # which would wait forever if it had to
            if meanwhile == "compact":
                index.compact()
        adapted, report = adapt(state)
        if engine == "native":
            adapted = adapted.with_hot(adapted.hot_table(adapted.key_type.encode(np.array([2000, 50_000, 60_000]))))
        return adapted, report

    monkeypatch.setattr(adaptation, "adapt", slowly)
    index.adapt()
    check(index, sorted(keys + more))
