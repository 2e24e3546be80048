"""Runs: sorted keys that do not change, with all that is known of how they are searched."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from .arrays import Bits, Codes, Ints, Values
from .engine import Engine
from .heat import Heat, rebucket, shares_of
from .hot import Decision, Hot
from .model import Model, bucket_starts, build, choose_bits
from .splicing import Room
from .steps import Steps, find_steps
from .workload import Memory, Signature, signature

Models = Memory[Bits]  #: leaf numbers given for past workloads
Decisions = Memory[Decision]  #: which hot table each had, if any


@dataclass(frozen=True, eq=False)
class Run:
    """Sorted keys that do not change, the model over them, and the workloads that its buckets have seen.

    Attributes:
        codes: ascending; distinct in a map.
        values: of a map, in the same order; None for a multiset.
        model: leads from codes to positions.
        heat: access counts of the model's buckets.
        trained: the access shares that the model's leaves were given for.
        memory: leaf numbers for past workloads. Never changed: an adaptation makes another.
        hot: the codes asked for most, which are looked up before the model; None for none.
        decisions: what was found best for past workloads. Never changed: a decision makes another.
        room: the larger arrays that codes and values are the first part of; None where there are none.
        tail: how many keys were appended that the model was not fitted to.
        lineage: the same for a run and those that it grew into or was adapted to.
    """

    codes: Codes
    values: Values | None
    model: Model
    heat: Heat
    trained: Signature
    memory: Models
    hot: Hot | None = None
    decisions: Decisions = field(default_factory=Decisions)
    room: Room | None = None
    tail: int = 0
    lineage: object = field(default_factory=object)

    @classmethod
    def of(cls, codes: Codes, values: Values | None, engine: Engine, memory: Models) -> Run:
        """The run of sorted codes that have not been searched yet."""
        model = build(codes, engine)
        heat = Heat(model.bounds, engine)
        return cls(codes, values, model, heat, heat.signature(model.depths), memory)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def remembered_bytes(self) -> int:
        """The bytes of hot tables that are only remembered."""
        lines = None if self.hot is None else self.hot.lines
        tables = [decision.table for _, decision in self.decisions]
        return sum(table.nbytes for table in tables if table is not None and table.lines is not lines)

    @cached_property
    def steps(self) -> Steps | None:
        """The distinct codes, if they are few; those of a map are not."""
        return find_steps(self.codes) if self.values is None else None

    def with_parts(self, **parts: Any) -> Run:
        """The run of the same codes with some other parts: what is known of the codes need not be found again."""
        other = replace(self, **parts)
        if "steps" in self.__dict__:
            other.__dict__["steps"] = self.steps
        return other

    def followed_by(self, codes: Codes, values: Values | None, engine: Engine) -> Run:
        """The run of other codes in this one's place, its model fitted for the accesses counted so far."""
        memory = self.memory_over(codes, bucket_starts(len(codes)))
        if len(self) == 0:
            return Run.of(codes, values, engine, memory)
        starts = bucket_starts(len(codes))
        counts = rebucket(self.heat.counts(self.hot), self._bucket_ranks(codes), starts)
        shares = shares_of(counts, np.diff(starts))
        model = build(codes, engine, shares)
        heat = Heat(model.bounds, engine, counts, self.heat.samples.copy())
        return Run(codes, values, model, heat, shares, memory)

    def memory_over(self, codes: Codes, starts: Ints) -> Models:
        """The memory over other codes, whose buckets begin at `starts`: each workload with its shares there."""
        if len(self) == 0 or len(codes) == 0:
            return Models(self.memory.capacity)  # without buckets on both sides no workload can be carried over
        ranks, depths = self._bucket_ranks(codes), np.diff(starts)

        def moved(known: Signature, bits: Bits) -> tuple[Signature, Bits]:
            shares = signature(rebucket(known, ranks, starts), depths, 1e-6)
            return shares, choose_bits(depths, shares)

        return self.memory.transformed(moved)

    def _bucket_ranks(self, codes: Codes) -> Ints:
        """int64 [buckets + 1]: where this run's buckets would begin and end among other codes."""
        return np.append(np.searchsorted(codes, self.model.bounds), len(codes)).astype(np.int64)
