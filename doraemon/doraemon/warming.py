"""Warming: which codes go into the hot table, chosen by the time that look-ups were measured to take.

What pays cannot be told beforehand: it depends on how the accesses spread, on the caches, and on how long a workload
lasts. So a few tables are made of the older samples, each answers some of the newest, and the fastest stays. "No table"
takes part, so that where none pays there is none.

Once there is a table, how many of the newest samples it answers tells whether the accesses have moved. While they stay
nothing is tried again before there are twice as many samples. When they have moved, the copy of the table that learns
has mostly followed them, and takes the place of the table. If it has not, another table is made of the samples since
then, soon and again whenever they have doubled. Where they are those of a workload that is remembered, its table is
back without a trial, or there is none if none paid.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .accesses import by_count, repeated, spread_of
from .arrays import Codes, Floats, Ints
from .heat import CAPACITY
from .hot import Choice, Hot
from .remembering import NEWEST, begun_lately, newest_decision, recall, remembered, returned
from .run import Run
from .state import State
from .workload import distance, signature

MIN_SAMPLES = 4096  #: below which no table is tried
WINDOWS = (1, 4, 16)  #: tables are made of all samples, of the newest quarter and of the newest sixteenth
MOVED = 0.1  #: share of the accesses by which a table answers fewer of late that tells of another workload
FAR = 1.5  #: bits between the workloads of late and of before that tell the same
HELD_OUT = 16  #: one sample in so many, the newest, is asked and not learned from
HELD_OUT_SINCE = 8  #: the same of the few since the accesses moved
BLOCK = 1024  #: samples in a block, to one of which it is told when they did
ROUNDS, PARTS = 2, 3  #: in which the tables take turns, and of which each turn is made
LEAST_PART = 512  #: queries that a table is asked at once, at least
WARM_UP, WARM_UP_ONCE = 8192, 2048  #: queries that are not timed before each turn, and where each table has but one
WORTHWHILE = 0.05  #: share of the time of a look-up that a table has to save
KNOWN = 0.15  #: share of the accesses that a table has to be likely to answer, to be tried: asking it in vain costs
AS_GOOD = 0.03  #: share by which another table has to be faster than the present one
DENSE = 2.0  #: times as many accesses per key as on average that make a bucket hot
LARGEST = 1 / 8  #: share of the run's keys that a table may be made of
SMALLEST = 4096  #: keys that any table may be made of


@dataclass(frozen=True)
class Warming:
    """What became of the hot table, and why.

    >>> from doraemon import Index
    >>> Index([1, 2]).adapt().hot.reason
    'too few accesses were counted to tell'

    Attributes:
        reason: in words.
        keys: in the table now.
        saved: measured share of the time of a look-up that the table saves, 0 without one.
        changed: whether there is another table than before, or none any more.
        moved: whether the newest accesses are of another workload than those before, so that leaves had better wait.
        recalled: whether the table, or that none pays, was remembered from a similar workload.
    """

    reason: str
    keys: int = 0
    saved: float = 0.0
    changed: bool = False
    moved: bool = False
    recalled: bool = False


def warm(state: State) -> tuple[State, Warming]:
    """The state with the hot table that its readers' samples speak for, and what was done."""
    after, report = _warmed(state)
    return after, replace(report, changed=_lines_of(after.run.hot) is not _lines_of(state.run.hot))


def _warmed(state: State) -> tuple[State, Warming]:
    samples, before = state.run.heat.samples, state.run.hot
    if state.engine != "native" or samples.taken[0] < MIN_SAMPLES:
        few = "too few accesses were counted to tell"
        return state, Warming(few if state.engine == "native" else "the NumPy engine has no hot table", _held(before))
    if len(state.run) == 0:
        return state, Warming("all keys are changes, of which a table tells nothing")
    choice = None if before is None else before.choice
    found = _recalled(state) if before is None or choice is None else _followed(state, before, choice)
    if found is not None:
        return found
    if before is None and passes_through(state.run):
        return state, Warming("the accesses are spread too evenly for a table", moved=True)
    past, late = _parted(samples.newest(), HELD_OUT)
    moved = has_moved(state.run, past, late)
    began = int(samples.taken[0]) - len(past) - len(late) if choice is None or moved else choice.began
    made = list((_tables_of_late if moved else _tables)(state, past))
    return _fastest(state, made, past, late, began, moved)


