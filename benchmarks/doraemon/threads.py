"""Batches that threads share: `Index(..., threads=2)` beside one thread and beside `np.searchsorted`.

    python benchmarks/doraemon/threads.py [--n 4000000 64000000] [--threads 2] [--rounds 11]

A million uniform queries at once over uniform keys, those of `count` in pairs. Needs as many free cores as threads: on
fewer, what is measured is what the threads cost. All take turns, and answers are compared.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from inputs import Keys, make_keys, make_queries
from timing import Row, in_turns, keep, ratios, show, spreads

from doraemon import Index

BATCH = 1_000_000


def questions(index: Index) -> dict[str, Callable[[Keys], Any]]:
    """What threads share."""
    return {
        "searchsorted": index.searchsorted,
        "contains": index.contains,
        "get_many": index.get_many,
        "count": lambda queries: index.count(queries[::2], queries[1::2]),
    }


def shared(keys: Keys, threads: int, rounds: int) -> list[Row]:
    """Nanoseconds per query of each question, and how many times as long one thread takes as all."""
    keys = np.unique(keys)
    indexes = {f"{number} threads": Index(keys, keys, threads=number) for number in (1, threads)}
    asked = [make_queries("uniform", keys, BATCH, 3000 + turn) for turn in range(8)]
    rows = []
    asking = {label: questions(index) for label, index in indexes.items()}
    for name in asking["1 threads"]:
        ways: dict[str, Callable[[int], Any]] = {
            label: lambda turn, ask=asks[name]: ask(asked[turn % 8]) for label, asks in asking.items()
        }
        first = [way(0) for way in ways.values()]
        np.testing.assert_array_equal(first[0], first[1])
        ways["np.searchsorted"] = lambda turn: np.searchsorted(keys, asked[turn % 8])
        seconds = in_turns(ways, rounds, time.perf_counter)
        row: Row = {"question": name, "threads": threads, "ns": spreads(seconds, 1e9 / BATCH)}
        rows.append(row | {"ratio": ratios(seconds, f"{threads} threads")})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", nargs="+", type=int, default=[4_000_000, 64_000_000])
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores")
    for n in options.n:
        keys = make_keys("uniform", n)
        for threads in options.threads:
            for figures in shared(keys, threads, options.rounds):
                row = {"n": n, "cores": len(os.sched_getaffinity(0)), "rounds": options.rounds} | figures
                show(row)
                keep("threads", [row], ["n", "threads", "question"])


if __name__ == "__main__":
    main()
