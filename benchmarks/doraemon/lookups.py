"""Lookups: ours, what a Python user would pick today, and the floors beneath both; one thread.

    python benchmarks/doraemon/lookups.py batches|single|moving [--keys uniform ...] [--queries zipf ...] [--n 4000000]

Needs `pip install sortedcontainers BTrees pygm polars`. Every method answers every query the same, which is checked.
The methods take turns. What is measured is added to benchmarks/results/doraemon, in place of what was known of the same
keys, queries and number, so the parts can be run on their own.

batches    a million queries at once. The floors: "position known", the gather of keys whose positions are given, and
           "hash table", of NumPy; neither answers questions of order.
single     one query per call, of distinct keys, as some of the rivals hold no others. The floor: `in` of a dict. `in`
           and rank are both asked of ours.
moving     90 % of the queries in a range of 10 % of the keys that moves by 2 % of the keys from position to position.
           At each the index sees a million queries of it. "following" then adapts, "left behind" adapted to the first
           range only, "never adapted" is as it was built. What is timed asks other queries of the same range.
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars
from BTrees.QQBTree import QQBTree
from hashing import HashTable
from inputs import KEYS, QUERIES, Keys, make_keys, make_queries
from pygm import SortedList as PgmList
from sortedcontainers import SortedDict
from timing import Row, in_turns, keep, ratios, seconds_of, show, spreads

from doraemon import Index

BATCH, SINGLE = 1_000_000, 20_000
HASHED = 16_000_000  #: keys up to which memory is spent on a hash table
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
    series, hashed = polars.Series(keys), HashTable(keys) if len(keys) <= HASHED else None
    for shape in shapes:
        index, queries = adapted(keys, shape), make_queries(shape, keys, BATCH)
        expected, asked = np.searchsorted(keys, queries), polars.Series(queries)
        ways: dict[str, Callable[[], Any]] = {
            "doraemon": lambda index=index, q=queries: index.searchsorted(q),
            "np.searchsorted": lambda q=queries: np.searchsorted(keys, q),
            "sort + searchsorted": lambda q=queries: sorted_first(keys, q),
            "polars": lambda q=asked: series.search_sorted(q, side="left"),
            "hash table": lambda q=queries: hashed.find(q) if hashed else None,
            "position known": lambda at=expected: keys[at],
        }
        if hashed is None:
            del ways["hash table"]
        for name, way in ways.items():
            if name != "position known":
                np.testing.assert_array_equal(np.asarray(way()), expected, err_msg=name)
        seconds = in_turns({name: lambda turn, way=way: way() for name, way in ways.items()}, rounds)
        yield {"queries": shape, "ns": spreads(seconds, 1e9 / BATCH), "ratio": ratios(seconds, "doraemon")}


def single(keys: Keys, shapes: list[str], rounds: int) -> Iterator[Row]:
    """Nanoseconds per call of each way to ask for one key, the loop's own time taken off."""
    plain = keys.tolist()
    none = dict.fromkeys(plain, 0)
    tree = QQBTree()
    tree.update(none)
    ranked, pgm = SortedDict(none), PgmList(keys, "Q")
    for shape in shapes:
        index, queries = adapted(keys, shape), make_queries(shape, keys, BATCH)
        ways: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
            "doraemon rank": (index.bisect_left, queries.tolist()),
            "doraemon `in`": (index.__contains__, queries.tolist()),
            "pygm": (pgm.bisect_left, queries.tolist()),
            "SortedDict": (ranked.bisect_left, queries.tolist()),
            "bisect on a list": (lambda q: bisect_left(plain, q), queries.tolist()),
            "BTrees `in`": (tree.__contains__, queries.tolist()),
            "np.searchsorted": (keys.searchsorted, list(queries)),
            "dict `in`": (none.__contains__, queries.tolist()),
        }
        expected = np.searchsorted(keys, queries[:1000]).tolist()
        for name in ("doraemon rank", "pygm", "SortedDict", "bisect on a list", "np.searchsorted"):
            way, asked = ways[name]
            assert [way(q) for q in asked[:1000]] == expected, name

        def part(turn: int, asked: list[Any], way: Callable[[Any], Any] | None) -> None:
            first = turn * SINGLE % (BATCH - SINGLE)  # others than the method before asked for
            chosen = asked[first : first + SINGLE]
            [way(q) for q in chosen] if way else [None for _ in chosen]

        loop = min(in_turns({"loop": lambda turn, plain=plain: part(turn, plain, None)}, 9)["loop"])
        turns = {name: lambda t, asked=asked, way=way: part(t, asked, way) for name, (way, asked) in ways.items()}
        seconds = {name: [value - loop for value in values] for name, values in in_turns(turns, rounds).items()}
        found = {"ns": spreads(seconds, 1e9 / SINGLE), "ratio": ratios(seconds, "doraemon rank")}
        yield {"queries": shape, "loop ns": round(loop / SINGLE * 1e9, 1)} | found


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