def _recalled(state: State) -> tuple[State, Warming] | None:
    """The state with the table that its workload had, or without if none paid; None if the workload is new, or more is
    known of it by now."""
    run, match = state.run, recall(state.run)
    if match is None:
        return None
    decision, taken = match.value, int(run.heat.samples.taken[0])
    if run.hot is None and decision.table is None and decision is newest_decision(run):
        more = taken - decision.choice.began >= 2 * decision.choice.samples
        return None if more else (state, Warming("no table saves enough"))
    table, decisions = returned(run, match)
    if table is not None:
        run.heat.skip()  # the model answered what the table will
    report = Warming(
        "a similar workload was known", _held(table), decision.choice.saved, moved=table is not None, recalled=True
    )
    return state.decided(table, decisions), report


def _parted(samples: Codes, held_out: int) -> tuple[Codes, Codes]:
    """The samples but for one in so many, the newest, and these."""
    split = len(samples) - len(samples) // held_out
    return samples[:split], samples[split:]


def _fastest(
    state: State, made: list[Hot], past: Codes, late: Codes, began: int, moved: bool, rounds: int = ROUNDS
) -> tuple[State, Warming]:
    """The state with the fastest of its table, those that were made, and none, for a workload that began then."""
    before, count = state.run.hot, int(state.run.heat.samples.taken[0]) - began
    thorough = rounds == ROUNDS and not moved
    tables = [None, *([] if before is None else [before]), *made]
    if len(tables) == 1:
        return _without(state, began, thorough, Warming("the accesses are spread too evenly for a table", moved=moved))
    costs = _costs([state.with_hot(table) for table in tables], past, late, rounds)
    best = int(np.argmin(costs))
    if before is not None and costs[1] <= (1 + AS_GOOD) * costs[best]:
        best = 1
    table, saved = tables[best], float(1 - costs[best] / costs[0])
    if table is None or saved < WORTHWHILE:
        return _without(state, began, thorough, Warming("no table saves enough", moved=moved))
    reason = "the table fits the accesses" if table is before else "another table is faster"
    answered = table.learner.share if table is before else None
    choice = Choice(began, count, float(table.holds(late).mean()) if answered is None else answered, saved)
    chosen, report = replace(table, choice=choice), Warming(reason, table.held, saved, moved=moved)
    return state.decided(chosen, remembered(state.run, chosen, choice)), report


def _without(state: State, began: int, thorough: bool, report: Warming) -> tuple[State, Warming]:
    """The state without a table, which is remembered if many were tried."""
    choice = Choice(began, int(state.run.heat.samples.taken[0]) - began, 0.0, 0.0)
    return state.decided(None, remembered(state.run, None, choice) if thorough else state.run.decisions), report


def _followed(state: State, table: Hot, choice: Choice) -> tuple[State, Warming] | None:
    """The state if its table fits the accesses still or has followed them, or one with a table of what was asked since
    they moved.

    None if all samples are of one workload, of which more is known than when the table was made.
    """
    samples, began, least = state.run.heat.samples, choice.began, choice.answered - MOVED
    taken, answered = int(samples.taken[0]), _answered(state, table)
    learned = table.learner.answered(NEWEST)
    if answered < least and learned is not None and learned >= least:
        state.run.heat.skip()  # the model answered few of them
        report = Warming("the table has followed the accesses", table.held, choice.saved, moved=True)
        return state.with_hot(replace(_as_learned(state, table, least), choice=begun_lately(choice, state.run))), report
    if answered < least:
        known, halfway = _recalled(state), (answered + choice.answered) / 2
        if known is not None:
            return known
        newest = samples.newest()
        return _tried_since(state, newest[len(newest) - _since_answered(table, newest, halfway) :], answered)
    if taken - began < 2 * choice.samples:
        return state, Warming("the table fits the accesses", table.held, choice.saved)
    if began == 0 or taken - began > len(samples.codes):
        return None
    return _tried_since(state, samples.newest(taken - began), answered)


