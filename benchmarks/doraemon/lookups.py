"""Lookups: ours, what a Python user would pick today, and the floors beneath both; one thread.

    python benchmarks/doraemon/lookups.py batches|single|moving [--keys uniform ...] [--queries zipf ...] [--n 4000000]

Needs `pip install sortedcontainers BTrees pygm polars pandas pyarrow duckdb`. Every method answers every query the
same, which is checked. The methods take turns. What is measured is added to benchmarks/results/doraemon, in place of
what was known of the same keys, queries and number, so the parts can be run on their own.

batches    a million queries at once. The floors: "position known", the gather of keys whose positions are given, and
           "hash table", of NumPy; neither answers questions of order. Nor do pandas' get_indexer, which has a hash
           table as well, and DuckDB's join with a table of the queries, which find positions they were told.
single     one query per call, of distinct keys, as some of the rivals hold no others. The floor: `in` of a dict. `in`
           and rank are both asked of ours. Then each call is timed alone for the percentiles, the clock's own time
           included. DuckDB is asked 50 times less often than the others, as each call takes long.
moving     90 % of the queries in a range of 10 % of the keys that moves by 2 % of the keys from position to position.
           At each the index sees a million queries of it. "following" then adapts, "left behind" adapted to the first
           range only, "never adapted" is as it was built. What is timed asks other queries of the same range.
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import pandas
import polars
from BTrees.QQBTree import QQBTree
from databases import Duck, Sqlite, signed
from hashing import HashTable
from inputs import KEYS, QUERIES, Keys, make_keys, make_queries
from pygm import SortedList as PgmList
from sortedcontainers import SortedDict
from timing import Row, in_turns, keep, ratios, seconds_of, show, spreads

from doraemon import Index

BATCH, SINGLE = 1_000_000, 20_000
SELDOM = {"DuckDB": SINGLE // 50}  #: calls of what takes long
HASHED = 16_000_000  #: keys up to which memory is spent on hash tables and a database
PERCENTILES = [50, 99, 99.9]
POSITIONS = 11  #: rounds of the moving range
CASE = ["keys", "n", "queries"]


def sorted_first(keys: Keys, queries: Keys) -> Any:
    """Search in order, which is kind to the cache, and put the answers back."""
    order = np.argsort(queries)
    ranks = np.empty(len(queries), dtype=np.int64)
    ranks[order] = np.searchsorted(keys, queries[order])
    return ranks


def adapted(keys: Keys, shape: str) -> Index:
    """An index that has seen such queries."""
    index = Index(keys)
    index.searchsorted(make_queries(shape, keys, BATCH, seed=3))
    index.adapt()
    return index


def batches(keys: Keys, shapes: list[str], rounds: int) -> Iterator[Row]:
    """Nanoseconds per query of each way to ask a whole array."""
    series, finders = polars.Series(keys), hashing(keys) if len(keys) <= HASHED else {}
    for shape in shapes:
        index, queries = adapted(keys, shape), make_queries(shape, keys, BATCH)
        expected, asked = np.searchsorted(keys, queries), polars.Series(queries)
        ways: dict[str, Callable[[], Any]] = {
            "doraemon": lambda index=index, q=queries: index.searchsorted(q),
            "np.searchsorted": lambda q=queries: np.searchsorted(keys, q),
            "sort + searchsorted": lambda q=queries: sorted_first(keys, q),
            "polars": lambda q=asked: series.search_sorted(q, side="left"),
            "position known": lambda at=expected: keys[at],
        }
        for name, (find, converted) in finders.items():
            ways[name] = partial(find, converted(queries))
        for name, way in ways.items():
            if name != "position known":
                np.testing.assert_array_equal(np.asarray(way()), expected, err_msg=name)
        seconds = in_turns({name: lambda turn, way=way: way() for name, way in ways.items()}, rounds)
        yield {"queries": shape, "ns": spreads(seconds, 1e9 / BATCH), "ratio": ratios(seconds, "doraemon")}


def hashing(keys: Keys) -> dict[str, tuple[Callable[[Any], Any], Callable[[Keys], Any]]]:
    """Ways to find the position of keys that are there, and what each wants the queries converted to before."""
    distinct, first = np.unique(keys, return_index=True)
    indexed, database = pandas.Index(distinct), Duck(signed(distinct), first)
    all_distinct = len(distinct) == len(keys)
    return {
        "hash table": (HashTable(keys).find, lambda queries: queries),
        "pandas": (indexed.get_indexer if all_distinct else lambda q: first[indexed.get_indexer(q)], lambda q: q),
        "DuckDB": (database.find, signed),
    }


def single(keys: Keys, shapes: list[str], rounds: int) -> Iterator[Row]:
    """Nanoseconds per call of each way to ask for one key, the loop's own time taken off."""
    keys = np.unique(keys)
    plain = keys.tolist()
    none = dict.fromkeys(plain, 0)
    tree = QQBTree()
    tree.update(none)
    ranked, pgm, indexed = SortedDict(none), PgmList(keys, "Q"), pandas.Index(keys)
    stored = [make(signed(keys), np.arange(len(keys))) for make in (Sqlite, Duck)]
    for shape in shapes:
        index, queries = adapted(keys, shape), make_queries(shape, keys, BATCH)
        converted = signed(queries).tolist()
        ways: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
            "doraemon rank": (index.bisect_left, queries.tolist()),
            "doraemon `in`": (index.__contains__, queries.tolist()),
            "pygm": (pgm.bisect_left, queries.tolist()),
            "SortedDict": (ranked.bisect_left, queries.tolist()),
            "bisect on a list": (lambda q: bisect_left(plain, q), queries.tolist()),
            "BTrees `in`": (tree.__contains__, queries.tolist()),
            "np.searchsorted": (keys.searchsorted, list(queries)),
            "pandas": (indexed.get_loc, queries.tolist()),
            "SQLite": (stored[0].read, converted),
            "DuckDB": (stored[1].read, converted),
            "dict `in`": (none.__contains__, queries.tolist()),
        }
        expected = np.searchsorted(keys, queries[:1000]).tolist()
        for name, (way, asked) in ways.items():
            if not name.endswith("`in`"):
                assert [way(q) for q in asked[:1000]] == expected, name

        def part(turn: int, name: str, asked: list[Any]) -> list[Any]:
            first = turn * SINGLE % (BATCH - SINGLE)  # others than the method before asked for
            return asked[first : first + SELDOM.get(name, SINGLE)]

        loop = min(in_turns({"": lambda turn, asked=converted: [None for _ in part(turn, "", asked)]}, 9)[""]) / SINGLE
        turns = {
            name: lambda turn, name=name, way=way, asked=asked: [way(q) for q in part(turn, name, asked)]
            for name, (way, asked) in ways.items()
        }
        seconds = {
            name: [value / SELDOM.get(name, SINGLE) - loop for value in values]
            for name, values in in_turns(turns, rounds).items()
        }
        tails = percentiles({name: (way, partial(part, name=name, asked=q)) for name, (way, q) in ways.items()}, rounds)
        found = {"ns": spreads(seconds, 1e9), "ratio": ratios(seconds, "doraemon rank"), "us, percentiles": tails}
        yield {"queries": shape, "loop ns": round(loop * 1e9, 1)} | found


