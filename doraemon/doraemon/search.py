"""Views: what readers of one state search in. One in C, one in NumPy, which answer alike."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Protocol

import numpy as np

from .arrays import Codes, Floats, Ints, Mask, parts_of
from .delta import Delta
from .engine import Engine, native
from .fitting import BATCH
from .heat import SAMPLING
from .hot import NO_LINES
from .keytype import KeyType
from .run import Run
from .splicing import ranks_in
from .steps import Steps

SMALL = 64  #: batches below this are left to np.searchsorted, whose one call costs less than ours


class View(Protocol):
    """What both engines offer: answers to single keys of any type, and to batches of codes in arrays that are given."""

    def left(self, key: object, /) -> int:
        """How many keys are below the key."""

    def right(self, key: object, /) -> int:
        """How many keys are not above the key."""

    def contains(self, key: object, /) -> bool:
        """Whether the key is in the index."""

    def get(self, key: object, default: Any, /) -> Any:
        """A map's value for the key, the default if it is absent."""

    def ranks(self, codes: Codes, right: bool, in_run: bool, ranks: Ints, /) -> None:
        """How many keys of the index, or of its run alone, are below each code, or (`right`) not above it."""

    def find_many(self, codes: Codes, present: Mask, in_delta: Mask = ..., positions: Ints = ..., /) -> None:
        """Whether each code is in the index; and where, if asked: in the delta or in the run, at which position."""

    def within_error_bounds(self) -> bool:
        """Whether every key of the run lies within the error bound that its leaf states."""


def make_view(engine: Engine, key_type: KeyType, run: Run, delta: Delta) -> View:
    """A view of a run and its delta."""
    if engine == "numpy":
        return NumpyView(key_type, run, delta)
    model, dtype = run.model, key_type.dtype
    lines = NO_LINES if run.hot is None else run.hot.lines
    searched = (run.codes, model.bounds, model.buckets, model.pool.rows, delta.codes, delta.shifts, delta.alive, lines)
    samples = (run.heat.samples.codes, run.heat.samples.taken)
    return native.View(
        dtype.kind, dtype.itemsize, key_type.cut_one, SAMPLING, *searched, *samples, run.values, delta.values
    )


