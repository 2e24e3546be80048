"""Deltas: what changed since the immutable run was made, sorted by code.

A run has two, a small one of recent changes over a larger one of older changes. Each entry says by how much its code's
count differs from what is below: +2 copies, -1 (a tombstone), 0 (a value replaced). A rank in the index is then the
rank in the run plus the sums of what changed below the key. Deltas are immutable; a write makes a new small one, in
time proportional to both.

Most entries of a multiset say the same, one more copy of a code that was not there. Then `net`, `present` and `stamps`
are constants that take no memory, and only codes and places are copied.

A delta is searched by the rank that a key has in the run. The ranks are divided into windows, of which each knows its
first entry, and a summary of each window tells where in it there are entries: it answers most queries by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import ENTRY, FEW, SUMMARY, Codes, Ints, Mask, Values
from .engine import Engine, native
from .memory import pool
from .splicing import SPARE, Room, constant, flat, ranks_in, splice

MAX_STAMP = 1 << 62
FREE_COPIES = 1 << 20  #: that a saved delta may always add
WINDOW = 3  #: entries in a window on average, at most
Count = Callable[
    [Codes], tuple[Ints, Ints]
]  #: where each code is in the run, and how many keys below the delta have it


@dataclass(frozen=True, eq=False)
class Delta:
    """Changes of a run and of older deltas, sorted by code.

    Attributes:
        codes: distinct, ascending.
        left: where each is, or would be, in the run.
        net: the change in the number of keys of each code.
        present: how many there are below.
        values: of a map's entries; a tombstone's is filler. None for a multiset.
        stamps: of a map, the number of the write that made each entry, which tells those made during a merge from those
            before; of a multiset 0, as its counts tell that.
        engine: what splices its arrays.
    """

    codes: Codes
    left: Ints
    net: Ints
    present: Ints
    values: Values | None
    stamps: Ints
    engine: Engine

    @classmethod
    @cache
    def empty(cls, value_dtype: np.dtype[Any] | None, engine: Engine) -> Delta:
        """No changes, of a multiset (None) or of a map with values of a dtype."""
        none = np.zeros(0, dtype=np.int64)
        values = None if value_dtype is None else np.zeros(0, dtype=value_dtype)
        return cls(np.zeros(0, dtype=np.uint64), none, none, none, values, none, engine)

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def counts(self) -> Ints:
        """How many keys of each code are in the index."""
        counts: Ints = self.present + self.net
        return counts

    @cached_property
    def alive(self) -> NDArray[np.uint8]:
        """1 for codes that are in the index, 0 for tombstones."""
        return (self.counts > 0).astype(np.uint8)

    @cached_property
    def shifts(self) -> Ints:
        """[entries + 1]: by how much the first j entries shift the ranks after them."""
        shifts = np.zeros(len(self) + 1, dtype=np.int64)
        np.cumsum(self.net, out=shifts[1:])
        return shifts

    @cached_property
    def shift(self) -> int:
        """By how much all entries together shift ranks."""
        return int(self.net.sum())

    @cached_property
    def windows(self) -> tuple[int, NDArray[np.uint32]]:
        """log2 of the ranks that a window has, and where in the delta each begins. O(entries)."""
        n, d = int(self.left[-1]) + 1 if len(self) else 1, len(self)
        bits = max(0, (n * WINDOW // max(d, 1)).bit_length() - 1)
        windows = pool.empty((n >> bits) + 2, np.dtype(np.uint32))
        native.find_windows(self.left, bits, windows)
        return bits, windows

    @cached_property
    def packed(self) -> tuple[NDArray[Any], Ints, NDArray[np.uint32], NDArray[Any], int]:
        """What C searches: ENTRY [entries + FEW], `left`, where windows begin, SUMMARY of each, log2 of their ranks."""
        bits, windows = self.windows
        entries, summaries = pool.empty(len(self) + FEW, ENTRY), pool.empty(len(windows) - 1, SUMMARY)
        net, present = np.ascontiguousarray(self.net), np.ascontiguousarray(self.present)
        native.pack_delta(self.codes, net, present, self.left, bits, windows, entries, summaries)
        return entries, self.left, windows, summaries, bits

    def below(self, codes: Codes, left: Ints | None = None) -> tuple[Ints, Mask]:
        """How many of this delta's codes are below each of others, and which of these it has.

        Where these are `left` in the run tells the windows to look into, which takes less time once there are windows.
        """
        if left is None or self.engine == "numpy":
            below = ranks_in(self.codes, codes, False, self.engine)
        else:
            below = np.empty(len(codes), dtype=np.int64)
            native.codes_below(self.codes, *self.windows, codes, left, below)
        both: Mask = np.zeros(len(codes), dtype=np.bool_)
        inside = below < len(self)
        both[inside] = self.codes[below[inside]] == codes[inside]
        return below, both

    def _kept(self, keep: Mask) -> Delta:
        if keep.all():
            return self
        values = None if self.values is None else self.values[keep]
        left, net, present, stamps = (part[keep] for part in (self.left, self.net, self.present, self.stamps))
        return Delta(self.codes[keep], left, net, present, values, stamps, self.engine)

    def _without_noops(self) -> Delta:
        """Without entries that say what the run says."""
        return self._kept((self.net != 0) if self.values is None else (self.counts > 0) | (self.present > 0))


def is_compact(net: Ints, n: int) -> bool:
    """Whether a delta of a run of n keys adds about as many copies as there are keys and entries, or few.

    Other deltas are merged before they are saved: how much memory an index takes then follows from its file's size.
    """
    return float(np.maximum(net, 0).sum(dtype=np.float64)) <= n + len(net) + FREE_COPIES


def add_counts(delta: Delta, codes: Codes, change: Ints, count: Count) -> Delta:
    """A multiset's delta with more or fewer keys of some codes, which are distinct and ascending; no change is 0."""
    left, present = count(codes)
    none = constant(0, len(codes))
    return stacked(delta, Delta(codes, left, flat(change), flat(present), None, none, delta.engine))


