"""Appending: keys above all others go behind the run, into room that is left there, and not into a delta.

A run and those that grow out of it share one room, of which each sees its part, and only the longest may take more. So
appending copies nothing but what is new. The model's last bucket takes in the new keys at first; when they have become
many, they are fitted, the last bucket with them, as buckets of their own. When the room is used up, keys go to the
deltas, until a merge makes another room: that is after a number of keys in proportion to those that it copies.
"""

from __future__ import annotations

from dataclasses import replace

from .arrays import Codes, Values
from .engine import Engine
from .heat import Heat, rebucket
from .model import MAX_BUCKETS, extended
from .run import Run
from .workload import signature

TAIL = 1024  #: of the keys, how many times fewer are left unfitted
MIN_TAIL = 4  #: buckets of keys that may be left unfitted


def appended(run: Run, codes: Codes, values: Values | None, engine: Engine) -> Run | None:
    """The run with more keys, in order and above all of its own; None if there is no room for them.

    O(keys + buckets), the keys' fit included.
    """
    if run.room is None or len(run) == 0 or not run.room.take(len(run), codes, values):
        return None
    tail, end = run.tail + len(codes), len(run) + len(codes)
    longer, longer_values = run.room.first(end)
    grown = replace(run, codes=longer, values=longer_values, tail=tail, model=run.model.reaching(end))
    few = tail <= max(MIN_TAIL * (end // len(run.model.bits)), end // TAIL)
    return grown if few else fitted(grown, engine)


def fitted(run: Run, engine: Engine) -> Run:
    """The run with no keys that its model was not fitted to."""
    if run.tail == 0:
        return run
    if len(run.model.bits) >= 2 * MAX_BUCKETS:  # so that their number stays small
        afresh = run.followed_by(run.codes, run.values, engine)
        return replace(afresh, room=run.room, lineage=run.lineage, hot=run.hot, decisions=run.decisions)
    model = extended(run.model, run.codes, engine)
    before, after = run.model.starts, model.starts
    counts = rebucket(run.heat.counts(run.hot), before, after)
    heat = Heat(model.bounds, engine, counts, run.heat.samples)
    trained = signature(rebucket(run.trained, before, after), model.depths, 1e-6)
    memory = run.memory_over(run.codes, after)
    return replace(run, model=model, heat=heat, trained=trained, memory=memory, tail=0)
