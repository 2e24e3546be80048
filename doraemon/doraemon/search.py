"""Views: what readers search in. One in C, one in NumPy, with the same methods and the same answers."""

from __future__ import annotations

from bisect import bisect_left
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .delta import Delta
from .engine import Engine, native
from .fitting import BATCH
from .heat import SAMPLING
from .keys import Codes
from .model import Model
from .splicing import ranks
from .steps import Steps

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RUN, RANK, LOCATE = 0, 1, 2  #: what a batch is asked: rank in the run, in the index, or position of the very code
ABSENT, NOT_HERE = -1, -2  #: answers to single keys: not in the index; not a number that the view reads by itself
SMALL = 64  #: batches below this are left to np.searchsorted, whose one call costs less than ours


class View(Protocol):
    """What both engines offer."""

    def left(self, key: object, /) -> int: ...
    def right(self, key: object, /) -> int: ...
    def find(self, key: object, /) -> int: ...
    def search(self, asked: int, right: int, codes: Codes, out: Ints, /) -> None: ...
    def holds(self) -> bool: ...


def make_view(engine: Engine, kind: int, codes: Codes, model: Model, hits: NDArray[np.uint64], delta: Delta) -> View:
    """A view of a run, its model and its delta."""
    if engine == "numpy":
        return NumpyView(codes, model, hits, delta)
    rows = model.pool.rows
    return native.View(kind, codes, model.bounds, model.buckets, rows, hits, delta.codes, delta.moved, delta.alive)