def stacked(older: Delta, newer: Delta) -> Delta:
    """One delta with the changes of both, the newer ones having been made after the others."""
    joined, first = _join(older, newer)
    if first is None:
        return joined
    net, last = np.add.reduceat(joined.net, first), _last_of_each(first, len(joined))
    values = None if joined.values is None else joined.values[last]
    parts = (joined.codes[first], joined.left[first], net, joined.present[first], values, joined.stamps[last])
    return Delta(*parts, older.engine)._without_noops()


def put(delta: Delta, codes: Codes, alive: bool, values: Values, stamp: int, count: Count) -> Delta:
    """A map's delta with some codes, distinct and ascending, set to values or (`alive` False) deleted."""
    (left, present), stamps = count(codes), np.full(len(codes), stamp)
    joined, first = _join(delta, Delta(codes, left, int(alive) - present, present, values, stamps, delta.engine))
    if first is None:
        return joined if alive else joined._without_noops()
    last = np.zeros(len(joined), dtype=np.bool_)
    last[_last_of_each(first, len(joined))] = True
    return joined._kept(last)._without_noops()


def changes_after(delta: Delta, merged: Delta, count: Count) -> Delta:
    """What `delta` changed after `merged`, an earlier state of it, became part of the run that `count` counts in.

    An entry of `merged` that is not in `delta` was undone in between, and has to be undone in the new run.
    """
    is_map = delta.values is not None
    earlier = merged if is_map else replace(merged, net=-merged.net)
    joined, first = _join(earlier, delta)
    if first is None:
        first = np.arange(len(joined))
    last = _last_of_each(first, len(joined))
    if is_map:
        both = last > first
        undone = ~both & _contains(merged.codes, joined.codes[last])
        changed = ~both | (joined.stamps[first] != joined.stamps[last])
        last, undone = last[changed], undone[changed]
    codes, stamps = joined.codes[last], joined.stamps[last]
    left, present = count(codes)
    if is_map:
        net = ((joined.counts[last] > 0) & ~undone) - present
    else:
        net = np.add.reduceat(joined.net, first) if len(first) else joined.net
    values = None if joined.values is None else joined.values[last]
    return Delta(codes, left, net, present, values, stamps, delta.engine)._without_noops()


def merge(codes: Codes, values: Values | None, delta: Delta) -> Room:
    """The run with its delta in it, and room for more keys: memory that is not written to is not taken."""
    left = delta.left
    values = _with_replaced(values, delta)
    if (delta.net < 0).any():
        gone = np.maximum(-delta.net, 0)
        kept = np.ones(len(codes), dtype=np.bool_)
        kept[np.repeat(left, gone) + _places_in_groups(gone)] = False
        codes, values = codes[kept], None if values is None else values[kept]
        left = left - (np.cumsum(gone) - gone)
    added, more_codes, more_values = left, delta.codes, delta.values
    if not (delta.net == 1).all():
        more = np.maximum(delta.net, 0)
        each = np.repeat(np.arange(len(delta)), more)
        added, more_codes = left[each], delta.codes[each]
        more_values = None if delta.values is None else delta.values[each]
    at = added + np.arange(len(added))
    length = len(codes) + len(added)
    new_codes = splice(codes, at, more_codes, delta.engine, length // SPARE)
    if values is None or more_values is None:
        return Room((new_codes, None), length)
    return Room((new_codes, splice(values, at, more_values, delta.engine, length // SPARE)), length)


def _with_replaced(values: Values | None, delta: Delta) -> Values | None:
    replaced = delta.net == 0
    if values is None or delta.values is None or not replaced.any():
        return values
    values = values.copy()
    values[delta.left[replaced]] = delta.values[replaced]
    return values


def _places_in_groups(counts: Ints) -> Ints:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, and so on."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _join(a: Delta, b: Delta) -> tuple[Delta, Ints | None]:
    """The entries of both in order, of equal codes a's first, and where each code's first entry is: None if none is
    in both, as most are not."""
    after, both = a.below(b.codes, b.left if "windows" in a.__dict__ else None)
    after += both
    at = after + np.arange(len(b))
    codes = splice(a.codes, at, b.codes, a.engine)
    values = None if a.values is None or b.values is None else splice(a.values, at, b.values, a.engine)
    pairs = ((a.left, b.left), (a.net, b.net), (a.present, b.present), (a.stamps, b.stamps))
    left, net, present, stamps = (splice(old, at, new, a.engine) for old, new in pairs)
    joined = Delta(codes, left, net, present, values, stamps, a.engine)
    if not both.any():
        return joined, None
    first = np.ones(len(codes), dtype=np.bool_)
    first[at[both]] = False
    return joined, np.flatnonzero(first)


def _last_of_each(first: Ints, n: int) -> Ints:
    return np.append(first[1:], n) - 1 if len(first) else first


def _contains(codes: Codes, wanted: Codes) -> Mask:
    at = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    return codes[at] == wanted if len(codes) else np.zeros(len(wanted), dtype=np.bool_)
