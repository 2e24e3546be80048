"""Remembering: the hot tables of past workloads, and for which of them none paid, to be had again without a trial.

A workload that returns is recognised by how the newest samples spread over the run and by how many of them are of the
same keys. That its table fits is not believed but seen: it has to answer about as many of these samples as it did.

A table is true of the run that it was made for. So a merge forgets all of them, and one that states ranks of codes
above the run's keys of then, of which some may have been appended since, is not used again.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .accesses import BINS, by_count, spread_of
from .arrays import Codes
from .hot import Choice, Decision, Hot, Learner, no_learner
from .run import Decisions, Run
from .workload import Match, Memory

NEWEST = 2048  #: samples that tell which workload it is
SIMILAR = 0.1 + BINS / (math.log(2) * NEWEST)  #: bits between samples of one workload, with what their number causes
ALIKE = 0.1  #: share of the accesses by which those of one workload may differ
MOST = 1 / 4  #: of the bytes of the run's keys that remembered tables may take
ANYWAY = 1 << 20  #: bytes that they may take of any run


def remembered(run: Run, table: Hot | None, choice: Choice) -> Decisions:
    """What the run remembers, and this decision for the newest samples. The oldest tables go where all are too large.

    O(decisions * bins).
    """
    newest = run.heat.samples.newest(NEWEST)
    bare = None if table is None else replace(table, learner=no_learner())
    known = run.decisions.copy()
    known.remember(spread_of(run, newest), Decision(bare, choice, by_count(newest)[1], len(run)), SIMILAR)
    kept, room = list(known), max(ANYWAY, int(MOST * run.codes.nbytes))
    while sum(decision.nbytes for _, decision in kept) > room:
        del kept[0]
    return Memory.of(kept, run.memory.capacity)


def recall(run: Run) -> Match[Decision] | None:
    """What was decided for a workload like that of the newest samples; None if it is new. O(decisions * bins)."""
    if len(run.decisions) == 0:
        return None
    newest = run.heat.samples.newest(NEWEST)
    match = run.decisions.nearest(spread_of(run, newest))
    return match if match is not None and match.distance <= SIMILAR and _fits(match.value, run, newest) else None


def returned(run: Run, match: Match[Decision]) -> tuple[Hot | None, Decisions]:
    """The table of a workload that has returned, to learn anew from here on, and what the run remembers then."""
    choice = begun_lately(match.value.choice, run)
    decisions, table = run.decisions.copy(), match.value.table
    decisions.remember(match.signature, replace(match.value, choice=choice), SIMILAR)
    if table is None:
        return None, decisions
    return replace(table, learner=Learner(table.lines, len(run)), choice=choice), decisions


def begun_lately(choice: Choice, run: Run) -> Choice:
    """The choice for a workload that has begun with the newest samples."""
    return replace(choice, began=int(run.heat.samples.taken[0]) - NEWEST)


def newest_decision(run: Run) -> Decision | None:
    """What was decided or recalled last."""
    return list(run.decisions)[-1][1] if len(run.decisions) else None


def _fits(decision: Decision, run: Run, newest: Codes) -> bool:
    table = decision.table
    if table is None:
        return abs(by_count(newest)[1] - decision.known) < ALIKE
    true = decision.keys == len(run) or table.highest <= int(run.codes[decision.keys - 1])
    return true and float(table.holds(newest).mean()) >= decision.choice.answered - ALIKE
