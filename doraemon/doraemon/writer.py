"""Everything that changes an index: each change makes a new state and swaps it in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import adaptation
from .adaptation import Adaptation, Models
from .building import unique_last
from .delta import Delta, add_counts, put
from .keys import Codes
from .reader import Reader
from .state import State
from .values import values_like

Merging = Literal["inline", "background", "manual"]
_REQUIRED: Any = object()
MIN_DELTA = 4096  #: changes below which a delta is never too long to search
MERGE_COST = 1 << 16  #: what a merge costs beside its keys, in keys


class Writer(Reader):
    """Changes to an index. Writers take turns; readers go on with the state that they have.

    In the complexities, d is the number of changes since the last merge.
    """

    _OWN = Reader._OWN | {"_merging", "_lock", "_stamp", "_merger", "_copied"}

    def _restore(self, state: State, memory: Models, merging: Merging = "inline") -> None:
        if merging not in get_args(Merging):
            raise ValueError(f"merging {merging!r}: choose 'inline', 'background' or 'manual'")
        self._state, self._memory, self._merging = state, memory, merging
        self._lock = threading.RLock()  # writers take turns
        self._stamp = int(state.delta.stamps.max(initial=0))
        self._merger: threading.Thread | None = None
        self._copied = 0  # entries of deltas copied by changes since the last merge

    def _options(self) -> tuple[Merging]:
        return (self._merging,)

    def insert(self, key: Any, value: Any = _REQUIRED) -> None:
        """Add one key: another copy in a multiset; in a map a new one, KeyError if it is there. O(d).

        >>> from doraemon import Index
        >>> index = Index([1, 3])
        >>> index.insert(2)
        >>> index.keys()
        array([1, 2, 3])
        """
        with self._lock:
            if self.is_map and key in self:
                raise KeyError(f"{key!r} is in the map: use update() to replace its value")
            self._put_one(key, value)

    def update(self, key: Any, value: Any) -> None:
        """Set a map's value for the key, new or not; `index[key] = value` does the same. O(d).

        >>> from doraemon import Index
        >>> index = Index([1, 3], [10, 30])
        >>> index.update(3, 33)
        >>> int(index[3])
        33
        """
        self._require_values(self._state)
        self._put_one(key, value)

    __setitem__ = update

    def extend(self, keys: ArrayLike, values: ArrayLike | None = None) -> None:
        """Add many keys; in a map, set the values of many, the last of equal keys winning.

        O(k log k + d) for k keys, and from time to time a merge in O(n).

        >>> from doraemon import Index
        >>> index = Index([1, 3], [10, 30])
        >>> index.extend([3, 2], [33, 22])
        >>> index.values()
        array([10, 22, 33])
        """
        codes = self._state.key_type.encode_any(keys)
        if not self.is_map:
            if values is not None:
                raise TypeError("this index has keys only: extend it without values, or make it with values")
            self._add(codes, 1)
            return
        old = self._require_values(self._state)
        if values is None:
            raise TypeError("this index is a map: give a value for every key")
        new = values_like(values, old.dtype, len(codes))
        codes, last = unique_last(codes)
        self._change(lambda state, stamp: put(state.delta, codes, True, new[last], stamp, state.count_in_run))

    def discard(self, key: Any) -> bool:
        """Remove the key, one copy of it from a multiset; whether it was there. O(d).

        >>> from doraemon import Index
        >>> index = Index([1, 3, 3])
        >>> index.discard(3), index.discard(2), index.keys()
        (True, False, array([1, 3]))
        """
        with self._lock:
            if key not in self:
                return False
            codes = np.array([self._state.key_type.encode_one(key)], dtype=np.uint64)
            self._remove(codes)
            return True

    def discard_many(self, keys: ArrayLike) -> int:
        """Remove each key that is there, from a multiset one copy per time it is given; how many were removed.

        O(k log k + d) for k keys.

        >>> from doraemon import Index
        >>> index = Index([1, 3, 3, 5])
        >>> index.discard_many([3, 3, 3, 4, 5]), index.keys()
        (3, array([1]))
        """
        with self._lock:
            state = self._state
            cuts = state.key_type.cuts(keys)
            exact = np.ones(len(cuts.codes), np.bool_) if cuts.exact is None else cuts.exact
            codes = cuts.codes[exact if cuts.above is None else exact & ~cuts.above]
            self._remove(codes)
            return state.length - self._state.length

    def compact(self) -> None:
        """Merge all changes into the run, and fit the model for the accesses counted so far. O(n).

        >>> from doraemon import Index
        >>> index = Index([1, 3])
        >>> index.insert(2)
        >>> index.compact()
        >>> index.explain().delta_entries
        0
        """
        with self._lock:
            self._install(self._state.merged())

    def adapt(self) -> Adaptation:
        """Give the model's leaves to the buckets that are searched now, if the model says that it pays.

        Fits only buckets whose number of leaves changes, and none of them if a similar workload was known. Readers
        go on meanwhile. O(buckets + keys of the buckets fitted).

        >>> from doraemon import Index
        >>> Index(range(100)).adapt().reason
        'too few accesses were counted to tell'
        """
        with self._lock:
            self._state, report = adaptation.adapt(self._state, self._memory)
            return report

    # ---- how changes are made

    def _put_one(self, key: Any, value: Any) -> None:
        codes = np.array([self._state.key_type.encode_one(key)], dtype=np.uint64)
        if not self.is_map:
            if value is not _REQUIRED:
                raise TypeError("this index has keys only: insert the key without a value, or make it with values")
            self._add(codes, 1)
            return
        if value is _REQUIRED:
            raise TypeError("this index is a map: give a value with the key")
        one = values_like([value], self._require_values(self._state).dtype, 1)
        self._change(lambda state, stamp: put(state.delta, codes, True, one, stamp, state.count_in_run))

    def _add(self, codes: Codes, sign: int) -> None:
        codes, counts = np.unique(codes, return_counts=True)
        self._change(lambda state, stamp: add_counts(state.delta, codes, sign * counts, stamp, state.count_in_run))

    def _remove(self, codes: Codes) -> None:
        state = self._state
        codes, wanted = np.unique(codes, return_counts=True)
        if self.is_map:
            filler = np.zeros(len(codes), dtype=self._require_values(state).dtype)
            self._change(lambda state, stamp: put(state.delta, codes, False, filler, stamp, state.count_in_run))
            return
        there: NDArray[np.int64] = state.search(1, codes, right=True) - state.search(1, codes)
        taken = np.minimum(wanted, there)
        self._change(
            lambda state, stamp: add_counts(state.delta, codes[taken > 0], -taken[taken > 0], stamp, state.count_in_run)
        )

    def _change(self, changed: Callable[[State, int], Delta]) -> None:
        """Swap in the state with another delta, and merge if that has become long."""
        with self._lock:
            self._stamp += 1
            state = self._state
            self._state = state.with_delta(changed(state, self._stamp))
            self._copied += len(self._state.delta)
            if self._merging == "manual" or not self._merge_is_due():
                return
            if self._merging == "inline":
                self._install(self._state.merged())
            elif self._merger is None or not self._merger.is_alive():
                self._merger = threading.Thread(target=self._merge_in_background, daemon=True)
                self._merger.start()

    def _merge_is_due(self) -> bool:
        """Whether the delta is long, or single changes have copied it so often that merging would have been cheaper."""
        n, entries = len(self._state.run), len(self._state.delta)
        return entries >= max(MIN_DELTA, n // 16) or self._copied >= 2 * (n + MERGE_COST)

    def _merge_in_background(self) -> None:
        before = self._state
        merged = before.merged()  # takes long, and holds up nobody
        with self._lock:
            now = self._state
            if now.run.codes is not before.run.codes:
                return  # compact() was faster
            self._install(merged, now.after_merge(before, merged))

    def _install(self, merged: State, state: State | None = None) -> None:
        self._memory = adaptation.carry_over(self._memory, self._state, merged)
        self._state = merged if state is None else state
        self._copied = 0
