"""The hot table answers what it holds as the model would, is found by itself, and goes where it does not pay."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from domains import DTYPES
from numpy.typing import NDArray

from doraemon import Index, accesses, hot, remembering, warming
from doraemon import engine as engines
from doraemon.arrays import Codes, Floats
from doraemon.engine import native
from doraemon.hot import MOST_COPIES, Hot
from doraemon.state import State

pytestmark = pytest.mark.skipif(engines.choose() != "native", reason="only the C engine has a hot table")
TIMED = warming._costs
N = 300_000
RNG = np.random.default_rng(5)
KEYS = np.sort(RNG.integers(0, 2**63, N, dtype=np.uint64))


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials take the time of a quiet machine: less by a share of what a table answers, and more by its size.

    What is found does not depend on what else runs then.
    """

    def costs(states: list[State], past: Codes, late: Codes, rounds: int) -> Floats:
        tables = [state.run.hot for state in states]
        return np.array(
            [1.0 if table is None else 1 - 0.6 * table.holds(late).mean() + 2e-8 * table.nbytes for table in tables]
        )

    monkeypatch.setattr(warming, "_costs", costs)


@contextmanager
def learner_taken(table: Hot) -> Iterator[None]:
    """As while another reader has the table that learns."""
    table.learner.notes[0] = 1
    yield
    table.learner.notes[0] = 0


def zipf(count: int, exponent: float = 1.3, seed: int = 1) -> NDArray[np.uint64]:
    """Queries of a few keys, scattered over all, again and again."""
    ranks = np.random.default_rng(seed).zipf(exponent, count).astype(np.uint64)
    return KEYS[(ranks * np.uint64(0x9E3779B97F4A7C15) % np.uint64(N)).astype(np.int64)]


def heated(index: Index, keys: NDArray[Any]) -> Index:
    """The index with a hot table of these keys."""
    state = index._state
    codes = np.unique(state.key_type.encode_any(keys))
    index._state = state.with_hot(state.hot_table(codes))
    assert index.explain().hot_keys > 0
    return index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changed", [False, True], ids=["merged", "with changes"])
@pytest.mark.parametrize("is_map", [False, True], ids=["multiset", "map"])
def test_every_question_is_answered_as_without_a_table(dtype: str, changed: bool, is_map: bool) -> None:
    numbers = RNG.integers(0, 9000, 4000)
    keys = np.unique(numbers) if is_map else numbers
    made = [
        Index(keys.astype(dtype), np.arange(len(keys)) if is_map else None, engine="native", merging="manual")
        for _ in range(2)
    ]
    with_table = heated(made[0], np.arange(0, 9000, 3).astype(dtype))  # some of them are not there
    if changed:
        for index in made:
            new = np.arange(0, 9000, 7).astype(dtype)
            index.extend(new, np.arange(len(new)) if is_map else None)
            index.discard_many(np.arange(0, 9000, 5).astype(dtype))
    asked = RNG.integers(0, 9500, 3000).astype(dtype)
    for side in ("left", "right"):
        np.testing.assert_array_equal(*(index.searchsorted(asked, side) for index in made))
    np.testing.assert_array_equal(*(index.contains(asked) for index in made))
    if is_map:
        np.testing.assert_array_equal(*(index.get_many(asked, -1) for index in made))
    for key in asked[:200]:
        one, other = (
            (index.bisect_left(key), index.bisect_right(key), key in index, is_map and index.get(key, None))
            for index in (with_table, made[1])
        )
        assert one == other


