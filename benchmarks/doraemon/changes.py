"""Building, refitting for another workload, and writing; one thread.

    python benchmarks/doraemon/changes.py [--n 4000000]

refit all       fitting every bucket anew, as without a memory of fits
adapt           after the hot keys (90 % of the queries in 2 % of the keys) moved by 2 % of the keys
return          adapting back to the workload before, which is remembered
inserts         in batches of 10,000, or n / 400 if that is more, until 10 % more keys, merges counted
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from inputs import Keys, make_keys, make_queries
from timing import best, table, write

from doraemon import Index
from doraemon.model import build


def adapting(keys: Keys) -> dict[str, Any]:
    """Milliseconds of a full refit, of following a hot range that moved, and of returning."""
    index = Index(keys)
    row: dict[str, Any] = {"refit all ms": best(lambda: build(index._state.run.codes, index._state.engine), 3) * 1e3}
    for name, shift in (("first", 0.0), ("adapt", 0.02), ("return", 0.0)):
        for seed in range(8):
            index.searchsorted(make_queries("90/2", keys, len(keys) // 8, seed=seed, shift=shift))
        begin = time.perf_counter()
        report = index.adapt()
        row[f"{name} ms"] = (time.perf_counter() - begin) * 1e3
        row[f"{name} changed"], row[f"{name} refitted"] = report.changed, report.refitted
        row[f"{name} recalled"] = report.recalled
    row["buckets"] = index.explain().buckets
    return row


def building(keys: Keys) -> dict[str, Any]:
    """Milliseconds to make an index."""
    shuffled = np.random.default_rng(4).permutation(keys)
    signed = (keys >> np.uint64(1)).astype(np.int64)
    return {
        "sorted ms": best(lambda: Index(keys), 3) * 1e3,
        "sorted int64 ms": best(lambda: Index(signed), 3) * 1e3,
        "shuffled ms": best(lambda: Index(shuffled), 3) * 1e3,
        "np.sort ms": best(lambda: np.sort(shuffled), 3) * 1e3,
        "NumPy engine ms": best(lambda: Index(keys, engine="numpy"), 1) * 1e3,
    }


def writing(keys: Keys) -> dict[str, Any]:
    """Nanoseconds per inserted key."""
    more = np.random.default_rng(5).integers(0, 2**64 - 1, len(keys) // 10, dtype=np.uint64)
    index, size = Index(keys), max(10_000, len(keys) // 400)
    begin = time.perf_counter()
    for first in range(0, len(more), size):
        index.extend(more[first : first + size])
    batched = (time.perf_counter() - begin) / len(more) * 1e9
    queries = make_queries("uniform", keys, 1_000_000)
    row = {"inserts ns": batched, "delta": index.explain().delta_entries}
    row["lookup with delta ns"] = best(lambda: index.searchsorted(queries)) * 1e3
    index.compact()
    row["lookup merged ns"] = best(lambda: index.searchsorted(queries)) * 1e3
    some = more[:5000].tolist()
    begin = time.perf_counter()
    for key in some:
        index.insert(key)
    row["one insert us"] = (time.perf_counter() - begin) / len(some) * 1e6
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", nargs="+", type=int, default=[4_000_000])
    rows: dict[str, list[dict[str, Any]]] = {"building": [], "adapting": [], "writing": []}
    for n in parser.parse_args().n:
        keys = make_keys("uniform", n)
        for name, measure in (("building", building), ("adapting", adapting), ("writing", writing)):
            rows[name].append({"n": n} | measure(keys))
    for name, figures in rows.items():
        table(name, figures)
    write("changes", [a | b | c for a, b, c in zip(*rows.values(), strict=True)])


if __name__ == "__main__":
    main()
