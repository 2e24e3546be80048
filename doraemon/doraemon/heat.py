"""Heat: how often each bucket was searched, sampled and decayed."""

from __future__ import annotations

import threading

import numpy as np

from .arrays import Floats, Ints
from .workload import Signature, signature

SAMPLING = 32  #: one access in so many is counted
HALF_LIFE = 8  #: counts per bucket after which an older one weighs half
DOUBTED = 8  #: a count that is believed as much as its neighbours are
NEIGHBOURS = 8  #: buckets on each side


class Heat:
    """Access counts of one run's buckets.

    Time is measured in accesses, not seconds: an idle index forgets nothing.

    Attributes:
        hits: uint64 [buckets], what readers add to, one in SAMPLING of their accesses.
        decayed: float64 [buckets], what was counted before, older counts weighing less.
    """

    def __init__(self, buckets: int, decayed: Floats | None = None) -> None:
        self.hits = np.zeros(buckets, dtype=np.uint64)
        self.decayed = np.zeros(buckets) if decayed is None else decayed
        self._lock = threading.Lock()

    def counts(self) -> Floats:
        """The decayed counts, with what readers added until now."""
        with self._lock:
            taken = self.hits.copy()
            self.hits -= taken  # a reader in between may lose a sample; it is only a sample
            new = taken.astype(np.float64)
            self.decayed = self.decayed * 0.5 ** (new.sum() / (HALF_LIFE * max(len(new), 256))) + new
            return self.decayed

    def signature(self, depths: Ints) -> Signature:
        """Access shares of the buckets, as well as the sample tells them."""
        return shares_of(self.counts(), depths)


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
