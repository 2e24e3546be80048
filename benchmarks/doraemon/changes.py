"""Building, refitting for another workload, and writing; one thread.

    python benchmarks/doraemon/changes.py building|adapting|writing [--n 4000000 ...]

building    from sorted and from shuffled keys, beside np.sort alone
adapting    refit: every bucket fitted anew for the workload, as without a memory of fits; adapt: after the hot keys
            (90 % of the queries in 2 % of the keys) moved by 2 % of the keys; again: once more, as they have stayed
            there; return: adapting back to the workload before, which was adapted to twice. Each round does all four,
            at another place of the keys
writing     inserts of new keys in batches, merges counted: they end with the first merge after 10 % more keys. Keys
            above all others in batches, 10 % more of them, after a merge. Then what changes not yet merged cost
            lookups. Changes one at a time are in single.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from inputs import Keys, make_keys, make_queries
from timing import Row, in_turns, keep, ratios, seconds_of, show, spread, spreads

from doraemon import Index
from doraemon.model import build

SMALL = 4_000_000  #: keys up to which what takes long is timed as well
ASKED = 4_000_000  #: queries that are made at once


def building(keys: Keys, rounds: int) -> Row:
    """Milliseconds to make an index."""
    shuffled = np.random.default_rng(4).permutation(keys)
    signed = (keys >> np.uint64(1)).astype(np.int64)
    ways: dict[str, Callable[[int], Any]] = {
        "sorted": lambda _: Index(keys),
        "sorted int64": lambda _: Index(signed),
        "shuffled": lambda _: Index(shuffled),
        "np.sort": lambda _: np.sort(shuffled),
    }
    if len(keys) <= SMALL:
        ways["sorted, NumPy engine"] = lambda _: Index(keys, engine="numpy")
    return {"ms": spreads(in_turns(ways, rounds), 1e3)}


def adapting(keys: Keys, rounds: int) -> Row:
    """Milliseconds of a full refit, of following a hot range that moved, and of returning."""
    index = Index(keys)
    seconds: dict[str, list[float]] = {"refit": [], "adapt": [], "again": [], "return": []}
    counts: dict[str, list[int]] = {"changed": [], "refitted": [], "recalled": []}

    def follow(place: float) -> tuple[float, Any]:
        queries = make_queries("90/2", keys, min(len(keys), ASKED), seed=int(1000 * place), shift=place)
        for _ in range(-(-min(len(keys), 8 * ASKED) // len(queries))):
            index.searchsorted(queries)
        reports: list[Any] = []
        return seconds_of(lambda: reports.append(index.adapt())), reports[0]

    for round_ in range(rounds):
        place = 0.05 * round_
        follow(place)
        follow(place)
        for name, now in (("adapt", place + 0.02), ("again", place + 0.02), ("return", place)):
            spent, report = follow(now)
            seconds[name].append(spent)
            if name == "adapt":
                counts["changed"].append(report.changed)
                counts["refitted"].append(report.refitted)
            elif name == "return":
                counts["recalled"].append(int(report.recalled or report.hot.recalled))
        run = index._state.run
        seconds["refit"].append(seconds_of(lambda run=run: build(run.codes, index._state.engine, run.trained)))
    faster = {
        name: spread([full / part for full, part in zip(seconds["refit"], seconds[name], strict=True)])
        for name in ("adapt", "again", "return")
    }
    means = {name: round(float(np.mean(values)), 2) for name, values in counts.items()}
    return {"buckets": index.explain().buckets, "ms": spreads(seconds, 1e3), "faster": faster} | means


def inserted(keys: Keys, more: Keys, size: int) -> tuple[float, int]:
    """Seconds per key of inserting in batches until a merge, and how many keys that was."""
    index, count = Index(keys), 0

    def insert_all() -> None:
        nonlocal count
        while count < len(keys) // 10 or index._state.changes:
            index.extend(more[count : count + size])
            count += size

    return seconds_of(insert_all) / count, count


def appended(keys: Keys, size: int) -> float:
    """Seconds per key of inserting keys above all others in batches, into an index that was merged before."""
    index = Index(keys >> np.uint64(1))
    index.extend([0])
    index.compact()
    more = np.arange(len(keys) // 10, dtype=np.uint64) + np.uint64(2**63)

    def append_all() -> None:
        for first in range(0, len(more), size):
            index.extend(more[first : first + size])

    return seconds_of(append_all) / len(more)


def writing(keys: Keys, rounds: int) -> Row:
    """Nanoseconds per inserted key in batches, and per lookup before a merge and after."""
    more = np.random.default_rng(5).integers(0, 2**64 - 1, len(keys) // 4, dtype=np.uint64)
    row: Row = {}
    for size in sorted({10_000, max(10_000, len(keys) // 400)}):
        times = [inserted(keys, more, size) for _ in range(rounds)]
        row[f"insert ns, batches of {size}"] = spread([seconds * 1e9 for seconds, _ in times])
    row["append ns"] = spread([appended(keys, 10_000) * 1e9 for _ in range(rounds)])
    index = Index(keys, merging="manual")
    for part in np.array_split(more[: len(keys) // 16], 25):
        index.extend(part)
    merged = index.copy()
    merged.compact()
    queries = make_queries("uniform", keys, 1_000_000)
    lookups = {"merged": lambda _: merged.searchsorted(queries), "unmerged": lambda _: index.searchsorted(queries)}
    seconds = in_turns(lookups, 2 * rounds + 1)
    row |= {"lookup ns": spreads(seconds, 1e3), "lookup ratio": ratios(seconds, "merged")}
    return row


PARTS: dict[str, Callable[[Keys, int], Row]] = {"building": building, "adapting": adapting, "writing": writing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--n", nargs="+", type=int, default=[4_000_000])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for n in options.n:
        row = {"n": n, "rounds": options.rounds} | PARTS[options.part](make_keys("uniform", n), options.rounds)
        show(row)
        keep(f"changes_{options.part}", [row], ["n"])


if __name__ == "__main__":
    main()
