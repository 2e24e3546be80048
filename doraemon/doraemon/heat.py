"""Heat: which codes are asked for and how often each bucket is searched, sampled and decayed."""

from __future__ import annotations

import threading

import numpy as np

from .arrays import Codes, Floats, Ints
from .engine import Engine
from .hot import Hot
from .splicing import ranks_in
from .workload import Signature, signature

SAMPLING = 8  #: one access in so many is kept
CAPACITY = 1 << 18  #: accesses that are kept at most, a power of two
HALF_LIFE = 8  #: counts per bucket after which an older one weighs half
ENOUGH = 8  #: half-lives of new counts, before which none is of any weight
DOUBTED = 8  #: a count that is believed as much as its neighbours are
NEIGHBOURS = 8  #: buckets on each side


class Samples:
    """The codes that were asked for lately, one access in SAMPLING, as readers of both engines write them.

    Codes do not depend on the run, so that samples outlive a merge.

    Attributes:
        codes: uint64 [CAPACITY], a ring.
        taken: uint64 [1], how many were ever written; the last was written to place `(taken - 1) % CAPACITY`.
    """

    def __init__(self) -> None:
        self.codes: Codes = np.zeros(CAPACITY, dtype=np.uint64)  # memory that is not written to is not taken
        self.taken: Codes = np.zeros(1, dtype=np.uint64)
        # without it, a thread that was stopped in between would take back what others added meanwhile
        self._lock = threading.Lock()

    def add(self, codes: Codes) -> None:
        """Keep these codes."""
        codes = codes[-CAPACITY:]
        with self._lock:
            taken = int(self.taken[0])
            self.codes[np.arange(taken, taken + len(codes)) % CAPACITY] = codes
            self.taken[0] = taken + len(codes)

    def newest(self, count: int = CAPACITY) -> Codes:
        """The last `count` samples or as many as there are, the oldest first."""
        taken = int(self.taken[0])
        first, last = max(0, taken - min(count, CAPACITY)) % CAPACITY, taken % CAPACITY
        if taken == 0 or count <= 0:
            return self.codes[:0]
        if first < last:
            return self.codes[first:last].copy()
        return np.concatenate([self.codes[first:], self.codes[:last]])

    def copy(self) -> Samples:
        """The same samples, to which others may be added."""
        other = Samples()
        other.codes[:] = self.codes
        other.taken[:] = self.taken
        return other


class Heat:
    """Access counts of one run's buckets: of the accesses that the model answers, as leaves are given for these.

    Time is measured in accesses, not seconds: an idle index forgets nothing.

    Attributes:
        bounds: uint64 [buckets], the first code of each.
        decayed: float64 [buckets], what was counted, older counts weighing less.
        samples: what readers add to.
    """

    def __init__(self, bounds: Codes, engine: Engine, decayed: Floats | None = None, samples: Samples | None = None):
        self.bounds, self._engine = bounds, engine
        self.decayed = np.zeros(len(bounds)) if decayed is None else decayed
        self.samples = Samples() if samples is None else samples
        self._counted = int(self.samples.taken[0])
        self._lock = threading.Lock()

    def counts(self, hot: Hot | None = None) -> Floats:
        """The decayed counts, with what readers added until now, but for what a hot table answers."""
        with self._lock:
            taken = int(self.samples.taken[0])
            half_life = HALF_LIFE * max(len(self.bounds), 256)
            fresh = self.samples.newest(min(taken - self._counted, ENOUGH * half_life))
            self._counted = taken
            if hot is not None:
                fresh = fresh[~hot.holds(fresh)]
            if len(self.bounds) and len(fresh):
                new = self.counted(fresh)
                self.decayed = self.decayed * 0.5 ** (new.sum() / half_life) + new
            return self.decayed

    def skip(self) -> None:
        """Count nothing of what readers added until now."""
        with self._lock:
            self._counted = int(self.samples.taken[0])

    def counted(self, codes: Codes) -> Floats:
        """How many of the codes fall into each bucket."""
        bucket = ranks_in(self.bounds[1:], codes, False, self._engine)
        return np.bincount(bucket, minlength=len(self.bounds)).astype(np.float64)

    def signature(self, depths: Ints, hot: Hot | None = None) -> Signature:
        """Access shares of the buckets, as well as the sample tells them."""
        return shares_of(self.counts(hot), depths)


def shares_of(counts: Floats, depths: Ints) -> Signature:
    """Access shares from sampled counts.

    A count of a few is mostly noise, which would cost fits, so it is drawn to the mean of its neighbours on one side
    or the other, whichever is nearer: queries have ranges, and ranges have edges. What is then still 0 gets its share
    of the keys.
    """
    if len(counts) > 2 * NEIGHBOURS:
        first, last = np.full(NEIGHBOURS + 1, counts[0]), np.full(NEIGHBOURS, counts[-1])
        around = np.cumsum(np.concatenate([first, counts, last]))
        means = (around[NEIGHBOURS:] - around[:-NEIGHBOURS]) / NEIGHBOURS
        before, after = means[: len(counts)], means[-len(counts) :]
        near = np.clip(counts, np.minimum(before, after), np.maximum(before, after))
        doubt = DOUBTED / (DOUBTED + counts)
        counts = doubt * near + (1 - doubt) * counts
    return signature(counts, prior=depths, strength=0.5)


def rebucket(counts: Floats, starts: Ints, new_starts: Ints) -> Floats:
    """The counts of other buckets, taking accesses to be even inside a bucket.

    Args:
        counts: [buckets].
        starts: [buckets + 1], where the buckets begin.
        new_starts: where the new ones begin, on the same scale.
    """
    if len(counts) == 0:
        return np.zeros(len(new_starts) - 1)
    cumulated = np.concatenate([[0.0], np.cumsum(counts)])
    moved: Floats = np.maximum(np.diff(np.interp(new_starts, starts, cumulated)), 0.0)
    return moved
