"""The model of a sorted run: equi-depth buckets, each with a power-of-two number of linear leaves.

The root holds the keys that bound the buckets, all of equal depth (number of keys), so a binary search of it places
a query exactly. A bucket cuts its width into equal leaves; a leaf is a least-squares line from code to position.
Access statistics choose only *how many* leaves a bucket gets. The lines and their radii are of true ranks, so
statistics move time from one bucket to another and never an answer.

A bucket's leaves follow from the keys and their number alone. So fits are kept in a pool and shared by all models of
a run: a model that returns to leaf numbers it once had fits nothing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import BUCKET, Bits, Codes, Floats, Ints, parts_of, places_of
from .engine import Engine
from .fitting import fit_buckets

DEPTH = 2048  #: keys per bucket, until there are MAX_BUCKETS
MAX_BUCKETS = 16384
LEAF_KEYS = 32  #: keys per leaf before any query was seen
MIN_LEAF_KEYS = 8  #: keys per leaf below which the window is one cache line anyway
MAX_POOL = 8  #: a pool may hold that many times the leaves in use, for workloads that return
MAX_BITS = 20  #: log2 of the most leaves that a bucket may get


class LeafPool:
    """The leaves of all fits of one run, as rows of base, slope and radius. Rows once written never change.

    Attributes:
        rows: float32 [capacity, 3].
        used: how many rows hold leaves.
        first_rows: int64 [buckets, MAX_BITS + 1], where a bucket's fit with 2**bits leaves begins, -1 if not fitted.
    """

    def __init__(self, rows: NDArray[np.float32], used: int, first_rows: Ints) -> None:
        self.rows, self.used, self.first_rows = rows, used, first_rows
        self.lock = threading.Lock()  # indexes that share a run may refit at the same time

    @classmethod
    def empty(cls, buckets: int, capacity: int) -> LeafPool:
        """A pool without leaves that has room for `capacity` of them."""
        return cls(np.empty((capacity, 3), np.float32), 0, np.full((buckets, MAX_BITS + 1), -1, np.int64))

    def reserve(self, buckets: Ints, bits: Bits) -> tuple[NDArray[np.float32], Ints]:
        """The next rows, for fits with 2**bits leaves, and where each begins; `publish` them when they are written."""
        sizes = np.int64(1) << bits.astype(np.int64)
        places = self.used + np.cumsum(sizes) - sizes
        return self.rows[self.used : self.used + int(sizes.sum())], places

    def publish(self, buckets: Ints, bits: Bits, places: Ints) -> None:
        """Make fits findable whose leaves were written to reserved rows."""
        self.first_rows[buckets, bits] = places
        self.used += int((np.int64(1) << bits.astype(np.int64)).sum())


@dataclass(frozen=True, eq=False)
class Model:
    """One choice of leaves for the buckets of a run. Immutable; other choices share its pool.

    Attributes:
        bounds: uint64 [buckets], the first code of each.
        buckets: BUCKET [buckets + 1], with one that only says where the last one ends.
        bits: uint8 [buckets], log2 of the number of leaves.
    """

    bounds: Codes
    buckets: NDArray[Any]
    bits: Bits
    pool: LeafPool

    @property
    def starts(self) -> Ints:
        """int64 [buckets + 1]: where each bucket begins in the run."""
        starts: Ints = self.buckets["start"]
        return starts

    @property
    def depths(self) -> Ints:
        """int64 [buckets]: how many keys each bucket has."""
        return np.diff(self.starts)

    @cached_property
    def leaves(self) -> int:
        """How many leaves this model uses; the pool may hold more."""
        return leaf_count(self.bits)

    def reaching(self, end: int) -> Model:
        """The model with the last bucket ending there: it takes in keys that it was not fitted to."""
        buckets = self.buckets.copy()
        buckets["start"][-1] = end
        return Model(self.bounds, buckets, self.bits, self.pool)

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays, those of leaves in the pool that are not in use included."""
        return self.bounds.nbytes + self.buckets.nbytes + self.bits.nbytes + self.pool.rows.nbytes

    def radii(self) -> tuple[Floats, Ints]:
        """The error radius of every leaf in use, and the bucket that it belongs to."""
        counts = np.int64(1) << self.bits.astype(np.int64)
        bucket = np.repeat(np.arange(len(self.bits)), counts)
        first, _ = parts_of(self.buckets["place"][:-1])
        row = np.arange(len(bucket)) - np.repeat(np.cumsum(counts) - counts, counts) + first[bucket]
        return self.pool.rows[row, 2].astype(np.float64), bucket


def leaf_count(bits: Bits) -> int:
    """How many leaves buckets with `1 << bits` leaves have together."""
    return int((np.int64(1) << bits.astype(np.int64)).sum())


def build(keys: Codes, engine: Engine, shares: Floats | None = None) -> Model:
    """The model of a sorted run; `shares` are the access shares of its buckets, if any are known."""
    starts = bucket_starts(len(keys))
    buckets = np.zeros(len(starts), dtype=BUCKET)
    buckets["start"] = starts
    bounds = keys[starts[:-1]]
    buckets["low"][:-1] = bounds
    bits = choose_bits(np.diff(starts), shares)
    buckets["scale"][:-1] = bucket_scales(keys, starts, bits)
    pool = LeafPool.empty(len(bounds), 2 * leaf_count(bits) + 64)
    return refit(Model(bounds, buckets, bits, pool), keys, bits, engine)[0]