def _as_learned(state: State, table: Hot, least: float) -> Hot:
    """The table as it has become by learning, with what was asked for again and again lately.

    A code that has just given way to a new one would be learned again at its next miss, but not by what stays as it is
    now. Where that is a very hot one, the copy answers less than `least` of the newest samples.
    """
    learned = table.followed() or table
    if _answered(state, learned) >= least:
        return learned
    codes, counts = np.unique(state.run.heat.samples.newest(NEWEST), return_counts=True)
    again = codes[np.argsort(-counts)][: np.count_nonzero(counts > 1)]
    full = state.hot_table(np.concatenate([again, np.setdiff1d(learned.codes, again)]), len(learned.lines))
    return learned if full is None else replace(learned, lines=full.lines, held=full.held)


def _answered(state: State, table: Hot) -> float:
    """The share of the newest samples that the table answers."""
    return float(table.holds(state.run.heat.samples.newest(NEWEST)).mean())


def _tried_since(state: State, since: Codes, answered: float) -> tuple[State, Warming]:
    """The state with the faster of its table and one of what was asked for since the accesses moved, or without.

    What is unlikely to answer much is not tried: neither the table, which answers so much by now, nor another.
    """
    samples = state.run.heat.samples
    began = int(samples.taken[0]) - len(since)
    if len(since) < MIN_SAMPLES:
        return state, Warming("the accesses have just moved", _held(state.run.hot), moved=True)
    past, late = _parted(since, HELD_OUT_SINCE)
    made = state.hot_table(repeated(past, KNOWN)[0])
    kept = state if answered > KNOWN else state.with_hot(None)
    moved = len(since) < len(samples.codes)  # else they have stayed for long
    return _fastest(kept, [] if made is None else [made], past, late, began, moved, rounds=1)


def _since_answered(table: Hot, samples: Codes, share: float) -> int:
    """How many of the samples come after the last block of which the table answers such a share.

    Blocks are looked at further and further back, and then in between as if the accesses had moved but once.
    """

    def answers(back: int) -> bool:
        end = len(samples) - back * BLOCK
        return bool(table.holds(samples[end - BLOCK : end]).mean() >= share)

    blocks, first, last = len(samples) // BLOCK, 0, 0
    while last < blocks and not answers(last):
        first, last = last + 1, min(2 * last + 1, max(blocks - 1, last + 1))
    last = first + bisect_left(range(first, last), True, key=answers)
    return last * BLOCK if last < blocks else len(samples)


def _held(table: Hot | None) -> int:
    return 0 if table is None else table.held


def _lines_of(table: Hot | None) -> NDArray[Any] | None:
    return None if table is None else table.lines


