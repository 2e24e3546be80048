"""Views: what readers of one state search in. One in C, one in NumPy, which answer alike."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .arrays import CHANGED_LEAF, Bits, Codes, Floats, Ints, Mask, Values, parts_of
from .delta import Delta, stacked
from .engine import Engine, native
from .fitting import BATCH
from .heat import SAMPLING
from .hot import NO_LINES, no_learner
from .keytype import KeyType
from .memory import pool
from .run import Run
from .splicing import ranks_in
from .steps import Steps
from .values import is_plain

Deltas = tuple[Delta, Delta]  #: of older changes and of recent ones
Scanned = tuple[NDArray[Any], ...]  #: what a scan fills: codes, and for values what `State.new_items` says
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

    def find_many(self, codes: Codes, present: Mask, layers: Bits = ..., positions: Ints = ..., /) -> None:
        """Whether each code is in the index; and where, if asked: in which layer, at which position.

        Layer 0 is the run, 1 the older delta and 2 the recent one.
        """

    def count_many(self, codes: Codes, ranks: Ints, counts: Ints, /) -> None:
        """The rank of each code in the run, and how many keys of it equal the code."""

    def select(self, rank: int, /) -> int | None:
        """The code of a rank, negative ones counted from the end; None if there is none."""

    def neighbour(self, key: object, right: bool, offset: int, /) -> int | None:
        """The code `offset` ranks from the key's left or right rank; None if there is none."""

    def count(self, low: object, high: object, /) -> int:
        """How many keys are from `low` on and below `high`."""

    def scan(
        self, low: object, high: object, limit: int, most: int, new: Callable[[int], Scanned], /
    ) -> tuple[Scanned, list[tuple[int, Any]]] | None:
        """Fill the arrays that `new` makes for so many keys with the first `limit` from `low` on and below `high`.

        None leaves an end open. The answer is None if these are more than `most` keys, else the arrays, and pairs of
        a place and the value that belongs there.
        """

    def within_error_bounds(self) -> bool:
        """Whether every key of the run lies within the error bound that its leaf states."""


def make_view(engine: Engine, key_type: KeyType, run: Run, deltas: Deltas, leaves: NDArray[Any] | None = None) -> View:
    """A view of a run and its deltas, the older one first; perhaps with leaves that tell of both."""
    if engine == "numpy":
        return NumpyView(key_type, run, deltas)
    model, dtype, (older, recent) = run.model, key_type.dtype, deltas
    lines, learner, lacks, least = NO_LINES, no_learner(), 0, 0
    if run.hot is not None:
        lines, learner, lacks, least = run.hot.lines, run.hot.learner, run.hot.lacks, run.hot.least
    (*arrays, bits), (*last_arrays, last_bits) = older.packed, recent.packed
    return native.View(
        dtype.kind,
        dtype.itemsize,
        key_type.cut_one,
        key_type.lexicon,
        SAMPLING,
        *(run.codes, model.bounds, model.buckets, model.pool.rows if leaves is None else leaves, lines),
        *(*arrays, *last_arrays),
        *(run.heat.samples.codes, run.heat.samples.taken),
        *(learner.lines, learner.notes, learner.reach, lacks, least),
        *(run.values, older.values, recent.values),
        *(bits, last_bits),
        *_bytes_of(run.values, older.values, recent.values),
    )


def _bytes_of(*values: Values | None) -> tuple[Any, ...]:
    """The bytes of a map's plain values, and of how many a value is; Nones and 0 for others."""
    if values[0] is None or not is_plain(values[0].dtype):
        return None, None, None, 0
    return *(array.view(np.uint8) for array in values if array is not None), values[0].dtype.itemsize


def telling(engine: Engine, key_type: KeyType, run: Run, deltas: Deltas) -> View:
    """A view of a run, which has keys, and its deltas, whose leaves tell of both. O(changes + leaves)."""
    silent = make_view(engine, key_type, run, deltas)
    if engine == "numpy":
        return silent
    leaves = pool.empty(len(run.model.pool.rows), CHANGED_LEAF)
    native.tell_leaves(silent, leaves)
    return make_view(engine, key_type, run, deltas, leaves)


