"""An index that adapts by itself: it does so when there is something new, seldom enough, and ends with the index."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref
from typing import Any

import numpy as np
import pytest

from doraemon import Index, following
from doraemon.heat import Samples

KEYS = np.arange(0, 400_000, 2, dtype=np.uint64)


class Clock:
    """Lets `_follow` make so many turns, in which an index is asked, and notes how long it wanted to sleep."""

    def __init__(self, turns: int, ask: Any) -> None:
        self.turns, self.ask, self.slept = turns, ask, list[float]()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) > self.turns:
            raise SystemExit
        self.ask(len(self.slept))


class Fake:
    """Counts how often it is adapted, which takes some time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._front, self.adapted, self.seconds = Index(KEYS)._front, 0, seconds

    def adapt(self) -> None:
        self.adapted += 1
        time.sleep(self.seconds)

    def sample(self, count: int) -> None:
        self._front.state.run.heat.samples.add(KEYS[:count])


def followed(index: Fake, turns: int, ask: Any) -> list[float]:
    clock = Clock(turns, ask)
    with pytest.raises(SystemExit):
        following._follow(weakref.ref(index), clock.sleep)
    return clock.slept


def test_an_index_that_is_not_asked_is_left_alone() -> None:
    index = Fake()
    followed(index, 5, lambda turn: index.sample(20_000 if turn == 2 else 0))
    assert index.adapted == 1


def test_adapting_takes_a_hundredth_of_the_time() -> None:
    index = Fake(seconds=0.01)
    slept = followed(index, 3, lambda turn: index.sample(60_000))
    assert index.adapted == 3
    assert slept[0] == following.SHORTEST
    assert all(seconds >= 100 * 0.01 for seconds in slept[1:])


def test_few_new_samples_among_many_tell_nothing() -> None:
    samples = Samples()
    samples.add(KEYS[:100_000])
    assert following.is_due(samples, 0)
    assert following.is_due(samples, 80_000)
    assert not following.is_due(samples, 90_000)


def test_an_index_adapts_by_itself_and_goes_when_it_is_not_needed(engine: str) -> None:
    index = Index(KEYS, adapt="auto", engine=engine)
    rng = np.random.default_rng(1)
    for _ in range(400):
        index.searchsorted(KEYS[rng.integers(90_000, 100_000, 50_000)])
        time.sleep(0.01)
        if index.explain().remembered or index.explain().hot_keys:
            break
    explained = index.explain()
    assert explained.remembered or explained.hot_keys
    reference = weakref.ref(index)
    del index
    for _ in range(400):
        gc.collect()
        if reference() is None:
            break
        time.sleep(0.01)
    assert reference() is None


def test_copies_and_pickles_adapt_by_themselves_too() -> None:
    index = Index(KEYS, adapt="auto")
    for other in (copy.copy(index), pickle.loads(pickle.dumps(index))):
        assert other._options() == ("inline", "auto", 1)


def test_another_way_to_adapt_is_refused() -> None:
    with pytest.raises(ValueError, match="'manual' or 'auto'"):
        Index([1], adapt="sometimes")  # type: ignore[arg-type]
