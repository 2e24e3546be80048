"""States: everything that a reader needs, immutable. A write makes a new state and swaps one reference.

Batches are answered here, single questions by the view or the front over it: each from one state, so that it sees one
moment even while others write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from random import randrange
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .appending import appended, fitted
from .arrays import Bits, Codes, Ints, Mask, Values
from .delta import Delta, add_counts, changes_after, merge, stacked
from .engine import Engine
from .heat import SAMPLING
from .hot import Hot
from .inputs import as_sequence
from .keytype import CODES, KeyType, Ranking
from .model import Model
from .parallel import in_parts
from .run import Decisions, Models, Run
from .search import SMALL, Scanned, StepView, View, make_view, telling
from .splicing import distinct
from .values import dtype_with_default, is_plain, with_default
from .workload import Signature

REQUIRED: Any = object()  #: stands for an argument that was not given

MIN_DELTA = 4096  #: changes below which a delta is never too long to search
TELLING = 4  #: how many times fewer queries than changes and leaves are worth leaves that tell of the changes
PUTTING_OFF = 8  #: entries that are copied in less time than a pending code will take to be sorted and searched for
MERGE_COST = 1 << 16  #: what a merge costs beside its keys, in keys


class Places(NamedTuple):
    """Where keys of an index lie.

    Attributes:
        layers: uint8 [keys], 0 in the run, 1 in the delta of older changes, 2 in that of recent ones.
        positions: int64 [keys], there.
    """

    layers: Bits
    positions: Ints


@dataclass(frozen=True, eq=False)
class State:
    """A run, its deltas, and the views that search them.

    Attributes:
        key_type: of the keys.
        engine: what searches, fits and splices.
        run: most of the keys.
        older: what changed since the run was made, but for
        joined: what changed since those changes were put together, and
        pending: codes that a multiset has got one more key of each since, as they came, the larger arrays first. They
            are sorted when they are asked for or have become many. None is above all others that there are.
        base: searches the run alone, for writers, who have no use for what readers search of the changes.
        length: the number of keys, copies counted.
        writes: the number of the last write, by which the deltas' entries are stamped.
        copied: how many entries of deltas the writes since the last merge have copied.
        copied_lately: of them, those of the recent changes since there were none.
        asked: int64 [1], how many queries were asked in batches.
    """

    key_type: KeyType
    engine: Engine
    run: Run
    older: Delta
    joined: Delta
    base: View
    length: int
    writes: int
    copied: int
    copied_lately: int
    pending: tuple[Codes, ...] = ()
    asked: Ints = field(default_factory=lambda: np.zeros(1, np.int64))

    @classmethod
    def of(cls, key_type: KeyType, engine: Engine, run: Run, delta: Delta | None = None, writes: int = 0) -> State:
        """The state of a run and its older changes, by default none; there are no recent ones."""
        none = Delta.empty(None if run.values is None else run.values.dtype, engine)
        older = none if delta is None else delta
        base = make_view(engine, key_type, run, (none, none))
        return cls(key_type, engine, run, older, none, base, len(run) + older.shift, writes, 0, 0)

    def _with(self, **parts: Any) -> State:
        """This state with some other parts, and the views of them."""
        base = self.base
        if "run" in parts:
            base = make_view(self.engine, self.key_type, parts["run"], (self._no_changes, self._no_changes))
            parts |= {"joined": self.recent, "pending": ()}  # where changes are in the run is found once
        state = replace(self, **parts, base=base, asked=np.zeros(1, np.int64))
        return replace(state, length=len(state.run) + state.older.shift + state.joined.shift + state.put_off)

    @cached_property
    def recent(self) -> Delta:
        """What changed since the older changes were put together. O(joined + pending log pending)."""
        if not self.pending:
            return self.joined
        codes, counts = distinct(np.concatenate(self.pending), self.engine)
        return add_counts(self.joined, codes, counts, self.counted)

    @property
    def put_off(self) -> int:
        """How many codes are pending."""
        return sum(map(len, self.pending))

    @cached_property
    def view(self) -> View:
        """What answers single keys and batches of codes. O(recent changes), O(changes) once they have become older."""
        if self.changes == 0:
            return self.base
        return make_view(self.engine, self.key_type, self.run, (self.older, self.recent))

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

    # ---- batches, which so many threads share

    def ranks(self, queries: ArrayLike, right: bool, threads: int = 1) -> Ints:
        """How many keys are below each query, or (`right`) not above it."""
        if self._ranking is not None:
            return self._sampled(self._ranking(queries, right))
        codes, exact, above = self.key_type.cuts(queries)
        ranks = self.code_ranks(codes, right, threads=threads)
        if right and exact is not None:
            ranks = np.where(exact, ranks, self.code_ranks(codes, threads=threads))
        return ranks if above is None else np.where(above, self.length, ranks)

    def contains_many(self, queries: ArrayLike, threads: int = 1) -> Mask:
        """Whether each query is in the index."""
        codes, exact, _ = self.key_type.cuts(queries)
        present = np.empty(len(codes), dtype=np.bool_)
        view = self._batch_view(codes)
        in_parts(lambda part: view.find_many(codes[part], present[part]), len(codes), threads)
        return present if exact is None else present & exact

    def get_many(self, queries: ArrayLike, default: Any, threads: int = 1) -> Values:
        """A map's value for each query, the default where it is absent; KeyError if that is REQUIRED."""
        dtype, given = self.value_dtype, as_sequence(queries)
        codes, exact, _ = self.key_type.cuts(given)
        present, layers = np.empty(len(codes), dtype=np.bool_), np.empty(len(codes), dtype=np.uint8)
        positions = np.empty(len(codes), dtype=np.int64)
        in_parts(lambda p: self.view.find_many(codes[p], present[p], layers[p], positions[p]), len(codes), threads)
        present = present if exact is None else present & exact
        if default is not REQUIRED:
            values = self._values_in_parts(Places(layers[present], positions[present]), threads)
            return with_default(values, ~present, default, dtype_with_default(default, dtype))
        if not present.all():
            first = int(np.argmin(present))
            raise KeyError(f"query {first}, {given[first]!s}, is absent: give a default to look up keys that may be")
        return self._values_in_parts(Places(layers, positions), threads)

    def code_ranks(self, codes: Codes, right: bool = False, in_run: bool = False, threads: int = 1) -> Ints:
        """How many keys of the index, or of its run alone, are below each code, or (`right`) not above it."""
        ranks = np.empty(len(codes), dtype=np.int64)
        view = self._batch_view(codes)
        in_parts(lambda part: view.ranks(codes[part], right, in_run, ranks[part]), len(codes), threads)
        return ranks

    @cached_property
    def _ranking(self) -> Ranking | None:
        """What ranks queries without a search of codes, where the key type knows such a thing of the run."""
        return self.key_type.ranking(self.run.codes) if len(self.run) and self.changes == 0 else None

    def _sampled(self, ranks: Ints) -> Ints:
        """The same ranks, of whose keys some are kept as samples."""
        some = np.minimum(ranks[randrange(SAMPLING) :: SAMPLING], len(self.run) - 1)
        self.run.heat.samples.add(self.run.codes[some])
        return ranks

    def _batch_view(self, codes: Codes) -> View:
        if len(codes) < SMALL:
            return self.view
        if self._step_view is not None:
            return self._step_view
        self.asked[0] += len(codes)  # an estimate where threads ask at the same time
        if self.changes == 0 or len(self.run) == 0:
            return self.view
        return self._telling_view if self.asked[0] > (self.changes + self.run.model.leaves) // TELLING else self.view

    @cached_property
    def _telling_view(self) -> View:
        """What answers most queries from the leaf, changes included."""
        return telling(self.engine, self.key_type, self.run, (self.older, self.recent))

    @property
    def _no_changes(self) -> Delta:
        return Delta.empty(None if self.run.values is None else self.run.values.dtype, self.engine)

    @cached_property
    def _step_view(self) -> StepView | None:
        """What searches batches where the run's distinct codes are few."""
        steps = self.run.steps
        deltas = (self.older, self.recent)
        return None if steps is None else StepView(steps, self.key_type, self.run, deltas, self.engine)

    def count_many(self, low: ArrayLike, high: ArrayLike, threads: int = 1) -> Ints:
        """How many keys are from each `low` on and below `high`, of which one may be a single end."""
        counted: Ints = np.maximum(self._ranks_of(high, threads) - self._ranks_of(low, threads), 0)
        return counted

    def _ranks_of(self, ends: Any, threads: int) -> Ints | int:
        return self.ranks(ends, False, threads) if self.key_type.is_batch(ends) else self.view.left(ends)

    # ---- what scans of the view fill, and values by their places

    @cached_property
    def new_keys(self) -> Callable[[int], Scanned]:
        """Makes the array that a scan fills with so many codes; with C perhaps keys, whose dtype tells."""
        made = self.key_type.scanned if self.engine == "native" else CODES
        return lambda count: (np.empty(count, made),)

    def scanned_keys(self, arrays: Scanned) -> NDArray[Any]:
        """The keys that a scan found."""
        keys, key_type = arrays[0], self.key_type
        return keys if keys.dtype == key_type.dtype else key_type.decode(keys)

    @cached_property
    def new_items(self) -> Callable[[int], Scanned]:
        """Makes the arrays that a scan fills with so many codes, or keys, and values.

        With C plain values, or their bytes where NumPy lets go of these only, else where the values are; with NumPy the
        values themselves.
        """
        dtype, keys = self.value_dtype, self.key_type.scanned
        if self.engine == "numpy":
            return lambda count: (np.empty(count, CODES), np.empty(count, dtype))
        if dtype.kind in "biuf":
            return lambda count: (np.empty(count, keys), np.empty(count, dtype))
        if is_plain(dtype):
            return lambda count: (np.empty(count, keys), np.empty(count * dtype.itemsize, np.uint8))
        return lambda count: (np.empty(count, keys), np.empty(count, np.uint8), np.empty(count, np.int64))

    def scanned_values(self, arrays: Scanned, late: list[tuple[int, Any]]) -> Values:
        """The values that a scan found, but for some that came from elsewhere to their places."""
        if len(arrays) == 3:
            values = self._values_at(Places(*arrays[1:]))
        else:
            values, dtype = arrays[1], self.value_dtype
            values = values if values.dtype == dtype else values.view(dtype)
        for place, value in late:
            values[place] = value
        return values

    def _values_at(self, places: Places) -> Values:
        if self.run.values is None or self.older.values is None or self.recent.values is None:
            raise values_error()
        layers, positions = places
        if not layers.any():
            return self.run.values[positions]
        result = np.empty(len(positions), dtype=self.run.values.dtype)
        for layer, values in enumerate((self.run.values, self.older.values, self.recent.values)):
            of_layer = layers == layer
            result[of_layer] = values[positions[of_layer]]
        return result

    def _values_in_parts(self, places: Places, threads: int) -> Values:
        """The same by several threads, for values that NumPy gathers without the GIL."""
        layers, positions = places
        if threads == 1 or self.value_dtype.hasobject:
            return self._values_at(places)
        values = np.empty(len(positions), dtype=self.value_dtype)

        def gather(part: slice) -> None:
            values[part] = self._values_at(Places(layers[part], positions[part]))

        in_parts(gather, len(positions), threads)
        return values

    # ---- successors

    @cached_property
    def delta(self) -> Delta:
        """All that changed since the run was made. O(changes)."""
        if len(self.recent) == 0:
            return self.older
        return stacked(self.older, self.recent) if len(self.older) else self.recent

    def counted(self, codes: Codes) -> tuple[Ints, Ints]:
        """Where each code is, or would be, in the run, and how many keys of it and of the older changes equal it."""
        ranks, counts = np.empty(len(codes), dtype=np.int64), np.empty(len(codes), dtype=np.int64)
        self.base.count_many(codes, ranks, counts)
        entry, changed = self.older.below(codes, ranks)
        counts[changed] += self.older.net[entry[changed]]
        return ranks, counts

    def with_recent(self, recent: Delta, writes: int = 1) -> State:
        """The same run with other recent changes, after some more writes.

        Recent changes become older ones when copying them has cost as much as copying all will: so the cost of a
        change grows with the square root of their number.
        """
        return self._changed(recent, (), len(recent), writes)

    def with_pending(self, codes: Codes) -> State:
        """A multiset with one more key of each code, in any order, of which none is above all others. O(codes).

        Nothing is searched or copied for them before they are asked for, or are so many that it is time to.
        """
        joined, pending, cost = self.joined, self.pending, PUTTING_OFF * len(codes)
        if pending and "recent" in self.__dict__:  # they were asked for
            joined, pending, cost = self.recent, (), cost + len(self.recent)
        kept = len(pending)
        while kept and len(pending[kept - 1]) <= sum(map(len, pending[kept:])) + len(codes):
            kept -= 1
        return self._changed(joined, (*pending[:kept], np.concatenate([*pending[kept:], codes])), cost, 1)

    def _changed(self, joined: Delta, pending: tuple[Codes, ...], cost: int, writes: int) -> State:
        """The same run and older changes with other recent ones, which become older ones if that is due."""
        lately, copied = self.copied_lately + cost, self.copied + cost
        state = replace(self, joined=joined, pending=pending, writes=self.writes + writes, copied=copied)
        if lately <= max(MIN_DELTA, state.changes):
            return state._with(copied_lately=lately)
        delta = state.delta
        copied += len(delta)
        return state._with(older=delta, joined=self._no_changes, pending=(), copied=copied, copied_lately=0)

    @property
    def highest(self) -> int | None:
        """The highest code of the run and of the changes; None if there is none."""
        parts = [int(part[-1]) for part in (self.run.codes, self.older.codes, self.joined.codes) if len(part)]
        return max(parts, default=None)

    def count_not_above(self, codes: Codes) -> int:
        """How many of the codes, which are in order, are not above all codes of the run and of the changes."""
        highest = self.highest
        return 0 if highest is None else int(np.searchsorted(codes, np.uint64(highest), side="right"))

    def with_appended(self, codes: Codes, values: Values | None) -> State | None:
        """The state with more keys, in order and above all codes that there are; None if there is no room for them."""
        if len(codes) == 0:
            return self
        run = appended(self.run, codes, values, self.engine)
        if run is None:
            return None
        return self._with(run=run)._with_true_hot(self.run)

    def _with_true_hot(self, shorter: Run) -> State:
        """The state with a hot table whose ranks are those of this run, where it has those of a shorter one.

        They are others only for codes above that one's keys.
        """
        hot = self.run.hot
        if hot is None or len(self.run) == len(shorter) or hot.highest <= int(shorter.codes[-1]):
            return self
        plain = self.with_hot(None)
        return plain.with_hot(plain.hot_table(hot.codes, len(hot.lines)))

    def remodelled(self, model: Model, trained: Signature, memory: Models) -> State:
        """The same keys under another model, which `trained` was the workload of."""
        return self._with(run=self.run.with_parts(model=model, trained=trained, memory=memory))

    def with_hot(self, hot: Hot | None) -> State:
        """The same keys with another hot table of them, or without one."""
        return self if hot is self.run.hot else self._with(run=self.run.with_parts(hot=hot))

    def decided(self, hot: Hot | None, decisions: Decisions) -> State:
        """The same keys with the hot table that was found best, or without one, and what is remembered of that."""
        return self._with(run=self.run.with_parts(hot=hot, decisions=decisions))

    def hot_table(self, codes: Codes, n_lines: int = 0) -> Hot | None:
        """The hot table of distinct codes, in the run or not, the hottest first; None for none.

        It has so many lines, or by default as many as the codes need.
        """
        n, left = len(self.run), self.code_ranks(codes, in_run=True)
        copies = ((left < n) & (self.run.codes[np.minimum(left, n - 1)] == codes)).astype(np.int64)
        again = (left + 1 < n) & (self.run.codes[np.minimum(left + 1, n - 1)] == codes)
        copies[again] = self.code_ranks(codes[again], right=True, in_run=True) - left[again]
        return Hot.of(codes, left, copies, n, n_lines)

    @property
    def changes(self) -> int:
        """How many entries the deltas have, pending codes counted as entries. O(1), which `len(delta)` is not."""
        return len(self.older) + len(self.joined) + self.put_off

    @property
    def merge_is_due(self) -> bool:
        """Whether there are many changes, or writes have copied them so often that merging would have been cheaper."""
        n = len(self.run)
        return self.changes >= max(MIN_DELTA, n // 16) or self.copied >= 2 * (n + MERGE_COST)

    def merged(self) -> State:
        """The state whose run has everything; its model is fitted for the accesses counted so far."""
        if self.changes == 0:
            return self.fitted()
        room = merge(self.run.codes, self.run.values, self.delta)
        codes, values = room.first(room.used)
        run = replace(self.run.followed_by(codes, values, self.engine), room=room)
        state = State.of(self.key_type.compacted(codes), self.engine, run)
        if self.run.hot is None or len(codes) == 0:
            return state
        return state.with_hot(state.hot_table(self.run.hot.codes, len(self.run.hot.lines)))

    def fitted(self) -> State:
        """The state whose model knows all keys of the run, also those that were appended lately."""
        return self._with(run=fitted(self.run, self.engine)) if self.run.tail else self

    def respaced(self) -> State:
        """The same keys under codes with room between all of them; what was known of accesses is forgotten."""
        merged = self.merged()
        key_type, codes = merged.key_type.respaced(merged.run.codes)
        run = Run.of(codes, merged.run.values, self.engine, Models(self.run.memory.capacity))
        return State.of(key_type, self.engine, run, writes=self.writes)

    def adapted(self, before: State, after: State) -> State | None:
        """This state under the model and the hot table of `after`, which was made of `before`, an earlier one of it.

        None if there was a merge in between. A model whose last buckets were fitted since stays.
        """
        run, made = self.run, after.run
        if run.lineage is not before.run.lineage:
            return None
        if run.heat is before.run.heat:
            run = run.with_parts(model=made.model.reaching(len(run)), trained=made.trained, memory=made.memory)
        return self._with(run=run.with_parts(hot=made.hot, decisions=made.decisions))._with_true_hot(before.run)

    def after_merge(self, before: State, merged: State) -> State | None:
        """This state over the run of `merged`, which was made of `before`, an earlier state of this one.

        None if so many keys were appended meanwhile that they have no room there.
        """
        memory = self.run.memory_over(merged.run.codes, merged.run.model.starts)
        merged, since = merged._with(run=merged.run.with_parts(memory=memory)), slice(len(before.run), None)
        grown = merged.with_appended(self.run.codes[since], None if self.run.values is None else self.run.values[since])
        if grown is None:
            return None
        delta = changes_after(self.delta, before.delta, grown.counted)
        key_type = merged.key_type.with_codes_of(self.key_type, self.run.codes[since], delta.codes)
        return State.of(key_type, self.engine, grown.run, delta, self.writes)


def values_error() -> TypeError:
    """What asking a multiset for values comes to."""
    return TypeError("this index has keys only: make it with values, Index(keys, values), to look them up")
