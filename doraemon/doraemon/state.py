"""States: everything that a reader needs, immutable. A write makes a new state and swaps one reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .delta import Delta, merge, since
from .engine import Engine
from .heat import Heat, rebucket, shares_of
from .keys import Codes, KeyType
from .model import Model, bucket_starts, build
from .search import LOCATE, NOT_HERE, RANK, RUN, SMALL, StepView, View, make_view
from .steps import Steps, find_steps
from .workload import Signature

Ints = NDArray[np.int64]
Values = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Run:
    """Sorted keys that do not change, and the model over them.

    Attributes:
        codes: ascending; distinct in a map.
        values: of a map, in the same order.
        trained: the access shares that the model's leaves were given for.
    """

    codes: Codes
    values: Values | None
    model: Model
    heat: Heat
    trained: Signature

    @classmethod
    def of(cls, codes: Codes, values: Values | None, engine: Engine) -> Run:
        model = build(codes, engine)
        heat = Heat(len(model.bounds))
        return cls(codes, values, model, heat, heat.signature(model.depths))

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def steps(self) -> Steps | None:
        """The distinct codes, if they are few; those of a map are not."""
        return find_steps(self.codes) if self.values is None else None


@dataclass(frozen=True, eq=False)
class State:
    """A run, its delta, and the view that searches both."""

    key_type: KeyType
    engine: Engine
    run: Run
    delta: Delta
    view: View
    length: int

    @classmethod
    def of(cls, key_type: KeyType, engine: Engine, run: Run, delta: Delta | None = None) -> State:
        if delta is None:
            delta = Delta.empty(None if run.values is None else run.values.dtype, engine)
        view = make_view(engine, key_type.kind, run.codes, run.model, run.heat.hits, delta)
        return cls(key_type, engine, run, delta, view, len(run) + int(delta.moved[-1]))

    # ---- ranks and positions

    def search(self, asked: int, codes: Codes, right: bool = False) -> Ints:
        """What the view says of a batch of codes."""
        out = np.empty(len(codes), dtype=np.int64)
        view = self.view if len(codes) < SMALL or self._step_view is None else self._step_view
        view.search(asked, int(right), codes, out)
        return out

    @cached_property
    def _step_view(self) -> StepView | None:
        """What searches batches where the run's distinct codes are few."""
        run, steps = self.run, self.run.steps
        if steps is None:
            return None
        return StepView(steps, run.codes, run.model, run.heat.hits, self.delta, self.engine)

    def rank(self, query: Any, right: bool) -> int:
        """How many keys are below the query, or (`right`) not above it."""
        rank = self.view.right(query) if right else self.view.left(query)
        if rank != NOT_HERE:
            return rank
        cut = self.key_type.cut_one(query)
        if cut.code is None:
            return self.length
        return int(self.search(RANK, np.array([cut.code], dtype=np.uint64), right and cut.exact)[0])

    def ranks(self, queries: ArrayLike, right: bool) -> Ints:
        codes, exact, above = self.key_type.cuts(queries)
        ranks = self.search(RANK, codes, right)
        if right and exact is not None:
            ranks = np.where(exact, ranks, self.search(RANK, codes))
        return ranks if above is None else np.where(above, self.length, ranks)

    def find(self, key: Any) -> int:
        """Position in the run, length of the run + position in the delta, or ABSENT."""
        at = self.view.find(key)
        if at != NOT_HERE:
            return at
        cut = self.key_type.cut_one(key)
        if cut.code is None or not cut.exact:
            return -1
        return int(self.search(LOCATE, np.array([cut.code], dtype=np.uint64))[0])

    def find_many(self, keys: ArrayLike) -> Ints:
        codes, exact, above = self.key_type.cuts(keys)
        at = self.search(LOCATE, codes)
        if exact is not None:
            at = np.where(exact, at, -1)
        return at if above is None else np.where(above, -1, at)

    def value(self, at: int) -> Any:
        """The value at what `find` said."""
        n = len(self.run)
        source = self.run.values if at < n else self.delta.values
        if source is None:
            raise _no_values()
        value = source[at if at < n else at - n]
        return value.copy() if isinstance(value, np.void) else value  # a record is a view of where it is stored

    def values_at(self, at: Ints) -> Values:
        """The values at what `find_many` said, of which none may be ABSENT."""
        if self.run.values is None or self.delta.values is None:
            raise _no_values()
        if len(self.delta) == 0:
            return self.run.values[at]
        n = len(self.run)
        result = np.empty(len(at), dtype=self.run.values.dtype)
        in_run = at < n
        result[in_run] = self.run.values[at[in_run]]
        result[~in_run] = self.delta.values[at[~in_run] - n]
        return result

    # ---- keys by rank

    @cached_property
    def _delta_ranks(self) -> Ints:
        """The rank in the index of each of the delta's codes."""
        ranks: Ints = self.search(RUN, self.delta.codes) + self.delta.moved[:-1]
        return ranks

    def positions(self, ranks: Ints) -> Ints:
        """Where the keys of these ranks are, as `find` would say."""
        if len(self.delta) == 0:
            return ranks
        entry = np.searchsorted(self._delta_ranks, ranks, side="right") - 1
        inside = np.maximum(entry, 0)
        in_delta = (entry >= 0) & (ranks < self._delta_ranks[inside] + self.delta.counts[inside])
        return np.where(in_delta, len(self.run) + inside, ranks - self.delta.moved[entry + 1])

    def codes_at(self, at: Ints) -> Codes:
        if len(self.delta) == 0:
            return self.run.codes[at]
        n = len(self.run)
        in_run = self.run.codes[np.minimum(at, n - 1)] if n else np.zeros(len(at), np.uint64)
        return np.where(at < n, in_run, self.delta.codes[np.maximum(at - n, 0)])

    def key(self, rank: int) -> Any:
        """The key of a rank, as users see it."""
        at = self.positions(np.array([rank])) if len(self.delta) else np.array([rank])
        return self.key_type.decode_one(int(self.codes_at(at)[0]))

    # ---- successors

    def count_in_run(self, codes: Codes) -> Ints:
        """How many keys of the run have each code; most codes of most writes are new, and searched once."""
        if len(self.run) == 0:
            return np.zeros(len(codes), dtype=np.int64)
        left = self.search(RUN, codes)
        there = self.run.codes[np.minimum(left, len(self.run) - 1)] == codes
        counts: Ints = there.astype(np.int64)
        if self.run.values is None:  # a map's keys are distinct
            counts[there] = self.search(RUN, codes[there], right=True) - left[there]
        return counts

    def with_delta(self, delta: Delta) -> State:
        return State.of(self.key_type, self.engine, self.run, delta)

    def with_run(self, run: Run) -> State:
        """The same keys under another model."""
        return State.of(self.key_type, self.engine, run, self.delta)

    def merged(self) -> State:
        """The state whose run has everything; its model is fitted for the heat that this one's readers left."""
        if len(self.delta) == 0:
            return self
        codes, values = merge(self.run.codes, self.run.values, self.delta, self.search(RUN, self.delta.codes))
        if len(self.run) == 0:
            return State.of(self.key_type, self.engine, Run.of(codes, values, self.engine))
        old, starts = self.run, bucket_starts(len(codes))
        counts = rebucket(old.heat.counts(), rank_of_buckets(old, codes), starts)
        shares = shares_of(counts, np.diff(starts))
        model = build(codes, self.engine, shares)
        run = Run(codes, values, model, Heat(len(counts), counts), shares)
        return State.of(self.key_type, self.engine, run)

    def after_merge(self, before: State, merged: State) -> State:
        """This state over the run of `merged`, which was made of `before`, an earlier state of this one."""
        count = merged.count_in_run
        return merged.with_delta(since(self.delta, before.delta, count))

    def remodelled(self, model: Model, trained: Signature) -> State:
        return self.with_run(replace(self.run, model=model, trained=trained))


def rank_of_buckets(old: Run, codes: Codes) -> Ints:
    """Where the old run's buckets would begin and end among other codes."""
    starts = np.searchsorted(codes, old.model.bounds)
    return np.append(starts, len(codes)).astype(np.int64)


def _no_values() -> TypeError:
    return TypeError("this index has keys only: make it with values, Index(keys, values), to look them up")