class NumpyView(View):
    """A view without the C extension: windows of all queries of a batch are halved together."""

    engine: Engine = "numpy"  #: what searches the delta

    def __init__(self, key_type: KeyType, run: Run, delta: Delta) -> None:
        self._cut, self.run, self.delta = key_type.cut_one, run, delta
        self.codes, self.model, self.samples = run.codes, run.model, run.heat.samples
        self._random = np.random.default_rng()

    # ---- single keys

    def left(self, key: object, /) -> int:
        return self._rank(key, right=False)

    def right(self, key: object, /) -> int:
        return self._rank(key, right=True)

    def contains(self, key: object, /) -> bool:
        return self._find(key) is not None

    def get(self, key: object, default: Any, /) -> Any:
        found = self._find(key)
        return default if found is None else found[0][found[1]]

    def _rank(self, key: object, right: bool) -> int:
        code, exact = self._cut(key)
        if code is None:
            return len(self.codes) + int(self.delta.shifts[-1])
        self._sample_one(code)
        return self._rank_of(code + (right and exact), in_run=False)  # a Python int: nothing wraps

    def _rank_of(self, query: int, in_run: bool) -> int:
        shift = 0 if in_run else self.delta.shifts[bisect_left(memoryview(self.delta.codes), query)]
        return self._run_rank(query) + int(shift)

    def _find(self, key: object) -> tuple[Any, int] | None:
        code, exact = self._cut(key)
        return None if code is None or not exact else self._find_code(code)

    def _find_code(self, code: int) -> tuple[Any, int] | None:
        """The values among which a code's is, and its position there; None if the code is absent."""
        self._sample_one(code)
        rank, entry = self._run_rank(code), bisect_left(memoryview(self.delta.codes), code)
        if entry < len(self.delta) and self.delta.codes[entry] == code:
            return (self.delta.values, entry) if self.delta.alive[entry] else None
        return (self.run.values, rank) if rank < len(self.codes) and self.codes[rank] == code else None

    # ---- batches; those of one code are answered like single keys, as NumPy's calls would take longer

    def ranks(self, codes: Codes, right: bool, in_run: bool, ranks: Ints, /) -> None:
        if not in_run:  # which writers ask for
            self._sample(codes)
        if len(codes) == 1:
            ranks[0] = self._rank_of(int(codes[0]) + right, in_run)
            return
        past = codes == np.uint64(2**64 - 1) if right else np.False_
        queries = codes + np.uint64(1) * ~past if right else codes
        ranks[:] = np.where(past, len(self.codes), self._run_ranks(queries)) if right else self._run_ranks(queries)
        if not in_run and len(self.delta):
            entry = ranks_in(self.delta.codes, queries, False, self.engine)
            ranks += self.delta.shifts[np.where(past, len(self.delta), entry)]

    def find_many(
        self, codes: Codes, present: Mask, in_delta: Mask | None = None, positions: Ints | None = None, /
    ) -> None:
        if len(codes) == 1 and positions is None:
            present[0] = self._find_code(int(codes[0])) is not None
            return
        self._sample(codes)
        rank, entry = self._run_ranks(codes), ranks_in(self.delta.codes, codes, False, self.engine)
        changed = _equal_at(self.delta.codes, entry, codes)
        present[:] = _equal_at(self.codes, rank, codes)
        present[changed] = self.delta.alive[entry[changed]]
        if in_delta is not None and positions is not None:
            in_delta[:], positions[:] = changed, np.where(changed, entry, rank)

    def within_error_bounds(self) -> bool:
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

    def _sample(self, codes: Codes) -> None:
        self.samples.add(codes[self._random.integers(SAMPLING) :: SAMPLING])

    def _sample_one(self, code: int) -> None:
        if self._random.random() < 1 / SAMPLING:
            self.samples.add(np.array([code], dtype=np.uint64))

    def _run_rank(self, query: int) -> int:
        if len(self.codes) == 0:
            return 0
        bucket = bisect_left(memoryview(self.model.bounds), query, 1) - 1
        starts = self.model.starts
        return bisect_left(memoryview(self.codes), query, int(starts[bucket]), int(starts[bucket + 1]))

    def _run_ranks(self, queries: Codes) -> Ints:
        if len(self.codes) == 0:
            return np.zeros(len(queries), dtype=np.int64)
        bucket = np.searchsorted(self.model.bounds[1:], queries)
        if len(queries) < SMALL:
            return np.searchsorted(self.codes, queries)
        low, high = self._windows(bucket, queries)
        return self._checked(queries, self._halve(queries, low, high), low, high)

    def _windows(self, bucket: Ints, queries: Codes) -> tuple[Ints, Ints]:
        """The window of ranks that each query's leaf leaves, at least one rank wide."""
        centre, radius = self._predicted(bucket, queries)
        start = self.model.starts[bucket]
        depth = self.model.starts[bucket + 1] - start
        low = start + np.clip(centre - radius, 0, depth).astype(np.int64)
        return low, start + np.clip(centre + radius + 1, 0, depth).astype(np.int64)

    def _predicted(self, bucket: Ints, queries: Codes) -> tuple[Floats, Floats]:
        """The rank in its bucket that each query's leaf predicts, and the error bound for keys of the run."""
        at = self.model.buckets[bucket]
        code = np.maximum(queries, at["low"]) - at["low"]
        first, count = parts_of(at["place"])
        leaves = count.astype(np.float64)
        t = np.minimum(code.astype(np.float64) * at["scale"], leaves)
        leaf = np.minimum(t, leaves - 1).astype(np.int64)
        base, slope, radius = self.model.pool.rows[first + leaf].T
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


class StepView(NumpyView):
    """Batches over a run of few distinct codes, for both engines. Its searches use no model and are not sampled."""

    def __init__(self, steps: Steps, key_type: KeyType, run: Run, delta: Delta, engine: Engine) -> None:
        super().__init__(key_type, run, delta)
        self.steps, self.engine = steps, engine

    def _sample(self, codes: Codes) -> None:
        pass  # a deliberate nothing: see the class

    def _run_ranks(self, queries: Codes) -> Ints:
        return self.steps.starts[ranks_in(self.steps.codes, queries, False, self.engine)]


def _equal_at(codes: Codes, rank: Ints, queries: Codes) -> Mask:
    """Whether the code at each rank is the query."""
    n = len(codes)
    if n == 0:
        return np.zeros(len(queries), dtype=np.bool_)
    equal: Mask = (rank < n) & (codes[np.minimum(rank, n - 1)] == queries)
    return equal
