"""Lookups: ours, what a Python user would pick today, and the floors beneath both; one thread.

    python benchmarks/doraemon/lookups.py [--keys uniform ...] [--queries uniform ...] [--n 4000000 ...]

Needs `pip install sortedcontainers BTrees pygm polars`. Every method answers every query the same, which is checked.
"position known" is the gather of keys whose positions are given, and "dict" a hash table from Python: neither answers
rank queries; they are the floors.
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars
from BTrees.QQBTree import QQBTree
from inputs import KEYS, QUERIES, Keys, make_keys, make_queries
from pygm import SortedList as PgmList
from sortedcontainers import SortedDict
from timing import best, table, write

from doraemon import Index

BATCH, SINGLE = 1_000_000, 50_000


def sorted_first(keys: Keys, queries: Keys) -> Any:
    """Search in order, which is kind to the cache, and put the answers back."""
    order = np.argsort(queries)
    ranks = np.empty(len(queries), dtype=np.int64)
    ranks[order] = np.searchsorted(keys, queries[order])
    return ranks


def batches(index: Index, keys: Keys, queries: Keys) -> dict[str, float]:
    """Nanoseconds per query of each way to ask a whole array."""
    expected, series = np.searchsorted(keys, queries), polars.Series(keys)
    asked = polars.Series(queries)
    ways: dict[str, Callable[[], Any]] = {
        "position known": lambda: keys[expected],
        "doraemon": lambda: index.searchsorted(queries),
        "np.searchsorted": lambda: np.searchsorted(keys, queries),
        "sort + searchsorted": lambda: sorted_first(keys, queries),
        "polars": lambda: series.search_sorted(asked, side="left"),
    }
    for name, way in ways.items():
        if name != "position known":
            np.testing.assert_array_equal(np.asarray(way()), expected, err_msg=name)
    return {name: best(way, 4) / len(queries) * 1e9 for name, way in ways.items()}


def one_by_one(index: Index, keys: Keys, queries: Keys, rivals: dict[str, Any]) -> dict[str, float]:
    """Nanoseconds per call of each way to ask for one key, the loop's own time taken off."""
    plain, arrays = queries.tolist(), list(queries)
    ways: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
        "dict": (rivals["dict"].__contains__, plain),
        "doraemon `in`": (index.__contains__, plain),
        "doraemon rank": (index.bisect_left, plain),
        "bisect on a list": (lambda q: bisect_left(rivals["list"], q), plain),
        "np.searchsorted": (keys.searchsorted, arrays),
        "SortedDict": (rivals["SortedDict"].bisect_left, plain),
        "BTrees `in`": (rivals["BTrees"].__contains__, plain),
        "pygm": (rivals["pygm"].bisect_left, plain),
    }
    expected = np.searchsorted(keys, queries).tolist()
    for name in ("doraemon rank", "bisect on a list", "np.searchsorted", "SortedDict", "pygm"):
        way, asked = ways[name]
        assert [way(q) for q in asked[:1000]] == expected[:1000], name
    empty = best(lambda: [None for _ in plain])
    return {
        name: (best(lambda way=way, asked=asked: [way(q) for q in asked], 3) - empty) / len(plain) * 1e9
        for name, (way, asked) in ways.items()
    }


def make_rivals(keys: Keys) -> dict[str, Any]:
    plain = keys.tolist()
    none = dict.fromkeys(plain, 0)
    tree = QQBTree()
    tree.update(none)
    return {"dict": none, "list": plain, "SortedDict": SortedDict(none), "BTrees": tree, "pygm": PgmList(keys, "Q")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", nargs="+", choices=KEYS, default=["uniform"])
    parser.add_argument("--queries", nargs="+", choices=QUERIES, default=QUERIES)
    parser.add_argument("--n", nargs="+", type=int, default=[4_000_000])
    parser.add_argument("--text", nargs="*", type=Path)
    parser.add_argument("--batches-only", action="store_true", help="leave out the ways that ask one by one")
    options = parser.parse_args()
    many: list[dict[str, Any]] = []
    single: list[dict[str, Any]] = []
    for name in options.keys:
        for n in options.n:
            keys = make_keys(name, n, text=options.text)
            rivals = {} if options.batches_only else make_rivals(keys)
            for shape in options.queries:
                case = {"keys": name, "n": n, "queries": shape}
                index, queries = Index(keys), make_queries(shape, keys, BATCH)
                index.searchsorted(make_queries(shape, keys, BATCH, seed=3))
                index.adapt()
                many.append(case | batches(index, keys, queries))
                if rivals:
                    single.append(case | one_by_one(index, keys, queries[:SINGLE], rivals))
    table("ns per query, batches", many)
    write("lookups_batches", many)
    if single:
        table("ns per call, one by one", single)
        write("lookups_single", single)


if __name__ == "__main__":
    main()
