"""Adaptation: give leaves to the buckets that are searched now, and a table to the keys, where that pays."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from .arrays import Bits, Floats
from .heat import shares_of
from .model import choose_bits, refit
from .run import Run
from .state import State
from .warming import Warming, warm
from .workload import Signature, drift

WORTHWHILE = 0.05  #: modelled steps per access that an adaptation has to save
SIMILAR = 0.1  #: bits between workloads that are served by one model


@dataclass(frozen=True)
class Adaptation:
    """What `Index.adapt` did and why.

    >>> from doraemon import Index
    >>> report = Index([1, 2]).adapt()
    >>> report.reason, report.changed
    ('too few accesses were counted to tell', 0)

    Attributes:
        reason: what became of the leaves, in words.
        drift: modelled extra search steps per access before; 0 where the accesses have just moved.
        saved: modelled steps per access that the change saves, 0 if none was made.
        changed: buckets whose number of leaves changed.
        refitted: those of them that had to be fitted; the others' fits were still known.
        recalled: whether the leaf numbers were remembered from a similar workload.
        hot: what became of the hot table.
    """

    reason: str
    drift: float
    saved: float = 0.0
    changed: int = 0
    refitted: int = 0
    recalled: bool = False
    hot: Warming = field(default=Warming("not asked for"))


def adapt(state: State) -> tuple[State, Adaptation]:
    """The state for the workload that its readers' samples show, and what was done."""
    state, hot = warm(state)
    if hot.moved:
        return state, Adaptation("the accesses have just moved: fits wait until they stay", 0.0, hot=hot)
    state, report = _give_leaves(state, state.run.heat.counts(state.run.hot))
    return state, replace(report, hot=hot)


def _give_leaves(state: State, counts: Floats) -> tuple[State, Adaptation]:
    """The state under the model for these accesses, those that no hot table answers."""
    run, memory = state.run, state.run.memory.copy()
    now = shares_of(counts, run.model.depths)
    drifted, noise = drift(now, run.trained), _noise(counts)
    if not drifted > WORTHWHILE + noise:
        reason = "too few accesses were counted to tell" if noise > WORTHWHILE else "the model fits the accesses"
        return state, Adaptation(reason, drifted)
    recalled = memory.recall(now, within=SIMILAR + noise)
    bits = choose_bits(run.model.depths, now, run.model.bits) if recalled is None else recalled.value
    saved = _steps(run, run.model.bits, now) - _steps(run, bits, now)
    if saved < WORTHWHILE:
        return state, Adaptation("another model would save too little", drifted)
    memory.remember(run.trained, run.model.bits)
    model, refitted = refit(run.model, run.codes, bits, state.engine)
    trained = now if recalled is None else recalled.signature
    memory.remember(trained, bits)
    reason = "leaves follow the accesses" if recalled is None else "a similar workload was known"
    changed = int((bits != run.model.bits).sum())
    report = Adaptation(reason, drifted, saved, changed, len(refitted), recalled is not None)
    return state.remodelled(model, trained, memory), report


def _noise(counts: Floats) -> float:
    """The drift that sampling alone is expected to show."""
    total = float(counts.sum())
    return (len(counts) - 1) / (2 * math.log(2) * total) if total else math.inf


def _steps(run: Run, bits: Bits, shares: Signature) -> float:
    """Modelled search steps per access: a leaf of twice the keys costs one more."""
    return float((shares * np.maximum(np.log2(run.model.depths) - bits, 0.0)).sum())
