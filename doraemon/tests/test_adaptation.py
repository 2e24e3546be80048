"""Leaves follow the accesses, only where that changes something, and known workloads cost no fit."""

from __future__ import annotations

import numpy as np
import pytest

from doraemon import Index
from doraemon import heat as heats
from doraemon.heat import Heat, Samples, rebucket

pytestmark = pytest.mark.usefixtures("leaves_alone")

N = 200_000
RNG = np.random.default_rng(11)
KEYS = np.sort(RNG.integers(0, 2**63, N, dtype=np.uint64))


def ask(index: Index, low: float, high: float, share: float = 0.95, count: int = 200_000) -> None:
    """Queries of which `share` fall between two fractions of the keys."""
    hot = RNG.integers(int(low * N), int(high * N), int(count * share))
    cold = RNG.integers(0, N, count - len(hot))
    index.searchsorted(RNG.permutation(KEYS[np.concatenate([hot, cold])]))


def test_uniform_accesses_change_nothing(engine: str) -> None:
    index = Index(KEYS, engine=engine)
    ask(index, 0, 1)
    report = index.adapt()
    assert (report.changed, report.saved) == (0, 0.0)
    assert report.reason == "the model fits the accesses"


def test_a_hot_range_gets_more_leaves(engine: str) -> None:
    index = Index(KEYS, engine=engine)
    before = index._state.run.model.bits.copy()
    ask(index, 0.2, 0.3)
    report = index.adapt()
    after = index._state.run.model.bits
    hot = slice(int(0.22 * len(after)), int(0.28 * len(after)))
    assert (after[hot] > before[hot]).all()
    assert (after[int(0.6 * len(after)) :] <= before.max()).all()
    assert np.exp2(after).sum() < 2 * np.exp2(before).sum()
    assert report.saved > 0.5
    assert 0 < report.refitted == report.changed <= len(after)
    assert index.explain().drift < 0.3
    np.testing.assert_array_equal(index.searchsorted(KEYS[::7]), np.arange(0, N, 7))


def test_only_changed_buckets_are_fitted_when_the_hot_range_moves(engine: str) -> None:
    index = Index(KEYS, engine=engine)
    ask(index, 0.2, 0.4, count=2_000_000)
    index.adapt()
    ask(index, 0.25, 0.45, count=2_000_000)
    report = index.adapt()
    assert 0 < report.refitted <= report.changed < 0.4 * index.explain().buckets


def test_a_workload_that_returns_finds_its_model_without_a_fit(engine: str) -> None:
    index = Index(KEYS, engine=engine)
    for low, high in ((0.1, 0.2), (0.7, 0.8)):
        ask(index, low, high, count=1_000_000)
        index.adapt()
    day = index._state.run.memory.nearest(next(known for known, _ in list(index._state.run.memory)[-2:-1]))
    ask(index, 0.1, 0.2, count=3_000_000)
    report = index.adapt()
    assert day is not None
    assert (report.recalled, report.refitted) == (True, 0)
    assert report.changed > 0


def test_few_accesses_prove_nothing(engine: str) -> None:
    index = Index(KEYS, engine=engine)
    ask(index, 0.5, 0.9, share=0.6, count=200)
    assert "too few" in index.adapt().reason


def test_single_lookups_are_counted_too(engine: str) -> None:
    index = Index(KEYS, engine=engine)
    for key in KEYS[1000:3000].tolist() * 3:
        assert key in index
    counts = index._state.run.heat.counts()
    assert 600 < counts.sum() < 900  # one in 8 of 6000
    assert counts[:2].sum() == counts.sum()


def test_batches_are_sampled_without_bias(engine: str) -> None:
    index = Index(KEYS, engine=engine)
    for _ in range(3000):
        index.searchsorted(KEYS[[5, -5]])
    counts = index._state.run.heat.counts()
    assert 600 < counts.sum() < 900  # one in 8 of 6000, although each batch has but two
    assert counts[0] > 250 < counts[-1]


def test_heat_and_memory_outlive_merges(engine: str) -> None:
    index = Index(KEYS, engine=engine)
    ask(index, 0.2, 0.3)
    index.adapt()
    index.extend(RNG.integers(0, 2**63, 1000, dtype=np.uint64))
    index.compact()
    bits = index._state.run.model.bits
    assert bits[int(0.25 * len(bits))] > bits[int(0.75 * len(bits))]
    assert index.explain().remembered == 2
    assert index.explain().drift < 0.3


def test_a_saved_index_still_knows_its_workloads(tmp_path: object, engine: str) -> None:
    index = Index(KEYS, engine=engine)
    for low, high in ((0.1, 0.2), (0.7, 0.8)):
        ask(index, low, high, count=1_000_000)
        index.adapt()
    index.save(f"{tmp_path}/index.dora")
    opened = Index.open(f"{tmp_path}/index.dora", mmap=True, engine=engine)
    ask(opened, 0.1, 0.2, count=3_000_000)
    report = opened.adapt()
    assert (report.recalled, report.refitted) == (True, 0)


def test_old_heat_decays(engine: str) -> None:
    heat = Heat(np.array([0, 10, 20, 30], dtype=np.uint64), engine)
    heat.samples.add(np.full(1000, 5, dtype=np.uint64))
    heat.counts()
    heat.samples.add(np.full(16_000, 15, dtype=np.uint64))
    counts = heat.counts()
    assert counts[1] == 16_000
    assert counts[0] < 10


def test_samples_are_the_newest_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heats, "CAPACITY", 8)
    samples = Samples()
    samples.add(np.arange(5, dtype=np.uint64))
    assert samples.newest().tolist() == [0, 1, 2, 3, 4]
    samples.add(np.arange(5, 11, dtype=np.uint64))
    assert samples.newest().tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert samples.newest(2).tolist() == samples.copy().newest(2).tolist() == [9, 10]


@pytest.mark.parametrize("new", [[0, 10], [0, 5, 10], [0, 1, 2, 3, 10]])
def test_rebucketing_keeps_the_sum(new: list[int]) -> None:
    moved = rebucket(np.array([3.0, 1.0]), np.array([0, 4, 10]), np.array(new))
    assert moved.sum() == pytest.approx(4.0)
    assert (moved >= 0).all()