def bucket_starts(n: int) -> Ints:
    """Where equi-depth buckets of n keys begin, and n."""
    if n == 0:
        return np.zeros(1, dtype=np.int64)
    count = min(MAX_BUCKETS, -(-n // DEPTH))
    return np.arange(count + 1, dtype=np.int64) * n // count


def choose_bits(depths: Ints, shares: Floats | None = None, current: Bits | None = None) -> Bits:
    """log2 of each bucket's number of leaves, by access-weighted mass, within the same number of leaves in all.

    A bucket's weight is its share of the keys times the square root of its access density: full weighting would
    starve the cold buckets, whose windows then outgrow the cache. A bucket keeps its current number unless the ideal
    one is clearly another, lest the noise of sampling cause refits, and more so if it is less: that saves no time.
    """
    if len(depths) == 0:
        return np.zeros(0, dtype=np.uint8)
    weights = depths / depths.sum()
    if shares is not None:
        weights = np.sqrt(weights * shares)
    ideal = np.log2(np.maximum(depths.sum() / LEAF_KEYS * weights / weights.sum(), 1.0))
    bits = np.floor(ideal + 0.5)
    if current is not None:
        bits = np.where((ideal < current + 0.75) & (ideal > current - 1.25), current, bits)
    most = np.clip(np.ceil(np.log2(depths / MIN_LEAF_KEYS)), 0, MAX_BITS)
    chosen: Bits = np.minimum(bits, most).astype(np.uint8)
    return chosen


def refit(model: Model, keys: Codes, bits: Bits, engine: Engine) -> tuple[Model, Ints]:
    """The model with other numbers of leaves, and the buckets that had to be fitted for it.

    What the pool holds is not fitted again. A pool that is full is left to the models that use it, for a larger one,
    or when it has become many times what is in use, for one of the fits in use.
    """
    with model.pool.lock:
        return _refit(model, keys, bits, engine)


def _refit(model: Model, keys: Codes, bits: Bits, engine: Engine) -> tuple[Model, Ints]:
    pool = model.pool
    each = np.arange(len(bits))
    scales = np.ldexp(model.buckets["scale"][:-1], bits.astype(np.int32) - model.bits)  # exact
    first = pool.first_rows[each, bits]
    missing = np.flatnonzero(first < 0)
    if len(missing):
        more = leaf_count(bits[missing])
        if pool.used + more > len(pool.rows):
            keep = pool.used + more <= MAX_POOL * leaf_count(bits)
            pool = _enlarged_pool(pool, more) if keep else _fresh_pool(pool, bits)
        rows, places = pool.reserve(missing, bits[missing])
        ends = np.stack([model.starts[missing], model.starts[missing + 1]], axis=1)
        fit_buckets(keys, ends, scales[missing], bits[missing], rows, engine)
        pool.publish(missing, bits[missing], places)
        first = pool.first_rows[each, bits]
    buckets = model.buckets.copy()
    buckets["scale"][:-1] = scales
    buckets["place"][:-1] = places_of(first, bits)
    return Model(model.bounds, buckets, bits, pool), missing


def extended(model: Model, keys: Codes, engine: Engine) -> Model:
    """The model with its last bucket, which has taken in more keys, divided into as many as it is deep, and fitted.

    The other buckets and their fits stay as they are. What room the pool has goes to the model that is made.
    """
    kept, start = len(model.bits) - 1, int(model.starts[-2])
    depth = max(DEPTH, start // max(kept, 1))
    count = -(-(len(keys) - start) // depth)
    starts = start + np.arange(count + 1, dtype=np.int64) * (len(keys) - start) // count
    bits = choose_bits(np.diff(starts))
    buckets = np.zeros(kept + count + 1, dtype=BUCKET)
    buckets[:kept] = model.buckets[:kept]
    buckets["start"][kept:] = starts
    buckets["low"][kept:-1] = keys[starts[:-1]]
    buckets["scale"][kept:-1] = bucket_scales(keys, starts, bits)
    pool = model.pool
    with pool.lock:
        first_rows = np.full((kept + count, MAX_BITS + 1), -1, np.int64)
        first_rows[:kept] = pool.first_rows[:kept]
        longer = LeafPool(pool.rows, pool.used, first_rows)
        pool.rows = pool.rows[: pool.used]
    bits = np.append(model.bits[:kept], bits)
    return refit(Model(np.ascontiguousarray(buckets["low"][:-1]), buckets, bits, longer), keys, bits, engine)[0]


def bucket_scales(keys: Codes, starts: Ints, bits: Bits) -> Floats:
    """Leaves per unit of code. A bucket's width reaches to the first key of the next, which it serves as well."""
    if len(bits) == 0:
        return np.zeros(0)
    last = np.minimum(starts[1:], len(keys) - 1)
    width = (keys[last] - keys[starts[:-1]]).astype(np.float64)
    return np.divide(np.ldexp(1.0, bits.astype(np.int32)), width, out=np.zeros(len(bits)), where=width > 0)


def _enlarged_pool(pool: LeafPool, more: int) -> LeafPool:
    """A pool with the fits of another and room for as many again, `more` among them."""
    rows = np.empty((2 * (pool.used + more), 3), dtype=np.float32)
    rows[: pool.used] = pool.rows[: pool.used]
    return LeafPool(rows, pool.used, pool.first_rows.copy())


def _fresh_pool(pool: LeafPool, bits: Bits) -> LeafPool:
    """A pool with room for twice what `bits` asks, and of another pool's fits only those that `bits` asks."""
    fresh = LeafPool.empty(len(bits), 2 * leaf_count(bits) + 64)
    known = np.flatnonzero(pool.first_rows[np.arange(len(bits)), bits] >= 0)
    if len(known):
        sizes = np.int64(1) << bits[known].astype(np.int64)
        rows, places = fresh.reserve(known, bits[known])
        source = np.repeat(pool.first_rows[known, bits[known]] - places, sizes) + np.arange(len(rows))
        rows[:] = pool.rows[source]
        fresh.publish(known, bits[known], places)
    return fresh