def _costs(states: list[State], past: Codes, late: Codes, rounds: int) -> Floats:
    """Seconds per query of each state, in its fastest turn.

    Before a turn the state answers some of the past, or it would find in the cache what another left there. Each part
    of the late queries is asked once, if there are enough, for the same reason.
    """
    turns = [state for _ in range(rounds) for state in states]
    size = max(min(LEAST_PART, len(late)), len(late) // (len(turns) * PARTS))
    warm_up = past[-(WARM_UP if rounds > 1 else WARM_UP_ONCE) :]
    ranks = np.empty(max(len(warm_up), size), dtype=np.int64)
    seconds = np.full((len(turns), PARTS), np.inf)
    for turn, state in enumerate(turns):
        state.view.ranks(warm_up, False, True, ranks[: len(warm_up)])
        for part in range(PARTS):
            first = (turn * PARTS + part) % (len(late) // size) * size
            begin = time.perf_counter()
            state.view.ranks(late[first : first + size], False, True, ranks[:size])
            seconds[turn, part] = time.perf_counter() - begin
    costs: Floats = seconds.reshape(rounds, len(states), PARTS).min(axis=(0, 2)) / size
    return costs


def passes_through(run: Run) -> bool:
    """Whether a few samples tell that the accesses have moved, and to more keys than a table of late ones can name.

    Where they move on and on, trials would cost more than they find. How much of the accesses is known grows at most
    as the samples do.
    """
    samples = run.heat.samples
    if samples.taken[0] < CAPACITY:
        return False
    newest, late = samples.newest(NEWEST), CAPACITY // WINDOWS[-1]
    if by_count(newest)[1] * late > KNOWN * NEWEST:
        return False
    return has_moved(run, samples.codes[:: CAPACITY // NEWEST].copy(), newest)


def has_moved(run: Run, past: Codes, late: Codes) -> bool:
    """Whether late samples are of another workload than those of the past.

    Then little is known of the new one, and how long it will last is uncertain: only small tables are worth making.
    """
    past = past[:: max(1, len(past) // len(late))].copy()
    if run.hot is not None:
        return bool(run.hot.holds(past).mean() - run.hot.holds(late).mean() > MOVED)
    before, now = (spread_of(run, codes) for codes in (past, late))
    noise = len(now) / (2 * math.log(2) * len(late))
    return distance(now, before) > FAR + noise


def _tables_of_late(state: State, past: Codes) -> Iterator[Hot]:
    """The table of what was asked for most lately."""
    table = state.hot_table(repeated(past[-(len(past) // WINDOWS[-1]) :], KNOWN)[0])
    if table is not None:
        yield table


def _tables(state: State, past: Codes) -> Iterator[Hot]:
    """Tables of what was asked for most, and of all keys of the hot buckets where samples name too few of them."""
    run, most = state.run, max(SMALLEST, int(LARGEST * len(state.run)))
    best = 0.0
    for window in WINDOWS:
        codes, known = repeated(past[-(len(past) // window) :], KNOWN)
        best = max(best, known)
        table = state.hot_table(codes[:most])
        if table is not None:
            yield table
    shares = signature(run.heat.counted(past), prior=run.model.depths)
    hot = hot_buckets(run, shares, most)
    table = table_of_buckets(run, hot) if shares[hot].sum() > best + WORTHWHILE else None
    if table is not None:
        yield table


def hot_buckets(run: Run, shares: Floats, most: int) -> Ints:
    """Buckets with many more accesses per key than others have, of at most so many keys together, in order."""
    depths = run.model.depths
    density = shares * len(run) / np.maximum(depths, 1)
    hottest = np.argsort(-density, kind="stable")
    within = np.cumsum(depths[hottest]) <= most
    return np.sort(hottest[within & (density[hottest] >= DENSE)])


def table_of_buckets(run: Run, buckets: Ints) -> Hot | None:
    """The table of the keys of buckets, in order, that occur only once in the run."""
    after = np.append(np.flatnonzero(np.diff(buckets) > 1) + 1, len(buckets))
    found, first = [], 0
    for last in after.tolist():  # stretches of buckets beside each other
        if first < last:
            found.append(_keys_alone(run, *run.model.starts[[buckets[first], buckets[last - 1] + 1]].tolist()))
        first = last
    if not found:
        return None
    ranks = np.concatenate(found)
    return Hot.of(run.codes[ranks], ranks, np.ones(len(ranks), dtype=np.int64), len(run))


def _keys_alone(run: Run, start: int, end: int) -> Ints:
    """The ranks from start to end of codes that the run has once."""
    before, after = max(start - 1, 0), min(end + 1, len(run))
    new = np.ones(after - before + 1, dtype=np.bool_)
    new[1:-1] = run.codes[before + 1 : after] != run.codes[before : after - 1]
    return before + np.flatnonzero((new[:-1] & new[1:])[start - before : end - before]) + (start - before)