@pytest.mark.parametrize("m", [1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 1000])
def test_batches_of_any_length_with_any_share_of_misses(m: int) -> None:
    index = heated(Index(KEYS), KEYS[::2])
    for share in (0.0, 0.3, 0.9, 1.0):
        at = RNG.integers(0, N // 2, m) * 2 + (RNG.random(m) < share)
        np.testing.assert_array_equal(index.searchsorted(KEYS[at]), np.searchsorted(KEYS, KEYS[at]))


def test_the_ends_of_the_codes_are_codes_like_others() -> None:
    ends = np.array([0, 1, 2**64 - 2, 2**64 - 1, 2**64 - 1], dtype=np.uint64)
    index = heated(Index(ends), ends)
    assert index.searchsorted(ends).tolist() == [0, 1, 2, 3, 3]
    assert index.searchsorted(ends, "right").tolist() == [1, 2, 3, 5, 5]
    assert [index.bisect_right(int(key)) for key in ends] == [1, 2, 3, 5, 5]


def test_what_finds_its_line_full_is_left_to_the_model() -> None:
    codes = KEYS[:4000].copy()
    table = Hot.of(codes, np.arange(4000), np.ones(4000, dtype=np.int64), 0)
    assert table is not None
    assert 0.85 * 4000 < table.held == table.holds(codes).sum() < 4000
    assert not table.holds(KEYS[4000:8000]).any()


def test_codes_with_too_many_copies_to_state_are_left_out() -> None:
    codes, ranks = np.array([1, 2], dtype=np.uint64), np.array([0, 5])
    table = Hot.of(codes, ranks, np.array([MOST_COPIES + 1, MOST_COPIES]), 0)
    assert table is not None
    assert table.holds(codes).tolist() == [False, True]
    assert Hot.of(codes[:1], ranks[:1], np.array([MOST_COPIES + 1]), 0) is None


def test_skewed_accesses_get_a_table_that_answers_most_of_them() -> None:
    index = Index(KEYS)
    for seed in range(4):
        index.searchsorted(zipf(200_000, seed=seed))
    report = index.adapt().hot
    assert report.changed
    assert report.saved > 0.2
    assert 1000 < report.keys == index.explain().hot_keys < N // 8
    table = index._state.run.hot
    assert table is not None
    assert table.holds(zipf(10_000, seed=9)).mean() > 0.85
    asked = zipf(50_000, seed=10)
    np.testing.assert_array_equal(index.searchsorted(asked), np.searchsorted(KEYS, asked))


def test_a_trial_tells_slow_look_ups_from_fast_ones() -> None:
    fast = Index(KEYS)._state
    slow = SimpleNamespace(view=SimpleNamespace(ranks=lambda *asked: (time.sleep(0.005), fast.view.ranks(*asked))))
    costs = TIMED([fast, slow, fast], KEYS[:20_000], KEYS[-6000:], 2)
    assert costs.shape == (3,)
    assert 0 < max(costs[0], costs[2]) < costs[1] / 2
    assert costs[1] > 0.005 / 1000


def test_the_table_goes_when_accesses_are_even() -> None:
    index = heated(Index(KEYS), KEYS[:4000])
    for seed in range(4):
        index.searchsorted(np.random.default_rng(seed).permutation(KEYS))
    report = index.adapt().hot
    assert (report.keys, index.explain().hot_keys) == (0, 0)


def test_a_hot_range_gets_a_table_of_all_its_keys() -> None:
    index = Index(KEYS)
    hot = KEYS[100_000:120_000]
    samples = np.where(RNG.random(60_000) < 0.9, RNG.choice(hot, 60_000), RNG.choice(KEYS, 60_000))
    shares = index._state.run.heat.counted(samples) / len(samples)
    buckets = warming.hot_buckets(index._state.run, shares, N // 8)
    table = warming.table_of_buckets(index._state.run, buckets)
    assert table is not None
    assert table.holds(hot).mean() > 0.85
    at = np.arange(0, N, 3)
    index._state = index._state.with_hot(table)
    np.testing.assert_array_equal(index.searchsorted(KEYS[at]), at)


def test_hot_buckets_with_copies_give_only_keys_that_occur_once() -> None:
    keys = np.sort(np.concatenate([np.arange(50_000), np.arange(20_000, 30_000, 2), np.full(9000, 25_000)]))
    index = Index(keys.astype(np.uint64))
    table = warming.table_of_buckets(index._state.run, np.arange(3, 18))
    assert table is not None
    assert not table.holds(np.arange(20_000, 30_000, 2).astype(np.uint64)).any()
    index._state = index._state.with_hot(table)
    np.testing.assert_array_equal(index.searchsorted(keys, "right"), np.searchsorted(keys, keys, "right"))


def test_a_merge_keeps_the_hot_keys_and_moves_their_ranks() -> None:
    index = heated(Index(KEYS, merging="manual"), KEYS[::50])
    more = RNG.integers(0, 2**63, 20_000, dtype=np.uint64)
    index.extend(more)
    index.compact()
    everything = np.sort(np.concatenate([KEYS, more]))
    assert index.explain().hot_keys > 0.85 * len(KEYS[::50])
    np.testing.assert_array_equal(index.searchsorted(KEYS[::25]), np.searchsorted(everything, KEYS[::25]))


def test_copies_share_the_table_and_files_do_not_hold_it(tmp_path: Path) -> None:
    index = heated(Index(KEYS), KEYS[::50])
    frozen, other = index.snapshot(), index.copy()
    index.save(tmp_path / "index.dora")
    opened = Index.open(tmp_path / "index.dora")
    assert frozen.explain().hot_keys == other.explain().hot_keys == index.explain().hot_keys
    assert opened.explain().hot_keys == 0
    np.testing.assert_array_equal(opened.searchsorted(KEYS[::50]), frozen.searchsorted(KEYS[::50]))


def test_hot_answers_are_sampled_like_others_and_need_no_leaves() -> None:
    index = heated(Index(KEYS), KEYS[:1000])
    table = index._state.run.hot
    assert table is not None
    held = KEYS[:1000][table.holds(KEYS[:1000])]
    index.searchsorted(np.tile(held, 20))
    samples = index._state.run.heat.samples.newest()
    assert 0.8 * 20 * len(held) < 8 * len(samples) < 1.2 * 20 * len(held)
    assert index.explain().accesses == 0


def test_lists_by_count_begin_with_what_occurs_most() -> None:
    samples = np.array([7, 5, 7, 9, 7, 5], dtype=np.uint64)
    codes, known = accesses.by_count(samples)
    assert codes.tolist() == [7, 5, 9]
    assert known == pytest.approx(5 / 6)


def test_another_workload_is_noticed_with_and_without_a_table() -> None:
    run = Index(KEYS)._state.run
    here, there = KEYS[:20_000], KEYS[200_000:220_000]
    assert warming.has_moved(run, RNG.choice(here, 40_000), RNG.choice(there, 5000))
    assert not warming.has_moved(run, RNG.choice(here, 40_000), RNG.choice(here, 5000))
    run = heated(Index(KEYS), here)._state.run
    assert warming.has_moved(run, RNG.choice(here, 40_000), RNG.choice(there, 5000))
    assert not warming.has_moved(run, RNG.choice(there, 40_000), RNG.choice(there, 5000))


@pytest.mark.parametrize(("asked", "tried"), [(500_000, False), (500, True)])
def test_accesses_that_pass_through_many_keys_are_let_go_without_a_trial(
    monkeypatch: pytest.MonkeyPatch, asked: int, tried: bool
) -> None:
    keys = np.arange(0, 4_000_000, 2, dtype=np.uint64)
    index, trials = Index(keys, engine="native"), list[bool]()
    samples, try_out = index._state.run.heat.samples, warming._fastest
    monkeypatch.setattr(warming, "_fastest", lambda *given: trials.append(True) or try_out(*given))
    rng = np.random.default_rng(6)
    samples.add(rng.choice(keys[:200_000], len(samples.codes)))
    samples.add(rng.choice(keys[-asked:], 6000))
    hot = index.adapt().hot
    assert (bool(trials), hot.moved) == (tried, True)


def test_a_table_that_fits_is_not_tried_again_before_much_more_is_known() -> None:
    index, codes = Index(KEYS), KEYS[:1000]
    index.searchsorted(np.tile(codes, 100))
    assert index.adapt().hot.changed
    table = index._state.run.hot
    assert table is not None
    assert table.choice is not None
    assert table.choice.answered > 0.85
    index.searchsorted(np.tile(codes, 50))
    report = index.adapt().hot
    assert (report.reason, report.changed, report.moved) == ("the table fits the accesses", False, False)
    assert index._state.run.hot is table
    with learner_taken(table):
        index.searchsorted(np.tile(KEYS[-1000:], 20))
    report = index.adapt().hot
    assert (report.reason, report.changed, report.moved) == ("the accesses have just moved", False, True)


def test_what_a_table_is_made_of_after_a_move_are_later_samples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot, "LEARNED", 0)
    index, here, there = Index(KEYS), KEYS[:1000], KEYS[-1000:]
    index.searchsorted(np.tile(here, 300))
    index.adapt()
    index.searchsorted(np.tile(there, 60))
    report = index.adapt().hot
    table = index._state.run.hot
    assert table is not None
    assert (report.changed, report.moved) == (True, True)
    assert table.holds(there).mean() > 0.9
    assert not table.holds(here).any()


def test_a_table_follows_scattered_keys_that_move() -> None:
    index = Index(KEYS)
    for seed in range(4):
        index.searchsorted(zipf(200_000, seed=seed))
    index.adapt()
    moved = KEYS[::-1]
    for seed in range(2):
        index.searchsorted(moved[np.searchsorted(KEYS, zipf(100_000, seed=seed))])
    report = index.adapt()
    assert report.hot.reason == "the table has followed the accesses"
    assert report.hot.changed
    assert report.hot.moved
    assert (report.refitted, report.reason) == (0, "the accesses have just moved: fits wait until they stay")
    table = index._state.run.hot
    assert table is not None
    assert table.holds(moved[np.searchsorted(KEYS, zipf(10_000, seed=9))]).mean() > 0.8
    index.searchsorted(moved[np.searchsorted(KEYS, zipf(400_000, seed=10))])
    assert index.adapt().hot.reason == "the table fits the accesses"
    assert index._state.run.hot is table


def test_a_table_that_has_followed_has_the_hottest_key_even_if_that_has_just_given_way() -> None:
    index, moved, asked = Index(KEYS), KEYS[::-1], zipf(400_000)
    index.searchsorted(asked)
    index.adapt()
    followed = moved[np.searchsorted(KEYS, asked)]
    index.searchsorted(followed)
    lines = hot_of(index).learner.lines
    codes, counts = np.unique(followed, return_counts=True)
    hottest = codes[np.argmax(counts)]
    held = lines["codes"] == hottest
    assert held.any()
    other = lines[~held.any(axis=1)][0]
    lines["codes"][held], lines["found"][held] = other["codes"][0], other["found"][0]
    report = index.adapt()
    assert report.hot.reason == "the table has followed the accesses"
    assert hot_of(index).holds(followed).mean() > 0.85


def learned(table: Hot) -> Hot:
    """The table as it has become."""
    followed = table.followed()
    assert followed is not None
    return followed


def hot_of(index: Index) -> Hot:
    table = index._state.run.hot
    assert table is not None
    return table


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("changed", [False, True], ids=["merged", "with changes"])
def test_a_table_learns_what_it_lacked_and_every_answer_stays_true(side: Any, changed: bool) -> None:
    keys = np.sort(RNG.integers(0, 60_000, 50_000)).astype(np.uint64)
    index = heated(Index(keys, merging="manual"), keys[:500])
    if changed:
        index.extend(np.arange(0, 60_000, 11).astype(np.uint64))
        index.discard_many(np.arange(0, 60_000, 13).astype(np.uint64))
    everything = index.keys()
    for place in range(5):
        asked = (10_000 * place + RNG.zipf(1.2, 4000) % 60_000).astype(np.uint64)
        asked[::7] = RNG.integers(0, 2**64, len(asked[::7]), dtype=np.uint64)
        asked[::500] = 2**64 - 1
        np.testing.assert_array_equal(index.searchsorted(asked, side), np.searchsorted(everything, asked, side))
        np.testing.assert_array_equal(index.contains(asked), np.isin(asked, everything))
        for key in asked[:300].tolist():
            assert index.bisect_right(key) - index.bisect_left(key) == (everything == key).sum()
    assert not learned(hot_of(index)).holds(keys[:500]).all()


def test_what_is_asked_for_once_is_learned_only_where_the_accesses_moved() -> None:
    index = heated(Index(KEYS), KEYS[:1000])
    hot, once = np.tile(KEYS[:1000], 20), KEYS[5000:5200].copy()
    index.searchsorted(np.concatenate([hot, once]))
    assert learned(hot_of(index)).holds(once).mean() < 0.05
    index.searchsorted(np.concatenate([hot, once]))
    assert learned(hot_of(index)).holds(once).mean() > 0.5  # lacking for the second time, as most bytes still tell
    moved = KEYS[100_000:103_000].copy()
    index.searchsorted(moved)
    assert learned(hot_of(index)).holds(moved[-200:]).mean() > 0.8


def test_only_keys_that_the_run_has_once_are_learned() -> None:
    keys = np.sort(np.concatenate([np.arange(0, 20_000, 2), np.arange(10_000, 12_000, 2)])).astype(np.uint64)
    index = heated(Index(keys), keys[:300])
    for asked in ([9000, 9001, 10_500, 13_000], [19_998]):
        index.searchsorted(np.tile(np.array(asked, dtype=np.uint64), 50))
        held = learned(hot_of(index)).holds(np.array(asked, dtype=np.uint64)).tolist()
        assert held == [key % 2 == 0 and not 10_000 <= key < 12_000 for key in asked]


def test_single_questions_teach_the_table_too() -> None:
    index = heated(Index(KEYS, KEYS), KEYS[:1000])
    for question in (index.bisect_left, index.bisect_right, index.get, index.__contains__):
        key = int(RNG.choice(KEYS[5000:]))
        assert not learned(hot_of(index)).holds(np.array([key], dtype=np.uint64)).any()
        answers = [question(asked) for asked in (key, int(KEYS[0]), key)][::2]  # what was asked last is known anyway
        assert learned(hot_of(index)).holds(np.array([key], dtype=np.uint64)).all()
        assert answers[0] == answers[1]


def test_a_reader_does_not_wait_for_another_that_has_the_table() -> None:
    index = heated(Index(KEYS), KEYS[:1000])
    table = hot_of(index)
    with learner_taken(table):
        np.testing.assert_array_equal(index.searchsorted(KEYS[::30]), np.arange(0, N, 30))
        assert index.bisect_left(int(KEYS[7000])) == 7000
        assert table.followed() is None
    assert not learned(table).holds(KEYS[9000::30].copy()).any()
    np.testing.assert_array_equal(learned(table).lines, table.lines)


def test_snapshots_and_longer_runs_share_only_what_is_true_of_both() -> None:
    index = Index(KEYS, merging="manual")
    index.extend(KEYS[:1])
    index.compact()  # which leaves room behind the run
    index = heated(index, KEYS[:1000])
    before, more = index.snapshot(), np.arange(2**63, 2**63 + 500, dtype=np.uint64)
    index.extend(more)
    asked = np.tile(np.concatenate([more, KEYS[-500:]]), 10)
    assert hot_of(index) is before._state.run.hot
    np.testing.assert_array_equal(index.searchsorted(asked), np.searchsorted(index.keys(), asked))
    assert not learned(hot_of(index)).holds(more).any()
    assert learned(hot_of(index)).holds(KEYS[-500:]).mean() > 0.5
    np.testing.assert_array_equal(before.searchsorted(asked), np.searchsorted(before.keys(), asked))


def test_a_table_that_has_what_it_should_takes_few_lessons() -> None:
    index = heated(Index(KEYS), KEYS[:1000])
    usual = replace(hot_of(index), choice=hot.Choice(0, 1 << 18, answered=0.5, saved=0.3))
    index._state = index._state.with_hot(usual)
    asked = np.where(RNG.random(20_000) < 0.6, RNG.choice(KEYS[:1000], 20_000), RNG.choice(KEYS, 20_000, replace=False))
    index.searchsorted(asked)
    assert learned(hot_of(index)).holds(KEYS[:1000]).mean() > 0.5
    index.searchsorted(RNG.choice(KEYS[150_000:151_000], 20_000))
    assert learned(hot_of(index)).holds(KEYS[150_000:151_000]).mean() > 0.8


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.2, 1.0], ids="{:.0%} answered".format)
def test_a_long_batch_of_which_a_large_table_answers_little_goes_to_the_model(share: float) -> None:
    index = heated(Index(KEYS, engine="native", merging="manual"), KEYS[: N // 2])
    state, table = index._state, index._state.run.hot
    assert table is not None
    choice = hot.Choice(0, 8192, answered=0.5, saved=0.4)
    table = replace(table, learner=hot.no_learner(), choice=choice)  # as of one too large to learn
    index._state = state.with_hot(table)
    assert table.least == round(0.1 * native.PARTS)
    index.extend(KEYS[::9])
    everything = np.sort(np.concatenate([KEYS, KEYS[::9]]))
    places = np.where(RNG.random(20_000) < share, RNG.integers(0, N // 2, 20_000), RNG.integers(N // 2, N, 20_000))
    for asked in (KEYS[places], KEYS[places] + np.uint64(1)):
        for side in ("left", "right"):
            expected = np.searchsorted(everything, asked, side=side)
            for _ in range(2):
                np.testing.assert_array_equal(index.searchsorted(asked, side), expected)
        np.testing.assert_array_equal(index.contains(asked), np.isin(asked, KEYS))


def asked_of(index: Index, keys: NDArray[Any], count: int = 300) -> Any:
    """What adapting comes to after only these keys were asked for, in any order."""
    index.searchsorted(RNG.permutation(np.tile(keys, count)))
    return index.adapt().hot


HERE, THERE = KEYS[:1000], KEYS[-1000:]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Index:
    """An index that has followed accesses from one place to another, and knows tables for both."""
    monkeypatch.setattr(hot, "LEARNED", 0)
    index = Index(KEYS, merging="manual")
    assert asked_of(index, HERE).changed
    assert asked_of(index, THERE).changed
    assert len(index._state.run.decisions) == 2
    return index


def test_a_workload_that_returns_has_its_table_without_a_trial(known: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = known._state.run.remembered_bytes
    assert kept == known.explain().remembered_bytes > 0
    monkeypatch.setattr(warming, "_costs", lambda *_: pytest.fail("tables were timed"))
    for place in (HERE, THERE, HERE):
        report = asked_of(known, place)
        assert (report.reason, report.recalled, report.changed) == ("a similar workload was known", True, True)
        assert hot_of(known).holds(place).mean() > 0.9
        np.testing.assert_array_equal(known.searchsorted(place), np.searchsorted(KEYS, place))
    assert asked_of(known, HERE, count=20).reason == "the table fits the accesses"


def test_that_no_table_pays_is_remembered_until_more_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "_costs", lambda states, *_: np.arange(1.0, 1.0 + len(states)))
    index = Index(KEYS)
    assert asked_of(index, HERE, count=100).reason == "no table saves enough"
    monkeypatch.setattr(warming, "_costs", lambda *_: pytest.fail("tables were timed"))
    assert asked_of(index, HERE, count=50).reason == "no table saves enough"
    monkeypatch.setattr(warming, "_costs", lambda states, *_: np.arange(1.0 + len(states), 1.0, -1.0))
    assert asked_of(index, HERE, count=100).changed


def test_a_remembered_table_is_forgotten_by_a_merge(known: Index) -> None:
    known.extend(RNG.integers(0, 2**63, 20_000, dtype=np.uint64))
    known.compact()
    everything = known.keys()
    assert known.explain().remembered_bytes == 0
    assert not asked_of(known, HERE).recalled
    np.testing.assert_array_equal(known.searchsorted(HERE), np.searchsorted(everything, HERE))


def test_a_remembered_table_with_ranks_above_the_keys_of_then_is_not_used_of_a_longer_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hot, "LEARNED", 0)
    index = Index(KEYS[:-1], merging="manual")
    index.extend(KEYS[-1:] - np.uint64(1))
    index.compact()  # leaves room behind the run
    above = KEYS[-1] + np.arange(1, 1000, dtype=np.uint64)
    for place in (HERE, above):
        assert asked_of(index, place).changed
    index.extend(above[::2])
    everything = index.keys()
    assert asked_of(index, HERE).recalled
    assert not asked_of(index, above).recalled
    for place in (above, HERE):
        np.testing.assert_array_equal(index.searchsorted(place), np.searchsorted(everything, place))


def test_remembered_tables_take_no_more_than_their_share(known: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    each = max(decision.nbytes for _, decision in known._state.run.decisions)
    monkeypatch.setattr(remembering, "MOST", 0.0)
    monkeypatch.setattr(remembering, "ANYWAY", 2 * each)
    for first in range(10_000, 60_000, 10_000):
        asked_of(known, KEYS[first : first + 1000])
        tables = [decision.nbytes for _, decision in known._state.run.decisions]
        assert sum(tables) <= 2 * each
    assert not asked_of(known, HERE).recalled


def test_an_index_without_memory_remembers_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot, "LEARNED", 0)
    index = Index(KEYS, memory=0)
    for place in (HERE, THERE, HERE):
        assert not asked_of(index, place).recalled
    assert index.explain().remembered_bytes == 0


def test_where_the_accesses_moved_is_found_in_few_looks() -> None:
    state = Index(KEYS)._state
    table = state.hot_table(HERE)
    assert table is not None
    for moved in (0, 1, 2, 5, 64, 100, 127, 128):
        samples = np.concatenate(
            [RNG.choice(HERE, (128 - moved) * warming.BLOCK), RNG.choice(THERE, moved * warming.BLOCK)]
        )
        assert warming._since_answered(table, samples, 0.5) == moved * warming.BLOCK


def test_what_repeats_in_many_samples_is_told_by_some_of_their_codes() -> None:
    few, many = RNG.choice(KEYS[:1000], 100_000), RNG.choice(KEYS, 100_000, replace=False)
    for samples in (few, many, np.concatenate([few, many])):
        codes, known = accesses.by_count(samples)
        assert accesses.repeated(samples, 1.0)[1] == pytest.approx(known, abs=0.02)
        assert len(accesses.repeated(samples, 1.0)[0]) == 0
        assert len(accesses.repeated(samples, -1.0)[0]) == len(codes)


def test_an_index_whose_keys_are_all_changes_gets_no_table() -> None:
    index = Index(dtype="uint64", merging="manual")
    index.extend(HERE)
    report = asked_of(index, HERE)
    assert (report.reason, report.keys) == ("all keys are changes, of which a table tells nothing", 0)
    np.testing.assert_array_equal(index.searchsorted(HERE), np.arange(len(HERE)))
