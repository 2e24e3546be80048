"""Changes one by one, and the mixes of YCSB."""

from __future__ import annotations

from .measured import Results, Section
from .tables import figure, millions, spread, table, times

INSERTS = """A new key, and a question about it after each: its rank, or of BTrees, which count nothing, `in`. After
10,000 the same keys are removed one by one, which leaves the delta short: folds are in the times, merges are not."""
YCSB = """Maps of int64 to int64, 3.75M keys, asked and changed one operation at a time, keys
zipfian of exponent 0.99 and scattered. Folds into the delta are in the times; a merge, due after n/16 changes,
seldom comes. A: half reads, half updates. B: 95 % reads, 5 % updates. C: reads. D: 95 % reads of late keys, 5 %
inserts. E: 95 % scans of up to 100 keys, 5 % inserts. F: half reads, half reads that update what they read.
SortedList holds pairs; SortedDict reads and updates in a dict; SQLite and DuckDB, where they are listed, are tables in
memory with a primary key, and DuckDB had 200 operations a round. The percentiles are of operations timed alone, the
clock's own time included."""


def inserts(results: Results) -> str:
    rows = []
    for row in results.rows["single_inserts"]:
        for name, microseconds in row["insert + rank us"].items():
            faster = times(row["ratio"][name]) if name in row["ratio"] else "-"
            cells = [spread(microseconds), faster, spread(row["discard us"][name])]
            rows.append([millions(row["n"]), name, *cells])
    return table(["n", "", "us, insert + rank", "ours over it", "us, discard"], rows)


def ycsb(results: Results) -> str:
    rows = []
    for row in results.rows["single_ycsb"]:
        for name, nanoseconds in row["ns"].items():
            faster = times(row["ratio"][name]) if name in row["ratio"] else "-"
            tail = [figure(value) for value in row["us, percentiles"][name]]
            rows.append([row["mix"], name, spread(nanoseconds), faster, *tail])
    return table(["mix", "", "ns per operation", "ours over it", "us, median", "us, 99 %", "us, 99.9 %"], rows)


SECTIONS = [
    Section("Changes one by one", INSERTS, inserts, "single_inserts"),
    Section("YCSB's mixes", YCSB, ycsb, "single_ycsb"),
]