class NumpyView(View):
    """A view without the C extension: windows of all queries of a batch are halved together."""

    engine: Engine = "numpy"  #: what searches the deltas

    def __init__(self, key_type: KeyType, run: Run, deltas: Deltas) -> None:
        self._cut, self.run, self.deltas = key_type.cut_one, run, deltas
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
            return len(self.codes) + sum(delta.shift for delta in self.deltas)
        self._sample_one(code)
        return self._rank_of(code + (right and exact), in_run=False)  # a Python int: nothing wraps

    def _rank_of(self, query: int, in_run: bool) -> int:
        deltas = () if in_run else self.deltas
        shifts = (delta.shifts[bisect_left(memoryview(delta.codes), query)] for delta in deltas)
        return self._run_rank(query) + int(sum(shifts))

    def _find(self, key: object) -> tuple[Any, int] | None:
        code, exact = self._cut(key)
        return None if code is None or not exact else self._find_code(code)

    def _find_code(self, code: int) -> tuple[Any, int] | None:
        """The values among which a code's is, and its position there; None if the code is absent."""
        self._sample_one(code)
        for delta in reversed(self.deltas):
            entry = bisect_left(memoryview(delta.codes), code)
            if entry < len(delta) and delta.codes[entry] == code:
                return (delta.values, entry) if delta.counts[entry] else None
        rank = self._run_rank(code)
        return (self.run.values, rank) if rank < len(self.codes) and self.codes[rank] == code else None

    # ---- ranges and ranks, of all changes together

    def select(self, rank: int, /) -> int | None:
        n = len(self.codes) + self._changes.shift
        return int(self._codes_at(np.array([rank % n]))[0]) if -n <= rank < n else None

    def neighbour(self, key: object, right: bool, offset: int, /) -> int | None:
        rank = self._rank(key, right) + offset
        return self.select(rank) if rank >= 0 else None

    def count(self, low: object, high: object, /) -> int:
        return max(0, self.left(high) - self.left(low))

    def scan(
        self, low: object, high: object, limit: int, most: int, new: Callable[[int], Scanned], /
    ) -> tuple[Scanned, list[tuple[int, Any]]] | None:
        first = 0 if low is None else self.left(low)
        last = len(self.codes) + self._changes.shift if high is None else self.left(high)
        last = min(last, first + limit)
        if last - first > most:
            return None
        ranks = np.arange(first, last)
        arrays = new(len(ranks))
        arrays[0][:] = self._codes_at(ranks)
        if len(arrays) > 1:
            arrays[1][:] = self._at(self.run.values, self._changes.values, ranks)
        return arrays, []

    @cached_property
    def _changes(self) -> Delta:
        return stacked(*self.deltas)

    @cached_property
    def _first_ranks(self) -> Ints:
        """The rank in the index of the first key that each change is about."""
        ranks: Ints = self._changes.left + self._changes.shifts[:-1]
        return ranks

    def _codes_at(self, ranks: Ints) -> Codes:
        return self._at(self.codes, self._changes.codes, ranks)

    def _at(self, run: Any, changed: Any, ranks: Ints) -> NDArray[Any]:
        """The items of these ranks in two arrays, of the run and of the changes."""
        delta = self._changes
        if len(delta) == 0:
            items: NDArray[Any] = run[ranks]
            return items
        entry = np.searchsorted(self._first_ranks, ranks, side="right") - 1
        inside = np.maximum(entry, 0)
        in_delta = (entry >= 0) & (ranks < self._first_ranks[inside] + delta.counts[inside])
        items = np.empty(len(ranks), dtype=run.dtype)
        items[in_delta] = changed[inside[in_delta]]
        items[~in_delta] = run[(ranks - delta.shifts[entry + 1])[~in_delta]]
        return items

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
        for delta in () if in_run else self.deltas:
            if len(delta):
                entry = ranks_in(delta.codes, queries, False, self.engine)
                ranks += delta.shifts[np.where(past, len(delta), entry)]

    def find_many(
        self, codes: Codes, present: Mask, layers: Bits | None = None, positions: Ints | None = None, /
    ) -> None:
        if len(codes) == 1 and positions is None:
            present[0] = self._find_code(int(codes[0])) is not None
            return
        self._sample(codes)
        rank = self._run_ranks(codes)
        present[:] = _equal_at(self.codes, rank, codes)
        layer = np.zeros(len(codes), dtype=np.uint8)
        for number, delta in enumerate(self.deltas, 1):
            entry = ranks_in(delta.codes, codes, False, self.engine)
            changed = _equal_at(delta.codes, entry, codes)
            present[changed] = delta.counts[entry[changed]] > 0
            rank[changed], layer[changed] = entry[changed], number
        if layers is not None and positions is not None:
            layers[:], positions[:] = layer, rank

    def count_many(self, codes: Codes, ranks: Ints, counts: Ints, /) -> None:
        ranks[:] = self._run_ranks(codes)
        counts[:] = _equal_at(self.codes, ranks, codes)
        again = _equal_at(self.codes, ranks + 1, codes)
        counts[again] = np.searchsorted(self.codes, codes[again], side="right") - ranks[again]

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

    def __init__(self, steps: Steps, key_type: KeyType, run: Run, deltas: Deltas, engine: Engine) -> None:
        super().__init__(key_type, run, deltas)
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
