"""Changes one at a time with questions between, as the field measures them: YCSB's mixes; one thread.

    python benchmarks/doraemon/single.py inserts|ycsb [--n 4000000] [--rounds 7]

Needs `pip install sortedcontainers BTrees duckdb pyarrow`. All take turns, answer the same operations, and are checked
to agree.

inserts    a new key, then its rank; of BTrees, which count nothing, `in`. Then the key is removed again
ycsb       10,000 operations a round over maps of int64, keys zipfian of exponent 0.99 and scattered. A: half reads,
           half updates. B: 95 % reads. C: reads. D: 95 % reads of late keys, 5 % inserts. E: 95 % scans of up to 100,
           5 % inserts. F: half reads, half reads that update what they read. The SortedList holds pairs, SortedDict is
           a dict for reads and updates. SQLite and DuckDB are tables in memory; DuckDB has 200 operations a round, of
           the same kind. Throughputs first, then each operation timed alone for the percentiles
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from time import perf_counter_ns
from typing import Any

import numpy as np
from BTrees.QQBTree import QQBTree, QQTreeSet
from databases import Duck, Sqlite
from inputs import Keys, make_keys
from sortedcontainers import SortedDict, SortedList
from timing import Row, Seconds, keep, ratios, seconds_of, show, spreads

from doraemon import Index

OPERATIONS, FEW = 10_000, 200
READ, UPDATE, INSERT, SCAN, MODIFY = range(5)
MIXES = {
    "A": {READ: 0.5, UPDATE: 0.5},
    "B": {READ: 0.95, UPDATE: 0.05},
    "C": {READ: 1.0},
    "D": {READ: 0.95, INSERT: 0.05},
    "E": {SCAN: 0.95, INSERT: 0.05},
    "F": {READ: 0.5, MODIFY: 0.5},
}
PERCENTILES = [50, 99, 99.9]
Operation = tuple[int, int, int]  #: kind, key, and the value or the length of a scan
Table = list[Callable[[int, int], Any]]  #: what does each kind of operation


def ours(pairs: dict[int, int]) -> Table:
    index = Index(np.fromiter(pairs, np.int64), np.fromiter(pairs.values(), np.int64))

    def scan(key: int, length: int) -> int:
        return len(index.items(key, limit=length)[0])

    def modify(key: int, value: int) -> None:
        index.update(key, int(index[key]) + value)

    return [index.get, index.update, index.insert, scan, modify]


def sorted_list(pairs: dict[int, int]) -> Table:
    held = SortedList(pairs.items())

    def read(key: int, default: int) -> int:
        at = held.bisect_left((key,))
        found = held[at] if at < len(held) else (None, None)
        return found[1] if found[0] == key else default

    def update(key: int, value: int) -> None:
        del held[held.bisect_left((key,))]
        held.add((key, value))

    def scan(key: int, length: int) -> int:
        return len(list(islice(held.irange((key,)), length)))

    return [read, update, lambda key, value: held.add((key, value)), scan, lambda k, v: update(k, read(k, 0) + v)]


def sorted_dict(pairs: dict[int, int]) -> Table:
    held = SortedDict(pairs)

    def scan(key: int, length: int) -> int:
        return len([(k, held[k]) for k in islice(held.irange(key), length)])

    def modify(key: int, value: int) -> None:
        held[key] = held[key] + value

    return [held.get, held.__setitem__, held.__setitem__, scan, modify]


def btrees(pairs: dict[int, int]) -> Table:
    held = QQBTree()
    held.update(pairs)

    def scan(key: int, length: int) -> int:
        return len(list(islice(held.iteritems(key), length)))

    def modify(key: int, value: int) -> None:
        held[key] = held[key] + value

    return [held.get, held.__setitem__, held.__setitem__, scan, modify]


def database(make: type[Sqlite | Duck], pairs: dict[int, int]) -> Table:
    held = make(np.fromiter(pairs, np.int64), np.fromiter(pairs.values(), np.int64))
    return [held.read, held.update, held.insert, held.scan, held.modify]


WAYS: dict[str, Callable[[dict[int, int]], Table]] = {
    "doraemon": ours,
    "SortedList": sorted_list,
    "SortedDict": sorted_dict,
    "BTrees": btrees,
    "SQLite": partial(database, Sqlite),
}
#: what takes long, and what its answers are compared with
SLOW: dict[str, Callable[[dict[int, int]], Table]] = {"DuckDB": partial(database, Duck), "a dict": sorted_dict}


class Mixer:
    """Makes operations; keys inserted by one batch of them may be read by the next."""

    def __init__(self, mix: dict[int, float], keys: list[int], spare: Iterator[int]) -> None:
        self.mix, self.keys, self.spare = mix, keys.copy(), spare
        self.rng = np.random.default_rng(6)
        weights = np.cumsum(np.arange(1, len(keys) + 1, dtype=np.float64) ** -0.99)
        self.shares = weights / weights[-1]

    def operations(self, count: int) -> list[Operation]:
        kinds = self.rng.choice(list(self.mix), count, p=list(self.mix.values())).tolist()
        ranks = np.searchsorted(self.shares, self.rng.random(count)).tolist()
        extra = self.rng.integers(1, 101, count).tolist()
        return [self._operation(*each) for each in zip(kinds, ranks, extra, strict=True)]

    def _operation(self, kind: int, rank: int, extra: int) -> Operation:
        if kind == INSERT:
            self.keys.append(next(self.spare))
            return kind, self.keys[-1], extra
        return kind, self.keys[-1 - rank], extra  # the order of the first keys is shuffled: scattered, or late ones


def together(table: Table, operations: list[Operation]) -> None:
    for kind, key, extra in operations:
        table[kind](key, extra)


def one_by_one(table: Table, operations: list[Operation]) -> tuple[list[int], int]:
    """Nanoseconds of each operation, and the sum of what was read or scanned."""
    times, total = [], 0
    for kind, key, extra in operations:
        begin = perf_counter_ns()
        answer = table[kind](key, extra)
        times.append(perf_counter_ns() - begin)
        total += int(answer) if kind in (READ, SCAN) else 0
    return times, total


def rotated(names: list[str], round_: int) -> list[str]:
    first = round_ % len(names)
    return names[first:] + names[:first]


def mixed(tables: dict[str, Table], mixer: Mixer, count: int, rounds: int) -> tuple[Seconds, dict[str, list[int]]]:
    """Seconds per operation of each round, and nanoseconds of single operations."""
    seconds: Seconds = {way: [] for way in tables}
    singles: dict[str, list[int]] = {way: [] for way in tables}
    for round_ in range(rounds):
        operations, timed = mixer.operations(count), mixer.operations(count)
        for way in rotated(list(tables), round_):
            taken = seconds_of(lambda way=way, some=operations: together(tables[way], some))
            seconds[way].append(taken / count)
        totals = set()
        for way in rotated(list(tables), round_):
            times, total = one_by_one(tables[way], timed)
            singles[way] += times
            totals.add(total)
        assert len(totals) == 1, "the answers differ"
    return seconds, singles


def ycsb(keys: Keys, rounds: int) -> Iterator[Row]:
    """Nanoseconds per operation and percentiles of single ones, of each mix."""
    rng = np.random.default_rng(5)
    plain = rng.permutation(np.unique(keys >> np.uint64(1))).tolist()
    first = len(plain) * 15 // 16
    groups = [
        ({name: make(dict.fromkeys(plain[:first], 1)) for name, make in ways.items()}, count, iter(plain[first:]))
        for ways, count in ((WAYS, OPERATIONS), (SLOW, FEW))
    ]
    held = [plain[:first]] * len(groups)
    gc.freeze()
    for name, mix in MIXES.items():
        seconds: Seconds = {}
        singles: dict[str, list[int]] = {}
        for number, (tables, count, spare) in enumerate(groups):
            mixer = Mixer(mix, held[number], spare)
            throughput, latency = mixed(tables, mixer, count, rounds)
            held[number] = mixer.keys
            seconds |= throughput
            singles |= latency
        del seconds["a dict"], singles["a dict"]
        tails = {way: [round(float(v) / 1e3, 2) for v in np.percentile(t, PERCENTILES)] for way, t in singles.items()}
        yield {"mix": name, "ns": spreads(seconds, 1e9), "ratio": ratios(seconds, "doraemon")} | {
            "us, percentiles": tails
        }


def inserts(keys: Keys, rounds: int) -> Iterator[Row]:
    """Microseconds of an insert and a question, and of a removal."""
    plain = keys.tolist()
    more = np.random.default_rng(5).integers(0, 2**64 - 1, OPERATIONS * rounds, dtype=np.uint64).tolist()
    index, listed, tree = Index(keys), SortedList(plain), QQTreeSet(plain)
    ways: dict[str, tuple[Callable[[int], Any], Callable[[int], Any], Callable[[int], Any]]] = {
        "doraemon": (index.insert, index.bisect_left, index.discard),
        "SortedList": (listed.add, listed.bisect_left, listed.discard),
        "BTrees": (tree.add, tree.__contains__, tree.remove),
    }

    def add_and_ask(add: Callable[[int], Any], ask: Callable[[int], Any], some: list[int]) -> None:
        for key in some:
            add(key)
            ask(key)

    def each(step: Callable[[int], Any], some: list[int]) -> None:
        for key in some:
            step(key)

    added: dict[str, list[float]] = {way: [] for way in ways}
    gone: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(rounds):
        some = more[round_ * OPERATIONS :][:OPERATIONS]
        for way in rotated(list(ways), round_):
            add, ask, remove = ways[way]
            added[way].append(seconds_of(lambda add=add, ask=ask, some=some: add_and_ask(add, ask, some)))
            gone[way].append(seconds_of(lambda remove=remove, some=some: each(remove, some)))
    assert index.keys().tolist() == list(listed) == list(tree)
    scale = 1e6 / OPERATIONS
    yield {
        "insert + rank us": spreads(added, scale),
        "ratio": ratios(added, "doraemon"),
        "discard us": spreads(gone, scale),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["inserts", "ycsb"])
    parser.add_argument("--n", nargs="+", type=int, default=[4_000_000])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for n in options.n:
        for figures in (ycsb if options.part == "ycsb" else inserts)(make_keys("uniform", n), options.rounds):
            row = {"n": n, "rounds": options.rounds} | figures
            show(row)
            keep(f"single_{options.part}", [row], ["n", "mix"] if options.part == "ycsb" else ["n"])


if __name__ == "__main__":
    main()
