"""What `adapt()` gains under skew: the index as built, and the same index with the hot table that it chose; one thread.

    python benchmarks/doraemon/skew.py batches|single|moving [--n 4000000 64000000] [--queries "zipf 1.3" ...]

Keys are uniform over uint64. Zipf queries are of ranks up to the number of keys, scattered over the keys; "zipf 1.1,
endless" draws ranks without end and wraps them around, so that a fifth of the queries is uniform. What is timed are
other queries than those that the index learned from, and others in every turn, lest one way find warm what another
just read. Answers are checked.

batches  a million queries at once, after four million were seen.
single   one query per call, loop and call from Python included; "loop ns" is that of a function that does nothing.
moving   the hot keys are others after each million queries. "following" adapts after the first 50,000 of each million,
         and the time of `adapt()` is counted; "as built" never does; "known beforehand" has from the first query on the
         table that it chose for these very hot keys, which stays as it is, at no cost: the best fixed one. "making ms"
         is what writing that table takes who is told its keys and their ranks, and "first touches" are the queries of a
         million that are the first for a key of the table: nobody who is not told can have it answer these.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
from inputs import Keys, make_keys, make_queries
from timing import Row, in_turns, keep, ratios, seconds_of, show, spread, spreads

from doraemon import Index
from doraemon.hot import Hot, no_learner

BATCH, SINGLE, SEEN = 1_000_000, 20_000, 4
QUERIES = ["uniform", "90/10", "99/1", "zipf 1.1, endless", "zipf 1.1", "zipf 1.3"]
MOVING = ["90/10", "zipf 1.1", "zipf 1.3"]
MOVES, PART, ADAPTED = 7, 50_000, 1  # batches of a place before adapting
SCATTER = np.uint64(0x9E3779B97F4A7C15)


def queries_of(name: str, keys: Keys, count: int, seed: int, place: int = 0) -> Keys:
    """Queries for keys that are there; at each place others are hot."""
    if not name.startswith("zipf"):
        return make_queries(name, keys, count, seed, shift=0.09 * place)
    n, rng = len(keys), np.random.default_rng(seed)
    ranks = rng.zipf(float(name.split()[1].rstrip(",")), 2 * count).astype(np.uint64)
    if "endless" not in name:
        ranks = ranks[ranks <= n]
    scattered = (ranks[:count] * SCATTER + np.uint64(place * 7919)) * SCATTER
    return keys[(scattered % np.uint64(n)).astype(np.int64)]


def adapted(index: Index, keys: Keys, shape: str, place: int = 0) -> tuple[Index, Row]:
    """The index after it has seen such queries, and what adapting came to."""
    for seed in range(SEEN):
        index.searchsorted(queries_of(shape, keys, BATCH, 1000 + seed, place))
    reports: list[Any] = []
    seconds = seconds_of(lambda: reports.append(index.adapt()))
    explained = index.explain()
    table = index._state.run.hot
    answered = 0.0 if table is None else float(table.holds(queries_of(shape, keys, BATCH, 2000, place)).mean())
    row: Row = {"adapt ms": round(1e3 * seconds, 2), "hot keys": explained.hot_keys, "hot bytes": explained.hot_bytes}
    return index, row | {"answered": round(answered, 4), "expected": round(reports[0].hot.saved, 3)}


def fixed(index: Index) -> Index:
    """The index with a hot table that stays as it is."""
    state, table = index._state, index._state.run.hot
    if table is not None:
        index._state = state.with_hot(replace(table, learner=no_learner()))
    return index


def batches(built: Index, keys: Keys, shape: str, rounds: int) -> Row:
    """Nanoseconds per query of whole arrays."""
    index, row = adapted(built.copy(), keys, shape)  # over the same arrays, so that only the table differs
    asked = [queries_of(shape, keys, BATCH, 3000 + turn) for turn in range(8)]
    np.testing.assert_array_equal(index.searchsorted(asked[0]), np.searchsorted(keys, asked[0]))
    ways: dict[str, Callable[[int], Any]] = {
        name: lambda turn, each=each: each.searchsorted(asked[(turn + turn // 8) % 8])
        for name, each in (("as built", built), ("adapted", index))
    }
    return row | _figures(in_turns(ways, rounds), BATCH)


def single(built: Index, keys: Keys, shape: str, rounds: int) -> Row:
    """Nanoseconds per call. The queries become Python ints just before, as they would in a program that makes them.

    A round is as long as its median part, lest other programs' turns on the processor be counted.
    """
    index, row = adapted(built.copy(), keys, shape)  # over the same arrays, so that only the table differs
    ways: dict[str, Callable[[Any], int]] = {
        "loop": lambda key: 0,
        "as built": built.bisect_left,
        "adapted": index.bisect_left,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds):
        for number, name in enumerate(list(ways)[:: 1 if round_ % 2 else -1]):
            asked, way = queries_of(shape, keys, SINGLE, 3000 + 3 * round_ + number).tolist(), ways[name]
            parts = [asked[first : first + SINGLE // 10] for first in range(0, SINGLE, SINGLE // 10)]
            seconds[name].append(10 * median(seconds_of(lambda q=q, way=way: [way(key) for key in q]) for q in parts))
    loop = min(seconds.pop("loop"))
    return row | {"loop ns": round(1e9 * loop / SINGLE, 1)} | _figures(seconds, SINGLE)


def moving(built: Index, keys: Keys, shape: str, rounds: int) -> Row:
    """Nanoseconds per query over a million queries of each place, adapting included.

    Before a turn each index answers queries of the place before, or what one finds in the cache would be what another
    left there.
    """
    following, _ = adapted(Index(keys), keys, shape)  # no copy of another index, which would share its samples
    seconds: dict[str, list[float]] = {"as built": [], "following": [], "known beforehand": []}
    adapting: list[float] = []
    making: list[float] = []
    touches: list[float] = []

    def follow(index: Index, parts: list[Keys]) -> None:
        for part, asked in enumerate(parts):
            index.searchsorted(asked)
            if index is following and part + 1 == ADAPTED:
                adapting.append(seconds_of(following.adapt))

    for place in range(1, MOVES + 1):
        known = fixed(adapted(Index(keys), keys, shape, place)[0])
        indexes = {"as built": built, "following": following, "known beforehand": known}
        earlier = queries_of(shape, keys, BATCH // 4, 5000 + place, place - 1)
        parts = [
            np.split(queries_of(shape, keys, BATCH, 4000 + 3 * place + way, place), BATCH // PART) for way in range(3)
        ]
        for turn in range(3):  # each goes first now and then
            name = list(indexes)[(place + turn) % 3]
            indexes[name].searchsorted(earlier)
            seconds[name].append(seconds_of(lambda index=indexes[name], parts=parts[turn]: follow(index, parts)))
        table = known._state.run.hot
        making.append(0.0 if table is None else seconds_to_make(table, keys))
        touches.append(0.0 if table is None else first_touches(table, np.concatenate(parts[0])))
    dearer = [100 * made / best for made, best in zip(making, seconds["known beforehand"], strict=True)]
    row: Row = {
        "adapt ms": spread([1e3 * value for value in adapting]),
        "making ms": spread([1e3 * value for value in making]),
        "making %": spread(dearer),
        "first touches": spread(touches),
    }
    return row | _figures(seconds, BATCH, "following")


def seconds_to_make(table: Hot, keys: Keys) -> float:
    """How long it takes to write a table of distinct keys once they and their ranks are known."""
    ranks, ones = np.searchsorted(keys, table.codes), np.ones(len(table.codes), np.int64)
    return seconds_of(lambda: Hot.of(table.codes, ranks, ones, len(keys), len(table.lines)))


def first_touches(table: Hot, asked: Keys) -> float:
    """The share of the queries that are the first for a key of the table."""
    return len(np.unique(asked[table.holds(asked)])) / len(asked)


def _figures(seconds: dict[str, list[float]], count: int, ours: str = "adapted") -> Row:
    """Nanoseconds per query, and by how many percent ours differs from each other way, round by round."""
    own = seconds[ours]
    pairs = {name: zip(own, values, strict=True) for name, values in seconds.items() if name != ours}
    changes = {name: spread([100 * (a / b - 1) for a, b in each]) for name, each in pairs.items()}
    return {"ns": spreads(seconds, 1e9 / count), "change %": changes, "ratio": ratios(seconds, ours)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["batches", "single", "moving"])
    parser.add_argument("--n", nargs="+", type=int, default=[4_000_000, 64_000_000])
    parser.add_argument("--queries", nargs="+", choices=QUERIES)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    way = {"batches": batches, "single": single, "moving": moving}[options.part]
    for n in options.n:
        keys = make_keys("uniform", n)
        built = Index(keys)
        for shape in options.queries or (MOVING if options.part == "moving" else QUERIES):
            row = {"n": n, "queries": shape, "rounds": options.rounds} | way(built, keys, shape, options.rounds)
            show(row)
            keep(f"skew_{options.part}", [row], ["n", "queries"])


if __name__ == "__main__":
    main()
