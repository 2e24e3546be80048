"""Accesses: what a few samples tell of a workload."""

from __future__ import annotations

import numpy as np

from .arrays import Codes
from .engine import native
from .run import Run
from .workload import Signature, signature

BINS = 256  #: of buckets beside each other, by which workloads are compared
LONG = 1 << 15  #: samples from which on fewer are counted where an estimate will do
FEWER = 3  #: log2 of how many times fewer codes these are


def spread_of(run: Run, codes: Codes) -> Signature:
    """The shares of the accesses in at most BINS stretches of the run."""
    buckets = len(run.heat.bounds)
    bins = np.linspace(0, buckets, min(BINS, buckets), endpoint=False, dtype=np.int64)
    return signature(np.add.reduceat(run.heat.counted(codes), bins))


def by_count(samples: Codes) -> tuple[Codes, float]:
    """The distinct samples, those that occur most often first; and the share of accesses to expect in them.

    That share is Good's and Turing's: what occurred once tells how often something new comes.
    """
    codes = np.empty(len(samples), dtype=np.uint64)
    distinct, once = native.tally(samples, 0, codes)
    return codes[:distinct], 1 - once / len(samples)


def repeated(samples: Codes, least: float) -> tuple[Codes, float]:
    """The same, but no codes if a larger share than this is unlikely: of many samples one code in eight tells."""
    if len(samples) >= LONG:
        _, once = native.tally(samples, FEWER, np.empty(len(samples), dtype=np.uint64))
        known = 1 - (once << FEWER) / len(samples)
        if known <= least:
            return samples[:0], known
    codes, known = by_count(samples)
    return codes if known > least else codes[:0], known