def percentiles(
    ways: dict[str, tuple[Callable[[Any], Any], Callable[[int], list[Any]]]], rounds: int
) -> dict[str, list[float]]:
    """Microseconds of single calls: each way with what it is asked in a turn."""
    times: dict[str, list[int]] = {name: [] for name in ways}

    def each(name: str, turn: int) -> None:
        way, queries = ways[name]
        for query in queries(turn):
            begin = perf_counter_ns()
            way(query)
            times[name].append(perf_counter_ns() - begin)

    in_turns({name: partial(each, name) for name in ways}, rounds)
    return {name: [round(float(v) / 1e3, 2) for v in np.percentile(each, PERCENTILES)] for name, each in times.items()}


def moving(keys: Keys, rounds: int) -> Iterator[Row]:
    """Nanoseconds per query while the hot range moves, and milliseconds to follow it."""
    following, behind, never = Index(keys), adapted(keys, "90/10"), Index(keys)
    for position in range(POSITIONS):
        shift = 0.02 * position
        following.searchsorted(make_queries("90/10", keys, BATCH, seed=100 + position, shift=shift))
        adapting = seconds_of(following.adapt)
        asked = [make_queries("90/10", keys, BATCH, seed=200 + seed, shift=shift) for seed in range(3)]
        ways: dict[str, Callable[[int], Any]] = {
            name: lambda turn, index=index, asked=asked: index.searchsorted(asked[turn % len(asked)])
            for name, index in (("following", following), ("left behind", behind), ("never adapted", never))
        }
        ways["np.searchsorted"] = lambda turn, asked=asked: np.searchsorted(keys, asked[turn % len(asked)])
        ways["sort + searchsorted"] = lambda turn, asked=asked: sorted_first(keys, asked[turn % len(asked)])
        seconds = in_turns(ways, rounds)
        row = {
            "queries": "moving",
            "position": position,
            "adapt ms": round(adapting * 1e3, 3),
        }
        yield row | {"ns": spreads(seconds, 1e9 / BATCH), "ratio": ratios(seconds, "following")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["batches", "single", "moving"])
    parser.add_argument("--keys", nargs="+", choices=KEYS, default=["uniform"])
    parser.add_argument("--queries", nargs="+", choices=QUERIES, default=QUERIES)
    parser.add_argument("--n", nargs="+", type=int, default=[4_000_000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--text", nargs="*", type=Path)
    options = parser.parse_args()
    for name in options.keys:
        for n in options.n:
            keys = make_keys(name, n, text=options.text)
            if options.part == "moving":
                found = moving(keys, options.rounds)
            else:
                found = (batches if options.part == "batches" else single)(keys, options.queries, options.rounds)
            for figures in found:
                row = {"keys": name, "n": n, "rounds": options.rounds} | figures
                show(row)
                by = [*CASE, "position"] if options.part == "moving" else CASE
                keep(f"lookups_{options.part}", [row], by)


if __name__ == "__main__":
    main()