class NumpyView:
    """The same search without the C extension: windows of all queries of a batch are halved together."""

    engine: Engine = "numpy"

    def __init__(self, codes: Codes, model: Model, hits: NDArray[np.uint64], delta: Delta) -> None:
        self.codes, self.model, self.hits, self.delta = codes, model, hits, delta
        self._random = np.random.default_rng()

    def left(self, key: object) -> int:
        """Single keys are mapped in Python."""
        return NOT_HERE

    right = find = left

    def search(self, asked: int, right: int, codes: Codes, out: Ints) -> None:
        """Answer a batch of codes; see the numbers above."""
        if len(codes) == 1:
            out[0] = self._search_one(asked, right, int(codes[0]))
            return
        past = codes == np.uint64(2**64 - 1) if right else np.False_
        queries = codes + np.uint64(1) * ~past if right else codes
        rank = self._run_ranks(queries)
        out[:] = np.where(past, len(self.codes), rank) if right else rank
        if asked == RUN or len(self.delta) == 0:
            out[:] = self._found_in_run(queries, out) if asked == LOCATE else out
            return
        entry = np.where(past, len(self.delta), ranks(self.delta.codes, queries, False, self.engine))
        out[:] = out + self.delta.moved[entry] if asked == RANK else self._locate(queries, out, entry)

    def holds(self) -> bool:
        """Whether the model's leaves lead to every key of the run, within the errors that they state."""
        starts = self.model.starts
        for first in range(0, len(self.codes), BATCH):
            rank = np.arange(first, min(first + BATCH, len(self.codes)))
            bucket = np.searchsorted(starts, rank, side="right") - 1
            codes = self.codes[rank]
            new = (rank == starts[bucket]) | (codes != self.codes[np.maximum(rank - 1, 0)])
            centre, radius = self._predicted(bucket[new], codes[new])
            if not (np.abs(centre - (rank - starts[bucket])[new]) <= radius).all():
                return False
        return True

    def _search_one(self, asked: int, right: int, query: int) -> int:
        query += right  # a Python int: nothing wraps
        rank = self._run_rank(query)
        entry = bisect_left(memoryview(self.delta.codes), query)
        if asked == RUN:
            return rank
        if asked == RANK:
            return rank + int(self.delta.moved[entry])
        if entry < len(self.delta) and self.delta.codes[entry] == query:
            return len(self.codes) + entry if self.delta.alive[entry] else ABSENT
        return rank if rank < len(self.codes) and self.codes[rank] == query else ABSENT

    def _run_rank(self, query: int) -> int:
        if len(self.codes) == 0:
            return 0
        bucket = bisect_left(memoryview(self.model.bounds), query, 1) - 1
        if self._random.random() < 1 / SAMPLING:
            self.hits[bucket] += np.uint64(1)
        starts = self.model.starts
        return bisect_left(memoryview(self.codes), query, int(starts[bucket]), int(starts[bucket + 1]))

    def _run_ranks(self, queries: Codes) -> Ints:
        if len(self.codes) == 0:
            return np.zeros(len(queries), dtype=np.int64)
        bucket = np.searchsorted(self.model.bounds[1:], queries)
        sampled = bucket[self._random.integers(SAMPLING) :: SAMPLING]
        np.add.at(self.hits, sampled, np.uint64(1))
        if len(queries) < SMALL:
            return np.searchsorted(self.codes, queries)
        low, high = self._windows(bucket, queries)
        return self._checked(queries, self._halve(queries, low, high), low, high)

    def _windows(self, bucket: Ints, queries: Codes) -> tuple[Ints, Ints]:
        """Where the leaves say that the ranks are; the window's width is at least 1."""
        centre, radius = self._predicted(bucket, queries)
        start = self.model.starts[bucket]
        depth = self.model.starts[bucket + 1] - start
        low = start + np.clip(centre - radius, 0, depth).astype(np.int64)
        return low, start + np.clip(centre + radius + 1, 0, depth).astype(np.int64)

    def _predicted(self, bucket: Ints, queries: Codes) -> tuple[Floats, Floats]:
        """The ranks in the buckets that the leaves say, and how far off those of keys may be."""
        at = self.model.buckets[bucket]
        code = np.maximum(queries, at["low"]) - at["low"]
        leaves = (np.uint64(1) << (at["place"] & np.uint64(0xFF))).astype(np.float64)
        t = np.minimum(code.astype(np.float64) * at["scale"], leaves)
        leaf = np.minimum(t, leaves - 1).astype(np.int64)
        base, slope, radius = self.model.pool.rows[(at["place"] >> np.uint64(8)).astype(np.int64) + leaf].T
        return base + slope * (t - leaf), radius

    def _halve(self, queries: Codes, low: Ints, high: Ints) -> Ints:
        """Binary search of every query in its own window."""
        low, size = low.copy(), high - low
        for _ in range(int(size.max()).bit_length()):
            half = size >> 1
            middle = np.minimum(low + half, len(self.codes) - 1)
            less = (self.codes[middle] < queries) & (size > 0)
            low = np.where(less, middle + 1, low)
            size = np.where(less, size - half - 1, half)
        return low

    def _checked(self, queries: Codes, rank: Ints, low: Ints, high: Ints) -> Ints:
        """Ranks on the edge of their window are proven by the key beyond it, or searched for without the model."""
        n = len(self.codes)
        before = (rank > 0) & (rank == low) & (self.codes[rank - 1] >= queries)
        after = (rank < n) & (rank == high) & (self.codes[np.minimum(rank, n - 1)] < queries)
        wrong = np.flatnonzero(before | after)
        rank[wrong] = np.searchsorted(self.codes, queries[wrong])
        return rank

    def _found_in_run(self, queries: Codes, rank: Ints) -> Ints:
        n = len(self.codes)
        if n == 0:
            return np.full(len(queries), ABSENT, dtype=np.int64)
        return np.where((rank < n) & (self.codes[np.minimum(rank, n - 1)] == queries), rank, ABSENT)

    def _locate(self, queries: Codes, rank: Ints, entry: Ints) -> Ints:
        inside = np.minimum(entry, len(self.delta) - 1)
        changed = (entry < len(self.delta)) & (self.delta.codes[inside] == queries)
        in_delta = np.where(self.delta.alive[inside] > 0, len(self.codes) + inside, ABSENT)
        return np.where(changed, in_delta, self._found_in_run(queries, rank))


class StepView(NumpyView):
    """Batches over a run of few distinct codes, for both engines. Its searches use no model and are not counted."""

    def __init__(
        self, steps: Steps, codes: Codes, model: Model, hits: NDArray[np.uint64], delta: Delta, engine: Engine
    ) -> None:
        super().__init__(codes, model, hits, delta)
        self.steps, self.engine = steps, engine

    def _run_ranks(self, queries: Codes) -> Ints:
        return self.steps.starts[ranks(self.steps.codes, queries, False, self.engine)]
