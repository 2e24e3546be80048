"""Following: a thread that adapts an index by itself, for at most a hundredth of the time.

How long an adaptation takes is measured, and the thread then sleeps a hundred times as long. It wakes to look at a
counter that readers write anyway, so that look-ups do nothing more for it, and lets an index alone that is not asked or
whose accesses are as they were.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

from .front import Front
from .heat import Samples
from .warming import MIN_SAMPLES

SHARE = 0.01  #: of the time may be spent on adapting
SHORTEST = 0.05  #: seconds between two looks at the counter


class Followed(Protocol):
    """What is adapted: the state in front tells how often it was asked."""

    _front: Front

    def adapt(self) -> object:
        """Follow the accesses."""


def is_due(samples: Samples, seen: int) -> bool:
    """Whether enough was sampled since `seen` samples to tell anything new: an eighth of what is kept, or of so few."""
    taken = int(samples.taken[0])
    return taken - seen >= max(MIN_SAMPLES, min(taken, len(samples.codes)) // 8)


def follow(index: Followed, sleep: Callable[[float], object] = time.sleep) -> threading.Thread:
    """Start the thread that adapts an index for as long as there is one."""
    thread = threading.Thread(target=_follow, args=(weakref.ref(index), sleep), daemon=True, name="doraemon-follow")
    thread.start()
    return thread


def _follow(reference: weakref.ref[Followed], sleep: Callable[[float], object]) -> None:
    seen, spent = 0, 0.0
    while True:
        sleep(max(SHORTEST, spent / SHARE))
        index = reference()
        if index is None:
            return
        begin = time.perf_counter()
        samples = index._front.state.run.heat.samples
        if is_due(samples, seen):
            index.adapt()
            seen = int(samples.taken[0])
        spent = time.perf_counter() - begin
        del index, samples  # or the thread would keep it
