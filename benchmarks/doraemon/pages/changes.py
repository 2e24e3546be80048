"""Building, adapting, and changes in batches."""

from __future__ import annotations

from collections.abc import Iterator

from .measured import LARGE, TARGET, Results, Section
from .tables import figure, millions, spread, table

ADAPTING = """90 % of the queries in 2 % of the keys, which then move by 2 % of the keys, stay there, and go back, at
another place in each round. "refit" fits all buckets for the same accesses. "adapt" is the first `adapt()` after the
move, and "again" the second, which makes and times tables of hot keys where the first found it too early: a refit makes
none. "return" goes back to a workload that was adapted to twice, whose table and leaves are remembered. Where a small
table has learned what moved, each only puts the copy in its place, and there is nothing to recall. The smaller the
index, the more of the rest is the same few dozen NumPy calls whatever is fitted."""
WRITING = """Inserts of new keys, from a merge to the first merge after 10 % more keys, so that all of their cost is
counted. Then lookups in batches with the most changes that an index leaves unmerged."""


def building(results: Results) -> str:
    names = ["sorted", "sorted int64", "shuffled", "np.sort", "sorted, NumPy engine"]
    rows = [
        [millions(row["n"]), *(spread(row["ms"][name]) if name in row["ms"] else "-" for name in names)]
        for row in results.rows["changes_building"]
    ]
    return table(["n", *(f"ms, {name}" for name in names)], rows)


def adapting(results: Results) -> str:
    rows = []
    for row in results.rows["changes_adapting"]:
        cells = [spread(row["ms"][name]) for name in ("refit", "adapt", "again", "return")]
        cells += [spread(row["faster"][name], "x") for name in ("adapt", "return")]
        rows.append([millions(row["n"]), str(row["buckets"]), *cells, figure(row["refitted"])])
    names = [
        "n",
        "buckets",
        "ms, refit",
        "ms, adapt",
        "ms, again",
        "ms, return",
        "adapt over refit",
        "return over refit",
    ]
    return table([*names, "buckets fitted by adapt"], rows)


def writing(results: Results) -> str:
    rows = []
    for row in results.rows["changes_writing"]:
        sizes = {int(name.rsplit(" ", 1)[1]): value for name, value in row.items() if name.startswith("insert ns")}
        larger = max(sizes)
        cells = [spread(sizes[10_000]), f"{spread(sizes[larger])}, of {larger:,}" if larger > 10_000 else "-"]
        cells.append(spread(row["append ns"]) if "append ns" in row else "-")
        cells += [figure(row["lookup ns"][name][1]) for name in ("merged", "unmerged")]
        rows.append([millions(row["n"]), *cells])
    names = ["n", "ns per insert, batches of 10,000", "ns per insert, larger batches", "ns per appended key"]
    return table([*names, "ns per lookup, merged", "ns per lookup, n/16 unmerged"], rows)


def costly_changes(results: Results) -> Iterator[str]:
    row, large = (results.one("changes_writing", n=n) for n in (TARGET, LARGE))
    for each in results.rows["single_ycsb"]:
        for name, ratio in each["ratio"].items():
            if ratio[1] < 1:
                yield f"YCSB's mix {each['mix']}, one by one: {name} is {figure(1 / ratio[1])} times as fast."
    cost = figure(large["insert ns, batches of 10000"][1])
    yield f"Batches of 10,000 into 64M keys cost {cost} ns per insert, as merges copy all keys and fit them anew."
    slower = [figure(each["lookup ratio"]["unmerged"][1]) for each in (row, large)]
    yield f"With n/16 changes unmerged, lookups take {slower[0]} times as long at 4M keys, {slower[1]} times at 64M."


SECTIONS = [
    Section("Building", "From keys in order and in none, beside sorting alone.", building, "changes_building"),
    Section("Adapting", ADAPTING, adapting, "changes_adapting"),
    Section("Writing", WRITING, writing, "changes_writing"),
]
