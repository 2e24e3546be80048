"""States: everything that a reader needs, immutable. A write makes a new state and swaps one reference.

Questions are answered here, those for one key by the view: each from one state, so that it sees one moment even while
others write.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arrays import Codes, Ints, Mask, Values
from .delta import Delta, changes_after, merge
from .engine import Engine
from .hot import Hot
from .inputs import as_sequence
from .keytype import KeyType
from .model import Model
from .run import Models, Run
from .search import SMALL, StepView, View, make_view
from .values import dtype_with_default, with_default
from .workload import Signature

REQUIRED: Any = object()  #: stands for an argument that was not given

MIN_DELTA = 4096  #: changes below which a delta is never too long to search
MERGE_COST = 1 << 16  #: what a merge costs beside its keys, in keys


class Places(NamedTuple):
    """Where keys of an index lie.

    Attributes:
        in_delta: bool [keys], whether in the delta, else in the run; None where all are in the run.
        positions: int64 [keys], there.
    """

    in_delta: Mask | None
    positions: Ints


@dataclass(frozen=True, eq=False)
class State:
    """A run, its delta, and the view that searches both.

    Attributes:
        key_type: of the keys.
        engine: what searches, fits and splices.
        run: most of the keys.
        delta: what changed since the run was made.
        view: answers single keys and batches of codes.
        length: the number of keys, copies counted.
        writes: the number of the last write, by which the delta's entries are stamped.
        copied: how many entries of deltas the writes since the last merge have copied.
    """

    key_type: KeyType
    engine: Engine
    run: Run
    delta: Delta
    view: View
    length: int
    writes: int
    copied: int

    @classmethod
    def of(
        cls, key_type: KeyType, engine: Engine, run: Run, delta: Delta | None = None, writes: int = 0, copied: int = 0
    ) -> State:
        """The state of a run and its delta, by default an empty one."""
        if delta is None:
            delta = Delta.empty(None if run.values is None else run.values.dtype, engine)
        view = make_view(engine, key_type, run, delta)
        return cls(key_type, engine, run, delta, view, len(run) + int(delta.shifts[-1]), writes, copied)

    @property
    def is_map(self) -> bool:
        """Whether there are values beside the keys."""
        return self.run.values is not None

    @property
    def value_dtype(self) -> np.dtype[Any]:
        """The dtype of a map's values. Raises TypeError if there are none."""
        if self.run.values is None:
            raise values_error()
        return self.run.values.dtype

    # ---- one key

    def select(self, rank: int) -> Any:
        """The key of a rank; negative ranks count from the end. Raises IndexError if there is no such rank."""
        n = self.length
        if not -n <= rank < n:
            raise IndexError(f"rank {rank} of {n} keys: give one from {-n} to {n - 1}")
        if len(self.delta) == 0:
            return self.key_type.decode_one(int(self.run.codes[rank]))
        return self.key_type.decode_one(int(self._codes_at(self._places(np.array([rank % n])))[0]))

    def neighbour(self, key: Any, right: bool, offset: int) -> Any | None:
        """The key `offset` ranks from this one's left or right rank, None if there is none."""
        rank = (self.view.right(key) if right else self.view.left(key)) + offset
        return self.select(rank) if 0 <= rank < self.length else None

    # ---- ranges

    def keys_between(self, low: Any, high: Any) -> NDArray[Any]:
        """The keys from `low` on and below `high`, ascending; None leaves an end open."""
        return self.key_type.decode(self._codes_at(self._places_between(low, high)))

    def values_between(self, low: Any, high: Any) -> Values:
        """A map's values for `keys_between`. Raises TypeError if there are keys only."""
        return self._values_at(self._places_between(low, high))

    def items_between(self, low: Any, high: Any) -> tuple[NDArray[Any], Values]:
        """A map's keys and values. Raises TypeError if there are keys only."""
        places = self._places_between(low, high)
        return self.key_type.decode(self._codes_at(places)), self._values_at(places)

    def count(self, low: ArrayLike, high: ArrayLike) -> Any:
        """How many keys are from `low` on and below `high`: an int, or int64 for arrays of ends."""
        counted = np.maximum(self._ranks_of(high) - self._ranks_of(low), 0)
        return int(counted) if np.ndim(counted) == 0 else counted

    def _ranks_of(self, ends: Any) -> Ints | int:
        return self.ranks(ends, right=False) if self.key_type.is_batch(ends) else self.view.left(ends)

    def _places_between(self, low: Any, high: Any) -> Places:
        first = 0 if low is None else self.view.left(low)
        last = self.length if high is None else self.view.left(high)
        return self._places(np.arange(first, last))

    # ---- batches

    def ranks(self, queries: ArrayLike, right: bool) -> Ints:
        """How many keys are below each query, or (`right`) not above it."""
        codes, exact, above = self.key_type.cuts(queries)
        ranks = self.code_ranks(codes, right)
        if right and exact is not None:
            ranks = np.where(exact, ranks, self.code_ranks(codes))
        return ranks if above is None else np.where(above, self.length, ranks)

    def contains_many(self, queries: ArrayLike) -> Mask:
        """Whether each query is in the index."""
        codes, exact, _ = self.key_type.cuts(queries)
        present = np.empty(len(codes), dtype=np.bool_)
        self._batch_view(codes).find_many(codes, present)
        return present if exact is None else present & exact

    def get_many(self, queries: ArrayLike, default: Any) -> Values:
        """A map's value for each query, the default where it is absent; KeyError if that is REQUIRED."""
        dtype, given = self.value_dtype, as_sequence(queries)
        codes, exact, _ = self.key_type.cuts(given)
        present, in_delta = np.empty(len(codes), dtype=np.bool_), np.empty(len(codes), dtype=np.bool_)
        positions = np.empty(len(codes), dtype=np.int64)
        self.view.find_many(codes, present, in_delta, positions)
        present = present if exact is None else present & exact
        if default is not REQUIRED:
            values = self._values_at(Places(in_delta[present], positions[present]))
            return with_default(values, ~present, default, dtype_with_default(default, dtype))
        if not present.all():
            first = int(np.argmin(present))
            raise KeyError(f"query {first}, {given[first]!s}, is absent: give a default to look up keys that may be")
        return self._values_at(Places(in_delta, positions))

    def code_ranks(self, codes: Codes, right: bool = False, in_run: bool = False) -> Ints:
        """How many keys of the index, or of its run alone, are below each code, or (`right`) not above it."""
        ranks = np.empty(len(codes), dtype=np.int64)
        self._batch_view(codes).ranks(codes, right, in_run, ranks)
        return ranks

    def _batch_view(self, codes: Codes) -> View:
        return self.view if len(codes) < SMALL or self._step_view is None else self._step_view

    @cached_property
    def _step_view(self) -> StepView | None:
        """What searches batches where the run's distinct codes are few."""
        steps = self.run.steps
        return None if steps is None else StepView(steps, self.key_type, self.run, self.delta, self.engine)

    # ---- keys and values by their places

    @cached_property
    def _delta_ranks(self) -> Ints:
        """The rank in the index of each of the delta's codes."""
        ranks: Ints = self.code_ranks(self.delta.codes, in_run=True) + self.delta.shifts[:-1]
        return ranks

    def _places(self, ranks: Ints) -> Places:
        """Where the keys of these ranks lie."""
        if len(self.delta) == 0:
            return Places(None, ranks)
        entry = np.searchsorted(self._delta_ranks, ranks, side="right") - 1
        inside = np.maximum(entry, 0)
        in_delta = (entry >= 0) & (ranks < self._delta_ranks[inside] + self.delta.counts[inside])
        return Places(in_delta, np.where(in_delta, inside, ranks - self.delta.shifts[entry + 1]))

    def _codes_at(self, places: Places) -> Codes:
        return _taken(self.run.codes, self.delta.codes, places)

    def _values_at(self, places: Places) -> Values:
        if self.run.values is None or self.delta.values is None:
            raise values_error()
        return _taken(self.run.values, self.delta.values, places)

    # ---- successors

    def count_in_run(self, codes: Codes) -> Ints:
        """How many keys of the run have each code; most codes of most writes are new, and searched once."""
        if len(self.run) == 0:
            return np.zeros(len(codes), dtype=np.int64)
        left = self.code_ranks(codes, in_run=True)
        present = self.run.codes[np.minimum(left, len(self.run) - 1)] == codes
        counts: Ints = present.astype(np.int64)
        if not self.is_map:  # a map's keys are distinct
            counts[present] = self.code_ranks(codes[present], right=True, in_run=True) - left[present]
        return counts

    def with_delta(self, delta: Delta, writes: int = 1) -> State:
        """The same run with other changes, after some more writes."""
        return State.of(self.key_type, self.engine, self.run, delta, self.writes + writes, self.copied + len(delta))

    def remodelled(self, model: Model, trained: Signature, memory: Models) -> State:
        """The same keys under another model, which `trained` was the workload of."""
        run = replace(self.run, model=model, trained=trained, memory=memory)
        return State.of(self.key_type, self.engine, run, self.delta, self.writes, self.copied)

    def with_hot(self, hot: Hot | None) -> State:
        """The same keys with another hot table of them, or without one."""
        if hot is self.run.hot:
            return self
        return State.of(self.key_type, self.engine, replace(self.run, hot=hot), self.delta, self.writes, self.copied)

    def hot_table(self, codes: Codes) -> Hot | None:
        """The hot table of distinct codes, in the run or not, the hottest first; None for none."""
        n, left = len(self.run), self.code_ranks(codes, in_run=True)
        copies = ((left < n) & (self.run.codes[np.minimum(left, n - 1)] == codes)).astype(np.int64)
        again = (left + 1 < n) & (self.run.codes[np.minimum(left + 1, n - 1)] == codes)
        copies[again] = self.code_ranks(codes[again], right=True, in_run=True) - left[again]
        return Hot.of(codes, left, copies)

    @property
    def merge_is_due(self) -> bool:
        """Whether the delta is long, or writes have copied it so often that merging would have been cheaper."""
        n = len(self.run)
        return len(self.delta) >= max(MIN_DELTA, n // 16) or self.copied >= 2 * (n + MERGE_COST)

    def merged(self) -> State:
        """The state whose run has everything; its model is fitted for the accesses counted so far."""
        if len(self.delta) == 0:
            return self
        codes, values = merge(
            self.run.codes, self.run.values, self.delta, self.code_ranks(self.delta.codes, in_run=True)
        )
        run = self.run.followed_by(codes, values, self.engine)
        state = State.of(self.key_type.compacted(codes), self.engine, run)
        if self.run.hot is None or len(codes) == 0:
            return state
        return state.with_hot(state.hot_table(self.run.hot.codes))

    def after_merge(self, before: State, merged: State) -> State:
        """This state over the run of `merged`, which was made of `before`, an earlier state of this one."""
        run = replace(merged.run, memory=self.run.memory_over(merged.run.codes))
        delta = changes_after(self.delta, before.delta, merged.count_in_run)
        key_type = merged.key_type.with_codes_of(self.key_type, delta.codes)
        return State.of(key_type, self.engine, run, delta, self.writes)

    def respaced(self) -> State:
        """The same keys under codes with room between all of them; what was known of accesses is forgotten."""
        merged = self.merged()
        key_type, codes = merged.key_type.respaced(merged.run.codes)
        run = Run.of(codes, merged.run.values, self.engine, Models(self.run.memory.capacity))
        return State.of(key_type, self.engine, run, writes=self.writes)


def _taken(run: NDArray[Any], delta: NDArray[Any], places: Places) -> NDArray[Any]:
    """The items at places in two arrays."""
    in_delta, positions = places
    if in_delta is None or len(delta) == 0:
        return run[positions]
    result = np.empty(len(positions), dtype=run.dtype)
    result[~in_delta] = run[positions[~in_delta]]
    result[in_delta] = delta[positions[in_delta]]
    return result


def values_error() -> TypeError:
    """What asking a multiset for values comes to."""
    return TypeError("this index has keys only: make it with values, Index(keys, values), to look them up")
