"""The page of results, docs/doraemon.md, its picture, and the targets in doraemon/README.md: made of the kept results.

    python benchmarks/doraemon/results.py

The picture needs matplotlib, the page nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "doraemon"
PAGE = ROOT / "docs" / "doraemon.md"
README = ROOT / "doraemon" / "README.md"
BEGIN, END = "<!-- results: made by benchmarks/doraemon/results.py -->", "<!-- end of results -->"
PICTURE = ROOT / "docs" / "images" / "doraemon.png"
PARTS = ["lookups_batches", "lookups_single", "lookups_moving", "changes_building", "changes_adapting"]
PARTS += ["changes_writing", "paper_latency", "paper_retraining"]
PARTS += ["skew_batches", "skew_single", "skew_moving", "single_inserts", "single_ycsb", "threads", "texts"]
KEYS = ["uniform", "normal", "lognormal", "osm", "facebook", "cascade", "words", "offsets"]
QUERIES = ["uniform", "90/10", "99/1", "zipf"]
SKEWED = ["uniform", "90/10", "99/1", "zipf 1.1, endless", "zipf 1.1", "zipf 1.3"]
#: by how many percent `adapt()` is to change the time of a batch
GAINS = {"uniform": 2.0, "90/10": -15.0, "99/1": -15.0, "zipf 1.1": -30.0, "zipf 1.3": -45.0}
RIVALS = ["np.searchsorted", "sort + searchsorted", "polars", "pandas", "DuckDB"]
SINGLE_RIVALS = ["pygm", "SortedDict", "bisect on a list", "np.searchsorted", "pandas", "SQLite", "DuckDB"]
#: what is to be known of all that was measured on a processor
NOTES = {
    "AMD EPYC, family 26, cache 1024 KB": "Measured before the index had a hot table, when `adapt()` gave leaves only."
}
TARGET, LARGE = 4_000_000, 64_000_000

Row = dict[str, Any]
Spread = list[float]  #: first quartile, median, third quartile


@dataclass
class Results:
    """All rows, by the part of the benchmarks that made them."""

    rows: dict[str, list[Row]]
    machines: dict[str, dict[str, Any]]  #: that each part was measured on

    @classmethod
    def read(cls, folder: Path) -> Results:
        """The parts that were measured."""
        files = {name: folder / f"{name}.json" for name in PARTS}
        parts = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
        rows = {name: parts[name]["rows"] if name in parts else [] for name in PARTS}
        for name in ("lookups_batches", "lookups_single"):
            rows[name].sort(key=lambda row: (KEYS.index(row["keys"]), row["n"], QUERIES.index(row["queries"])))
        for name in ("changes_building", "changes_adapting", "changes_writing"):
            rows[name].sort(key=lambda row: row["n"])
        for name in ("skew_batches", "skew_single", "skew_moving"):
            rows[name].sort(key=lambda row: (row["n"], SKEWED.index(row["queries"])))
        return cls(rows, {name: part["machine"] for name, part in parts.items()})

    @property
    def machine(self) -> dict[str, Any]:
        """That of the batches, which the page is said to be of; other parts say theirs if it is another."""
        return self.machines["lookups_batches"]

    def of(self, part: str, **fields: Any) -> list[Row]:
        """The rows of a part that have these values."""
        return [row for row in self.rows[part] if all(row[name] == value for name, value in fields.items())]

    def one(self, part: str, **fields: Any) -> Row:
        (row,) = self.of(part, **fields)
        return row


# ------------------------------------------------------------------ figures and tables


def millions(n: int) -> str:
    return f"{n // 1_000_000}M"


def figure(value: float) -> str:
    """Three digits, and no more after the point than they take."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values: Spread, unit: str = "") -> str:
    """The median, and the quartiles in brackets."""
    low, middle, high = (figure(value) for value in values)
    return f"{middle}{unit} ({low} to {high})"


def times(values: Spread) -> str:
    """A ratio; bold where the other is faster."""
    text = f"{figure(values[1])}x"
    return f"**{text}**" if values[1] < 1 else text


def asked(rows: list[Row], names: list[str]) -> list[str]:
    """Of the other ways those that were measured in any of the rows."""
    return [name for name in names if any(name in row["ratio"] for row in rows)]


def times_over(row: Row, names: list[str]) -> list[str]:
    """How many times as long as ours each other way takes, a dash where it was not asked."""
    return [times(row["ratio"][name]) if name in row["ratio"] else "-" for name in names]


def table(names: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *rows)]
    return "\n".join(lines)


# ------------------------------------------------------------------ targets


def met(values: Spread, target: float, more: bool) -> str:
    """Whether the worse quartile meets the target, or only the median, or not even that."""

    def reaches(value: float) -> bool:
        return value >= target if more else value < target

    if reaches(values[0] if more else values[2]):
        return "yes"
    return "by the median" if reaches(values[1]) else "**no**"


def targets(results: Results) -> str:
    batch = results.one("lookups_batches", keys="uniform", n=TARGET, queries="uniform")["ratio"]
    single = results.one("lookups_single", keys="uniform", n=TARGET, queries="uniform")["ratio"]
    built = results.one("changes_building", n=TARGET)["ms"]["sorted"]
    faster = results.one("changes_adapting", n=LARGE)["faster"]
    inserts = results.one("changes_writing", n=TARGET)["insert ns, batches of 10000"]
    lines: list[tuple[str, Spread, float, bool, str]] = [
        ("batched lookup, over np.searchsorted", batch["np.searchsorted"], 8, True, "x"),
        ("batched lookup, over sort + searchsorted", batch["sort + searchsorted"], 2.5, True, "x"),
        ("one by one, over pygm", single["pygm"], 1, True, "x"),
        ("one by one, over SortedDict", single["SortedDict"], 5, True, "x"),
        ("build of sorted keys", built, 100, False, " ms"),
        ("insert, in batches of 10,000, merges counted", inserts, 300, False, " ns"),
        ("adapt() to a hot range that moved, over a full refit, 64M keys", faster["adapt"], 20, True, "x"),
        ("return to a known workload, over a full refit, 64M keys", faster["return"], 20, True, "x"),
    ]
    return table(
        ["4M uniform keys, uniform queries, unless said otherwise", "target", "measured", "met"],
        [
            [
                name,
                f"{'at least' if more else 'under'} {target:g}{unit}",
                spread(values, unit),
                met(values, target, more),
            ]
            for name, values, target, more, unit in lines
        ],
    )


# ------------------------------------------------------------------ lookups


def batches_table(rows: list[Row], cases: list[str]) -> str:
    """The rows by the fields `cases`, which are the first columns."""
    rivals, floors = asked(rows, RIVALS), ["position known", "hash table"]
    lines = []
    for row in rows:
        cells = [millions(row[case]) if case == "n" else row[case] for case in cases]
        cells += [spread(row["ns"]["doraemon"]), *times_over(row, rivals)]
        lines.append(cells + [figure(row["ns"][name][1]) if name in row["ns"] else "-" for name in floors])
    names = ["ns, ours", *(f"over {name}" for name in rivals), *(f"ns, {name}" for name in floors)]
    return table([*cases, *names], lines)


def batches_by_keys(results: Results) -> str:
    return batches_table(results.of("lookups_batches", n=TARGET), ["keys", "queries"])


def batches_by_size(results: Results) -> str:
    rows = [row for row in results.rows["lookups_batches"] if row["n"] != TARGET]
    return batches_table(rows, ["keys", "n", "queries"])


def singles(results: Results) -> str:
    rows, lines = results.rows["lookups_single"], []
    rivals = asked(rows, SINGLE_RIVALS)
    for row in rows:
        ns = row["ns"]
        inside = [ns["BTrees `in`"][1] / ns["doraemon `in`"][1], ns["dict `in`"][1] / ns["doraemon `in`"][1]]
        cells = [spread(ns["doraemon rank"]), *times_over(row, rivals)]
        cells += [figure(ns["doraemon `in`"][1]), *(times([value] * 3) for value in inside)]
        lines.append([row["keys"], millions(row["n"]), row["queries"], *cells])
    names = ["keys", "n", "queries", "ns, our rank", *(f"over {name}" for name in rivals)]
    return table([*names, "ns, our `in`", "over BTrees", "over dict"], lines)


def single_tails(results: Results) -> str:
    rows = []
    for row in results.rows["lookups_single"]:
        for name, tail in row.get("us, percentiles", {}).items():
            rows.append([row["keys"], millions(row["n"]), row["queries"], name, *(figure(value) for value in tail)])
    return table(["keys", "n", "queries", "", "us, median", "us, 99 %", "us, 99.9 %"], rows)


def threads(results: Results) -> str:
    rows = []
    for row in results.rows["threads"]:
        shared = f"{row['threads']} threads"
        cells = [millions(row["n"]), row["question"], str(row["cores"]), str(row["threads"])]
        cells += [spread(row["ns"][name]) for name in ("1 threads", shared)]
        rows.append([*cells, *times_over(row, ["1 threads", "np.searchsorted"])])
    names = ["n", "question", "cores", "threads", "ns, one thread", "ns, threads"]
    return table([*names, "threads over one thread", "over np.searchsorted"], rows)


def moving(results: Results) -> str:
    cases = sorted(
        {(row["keys"], row["n"]) for row in results.rows["lookups_moving"]}, key=lambda c: (KEYS.index(c[0]), c[1])
    )
    rows = []
    for keys, n in cases:
        found = results.of("lookups_moving", keys=keys, n=n)
        after = [row for row in found if row["position"] > 0]

        def middle(part: str, name: str, after: list[Row] = after) -> float:
            return median(row[part][name][1] for row in after)

        cells = [figure(middle("ns", name)) for name in ("following", "left behind", "never adapted")]
        cells += [times([middle("ratio", name)] * 3) for name in ("np.searchsorted", "sort + searchsorted")]
        adapting = sorted(row["adapt ms"] for row in after)
        cells.append(f"{figure(median(adapting))} ({figure(adapting[0])} to {figure(adapting[-1])})")
        rows.append([keys, millions(n), *cells])
    names = ["keys", "n", "ns, following", "ns, left behind", "ns, never adapted"]
    return table([*names, "following over np.searchsorted", "over sort + searchsorted", "ms of adapt()"], rows)


# ------------------------------------------------------------------ texts


def texts(results: Results) -> str:
    rivals = ["bisect on a list", "pandas, str", "pandas, objects", "polars"]
    rows = []
    for row in results.rows["texts"]:
        cells = [row["keys"], f"{row['n']:,}", f"{row['bytes per text']:.0f}", f"{row['held']:.0f}"]
        cells += [spread(row["ns"][name]) for name in ("doraemon", "doraemon, Arrow")]
        cells.append(times(row["ratio"]["bisect on a list"]))
        cells += [times(row["ratio, Arrow"][name]) for name in rivals[1:]]
        rows.append([*cells, spread(row["single ns"]["doraemon"]), times(row["single ratio"]["bisect on a list"])])
    names = ["keys", "n", "bytes per key", "bytes held", "ns, ours, of a list", "ns, ours, of Arrow"]
    names += [f"over {name}" for name in rivals]
    return table([*names, "ns, one by one", "over bisect, one by one"], rows)


# ------------------------------------------------------------------ skew


def percents(values: Spread) -> str:
    """A change in percent, with its quartiles."""
    low, middle, high = (f"{value:+.0f}" for value in values)
    return f"{middle} % ({low} to {high})"


def skew_head(results: Results) -> str:
    """The gains against the targets."""
    rows = []
    for row in results.rows["skew_batches"]:
        wanted = GAINS.get(row["queries"])
        change = row["change %"]["as built"]
        cells = [millions(row["n"]), row["queries"], *(figure(row["ns"][way][1]) for way in ("as built", "adapted"))]
        cells += [percents(change), "-" if wanted is None else f"at most {wanted:+.0f} %"]
        cells.append("-" if wanted is None else met(change, wanted, more=False))
        rows.append([*cells, f"{row['answered']:.0%}", f"{row['hot bytes'] / 2**20:.1f}", figure(row["adapt ms"])])
    names = ["n", "queries", "ns, as built", "ns, adapted", "change", "target", "met"]
    return table([*names, "answered by the table", "MiB of the table", "ms of adapt()"], rows)


def skew_single(results: Results) -> str:
    rows = [
        [
            millions(row["n"]),
            row["queries"],
            *(figure(row["ns"][way][1]) for way in ("as built", "adapted")),
            percents(row["change %"]["as built"]),
        ]
        for row in results.rows["skew_single"]
    ]
    return table(["n", "queries", "ns, as built", "ns, adapted", "change"], rows)


def skew_moving(results: Results) -> str:
    rows = [
        [
            millions(row["n"]),
            row["queries"],
            *(figure(row["ns"][way][1]) for way in ("as built", "following", "known beforehand")),
            percents(row["change %"]["as built"]),
            spread(row["adapt ms"]),
        ]
        for row in results.rows["skew_moving"]
    ]
    names = ["n", "queries", "ns, as built", "ns, following", "ns, known beforehand", "following against as built"]
    return table([*names, "ms of adapt()"], rows)


def skew_verdict(results: Results) -> str:
    """What our own index gains under the skew that the paper speaks of."""
    rows = [row for row in results.rows["skew_batches"] if row["queries"] not in ("uniform", "zipf 1.1, endless")]
    changes = [row["change %"]["as built"][1] for row in rows]
    return (
        f"* **With our good root** no placing of leaves gains much; the hot table does. Over {len(rows)} skewed "
        f"workloads in batches `adapt()` changed the time of a look-up by {range_of(changes)} %, of the index as built."
    )


# ------------------------------------------------------------------ changes


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
        cells = [spread(row["ms"][name]) for name in ("refit", "adapt", "return")]
        cells += [spread(row["faster"][name], "x") for name in ("adapt", "return")]
        rows.append([millions(row["n"]), str(row["buckets"]), *cells, figure(row["refitted"])])
    names = ["n", "buckets", "ms, refit", "ms, adapt", "ms, return", "adapt over refit", "return over refit"]
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


# ------------------------------------------------------------------ the paper


def range_of(values: list[float]) -> str:
    """The median over seeds, least and most."""
    low, middle, high = (f"{value:+.1f}" for value in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"


def paper_latency(results: Results) -> str:
    rows = []
    for keys in ("uniform", "lognormal"):
        for root in ("line", "network", "doraemon"):
            for weight in (0.0, 0.5, 1.0):
                found = results.of("paper_latency", keys=keys, root=root, weight=weight)
                if not found:
                    continue
                steps = [row["steps"] for row in found if row["steps"] is not None]
                change = range_of([row["change %"][1] for row in found]) if weight else "-"
                cells = [figure(median(steps)) if steps else "-", figure(median(row["ns"][1] for row in found))]
                rows.append([keys, root, f"{weight:g}", *cells, change, str(len(found))])
    return table(["keys", "root", "weight of accesses", "steps", "ns", "change of ns, %", "seeds"], rows)


def paper_best(results: Results) -> list[float]:
    """For each seed the best change that a weight brought to the line root on lognormal keys, where it is weak."""
    rows = [row for row in results.of("paper_latency", keys="lognormal", root="line") if row["weight"]]
    return [min(row["change %"][1] for row in rows if row["seed"] == seed) for seed in {row["seed"] for row in rows}]


def paper_retraining(results: Results) -> str:
    rows = []
    cases = sorted({(row["keys"], row["shift"]) for row in results.rows["paper_retraining"]})
    for keys, shift in cases:
        found = results.of("paper_retraining", keys=keys, shift=shift)
        cells = [figure(median(row[name] for row in found)) for name in ("cold s", "warm s")]
        shorter = sorted(row["cold s"] / row["warm s"] for row in found)
        cells.append(f"{figure(median(shorter))} ({figure(shorter[0])} to {figure(shorter[-1])})")
        cells += [figure(1e3 * median(row[name] for row in found)) for name in ("refit s", "adapt s")]
        rows.append([keys, f"{shift:.0%}", *cells, str(len(found))])
    names = ["keys", "moved by", "s, SGD cold", "s, SGD warm", "cold over warm", "ms, our refit", "ms, our adapt"]
    return table([*names, "seeds"], rows)


def verdict(results: Results) -> str:
    """What became of the paper's two figures, said with ours."""
    changes, rows = paper_best(results), results.rows["paper_retraining"]
    reached = sum(value <= -45.1 for value in changes)
    lines = [
        f"* **45.1 % better latency**: {'reproduced' if 2 * reached > len(changes) else 'not reproduced'}. With the "
        f"better of the two weights, the line root on lognormal keys, our weakest, changed by {range_of(changes)} %; "
        f"{reached} of {len(changes)} seeds reached the paper's figure."
    ]
    for shift in sorted({row["shift"] for row in rows}):
        shorter = sorted(row["cold s"] / row["warm s"] for row in rows if row["shift"] == shift)
        twenty = sum(value >= 20 for value in shorter)
        lines.append(
            f"* **1/20 of the retraining time**, after a move by {shift:.0%} of the keys: "
            f"{'reproduced' if 2 * twenty > len(shorter) else 'not reproduced'}. Warm training took "
            f"1/{figure(median(shorter))} of cold training, from 1/{figure(shorter[0])} to 1/{figure(shorter[-1])}; "
            f"{twenty} of {len(shorter)} seeds reached 1/20."
        )
    speedup = figure(median(row["refit s"] / row["adapt s"] for row in rows))
    closed = figure(median(row["cold s"] / row["refit s"] for row in rows))
    lines.append(
        f"* Fitting in closed form leaves little of either to gain: our full refit of these keys is {closed} times as "
        f"fast as cold training, and `adapt()` {speedup} times as fast as that."
    )
    return "\n".join([*lines, skew_verdict(results)])


# ------------------------------------------------------------------ where it loses


def losses(results: Results) -> str:
    """Every case in which another way to answer the same question was faster, and what changes and adapting cost."""
    lines = [*slower_lookups(results), *costly_changes(results), *vain_adapting(results), *vain_following(results)]
    lines += costly_threads(results)
    return "\n".join(f"* {line}" for line in lines)


def slower_lookups(results: Results) -> Iterator[str]:
    cases = [("lookups_batches", "doraemon", RIVALS), ("lookups_single", "doraemon rank", SINGLE_RIVALS)]
    cases.append(("lookups_single", "doraemon `in`", ["BTrees `in`", "dict `in`"]))
    lost = 0
    for part, ours, rivals in cases:
        for row in results.rows[part]:
            for name in (name for name in rivals if name in row["ns"]):
                faster = row["ns"][ours][1] / row["ns"][name][1]
                if faster > 1:
                    lost += 1
                    case = f"{row['keys']} keys, {millions(row['n'])}, {row['queries']} queries"
                    yield f"{name}, {part.split('_')[1]}: {case}, {figure(faster)} times as fast as ours."
    if not lost:
        yield "Lookups: in none of the cases above, the floors aside."
    tight = min(results.rows["lookups_batches"], key=lambda row: row["ratio"]["sort + searchsorted"][1])
    yield (
        f"Keys whose density jumps at every scale have long windows: the least gain over sort + searchsorted was "
        f"{figure(tight['ratio']['sort + searchsorted'][1])}x, on {tight['keys']} keys."
    )


def costly_changes(results: Results) -> Iterator[str]:
    row, large = (results.one("changes_writing", n=n) for n in (TARGET, LARGE))
    for each in results.rows["single_ycsb"]:
        for name, ratio in each["ratio"].items():
            if ratio[1] < 1:
                yield f"YCSB's mix {each['mix']}, one by one: {name} is {figure(1 / ratio[1])} times as fast."
    yield (
        f"Batches of 10,000 into 64M keys cost {figure(large['insert ns, batches of 10000'][1])} ns per insert: the "
        "larger the index, the larger a batch should be."
    )
    slower = [figure(each["lookup ratio"]["unmerged"][1]) for each in (row, large)]
    yield f"With n/16 changes unmerged, lookups take {slower[0]} times as long at 4M keys, {slower[1]} times at 64M."


def vain_adapting(results: Results) -> Iterator[str]:
    """What following the queries gained, which is little."""
    for keys, n in sorted({(row["keys"], row["n"]) for row in results.rows["lookups_moving"]}):
        after = [row for row in results.of("lookups_moving", keys=keys, n=n) if row["position"] > 0]
        following, never = (median(row["ns"][name][1] for row in after) for name in ("following", "never adapted"))
        change = round(100 * (following / never - 1))
        said = f"{abs(change)} % {'slower' if change > 0 else 'faster'} than" if change else "as fast as"
        yield f"`adapt()` while a hot range moves over {keys} keys, {millions(n)}: lookups {said} never adapted."


def vain_following(results: Results) -> Iterator[str]:
    """Where hot keys move faster than adapting pays, and where one look-up at a time gains nothing."""
    for row in results.rows["skew_moving"]:
        change = row["change %"]["as built"][1]
        if change > 0:
            yield (
                f"Hot keys that are others after each million queries, {row['queries']}, {millions(row['n'])}: "
                f"following takes {change:.0f} % more time than never adapting, `adapt()` included."
            )
    for row in results.rows["skew_single"]:
        change = row["change %"]["as built"][1]
        if change > 0 and row["queries"] != "uniform":
            yield f"One by one, {row['queries']} queries, {millions(row['n'])}: {change:.0f} % slower after `adapt()`."


def costly_threads(results: Results) -> Iterator[str]:
    """Where threads cost more than they save."""
    for row in results.rows["threads"]:
        slower = row["ns"][f"{row['threads']} threads"][1] / row["ns"]["1 threads"][1]
        if slower > 1:
            yield (
                f"`{row['question']}` by {row['threads']} threads on {row['cores']} cores, {millions(row['n'])}: "
                f"{figure(slower)} times as long as by one."
            )


# ------------------------------------------------------------------ page and picture

Section = tuple[str, str, Callable[[Results], str], str]  #: title, text, what makes the rest, and of which part


def sections(results: Results) -> Iterator[Section]:
    """The page's, but for those of which nothing was measured."""
    every: list[Section] = [
        ("Targets", TARGETS, targets, "lookups_batches"),
        ("Batches, 4M keys", BATCHES, batches_by_keys, "lookups_batches"),
        ("Batches, other sizes", "The same for more and fewer keys.", batches_by_size, "lookups_batches"),
        ("One by one", SINGLES, singles, "lookups_single"),
        ("One by one, the slowest", TAILS, single_tails, "lookups_single"),
        ("Texts", TEXTS, texts, "texts"),
        ("Threads", THREADS, threads, "threads"),
        ("Skew, in batches", SKEW, skew_head, "skew_batches"),
        ("Skew, one by one", SKEW_SINGLE, skew_single, "skew_single"),
        ("Skew that moves", SKEW_MOVING, skew_moving, "skew_moving"),
        ("A hot range that moves", MOVING, moving, "lookups_moving"),
        ("Building", "From keys in order and in none, beside sorting alone.", building, "changes_building"),
        ("Adapting", ADAPTING, adapting, "changes_adapting"),
        ("Writing", WRITING, writing, "changes_writing"),
        ("Changes one by one", INSERTS, inserts, "single_inserts"),
        ("YCSB's mixes", YCSB, ycsb, "single_ycsb"),
        ("The paper's latency", LATENCY, paper_latency, "paper_latency"),
        ("The paper's retraining", RETRAINING, paper_retraining, "paper_retraining"),
        ("Reproduced or refuted", "By these figures:", verdict, "paper_latency"),
        ("Where it loses", LOSSES, losses, "lookups_batches"),
    ]
    for section in every:
        measured = results.rows[section[3]]
        if section[0] == "One by one, the slowest":
            measured = [row for row in measured if "us, percentiles" in row]
        if measured:
            yield section


def page(results: Results) -> str:
    head = HEAD.format(**results.machine, note=noted(results.machine))
    parts = [
        f"\n## {title}\n\n{text}{elsewhere(results, part)}\n\n{make(results)}"
        for title, text, make, part in sections(results)
    ]
    return head + "\n".join(parts) + "\n"


def noted(machine: dict[str, Any]) -> str:
    """What is to be known of a machine's figures."""
    note = NOTES.get(machine["processor"])
    return "" if note is None else f" {note}"


def elsewhere(results: Results, part: str) -> str:
    """The machine that a part was measured on, if it is not the page's."""
    machine = results.machines[part]
    if machine == results.machine:
        return ""
    return f"\nOn {machine['processor']}; Python {machine['python']}, NumPy {machine['numpy']}.{noted(machine)}"


HEAD = """# Doraemon, measured

Made by `benchmarks/doraemon/results.py` of the files in `benchmarks/results/doraemon`; no figure is typed by hand.
{processor}; Python {python}, NumPy {numpy}, one thread.{note}
A section that names another processor was measured on that. What is compared takes turns in one process. Figures are
medians over rounds, with quartiles in brackets, and ratios are medians of the ratios of each round: 3x is "a third of
the time", and a **bold** ratio is below 1, where the other is faster.

    pip install -e 'doraemon[dev]' sortedcontainers BTrees pygm polars duckdb matplotlib
    python benchmarks/doraemon/lookups.py batches    # also: single, moving; --keys, --queries, --n, --text choose cases
    python benchmarks/doraemon/changes.py building   # also: adapting, writing
    python benchmarks/doraemon/single.py ycsb        # also: inserts
    python benchmarks/doraemon/skew.py batches       # also: single, moving
    python benchmarks/doraemon/threads.py            # needs two cores
    python benchmarks/doraemon/paper.py latency      # also: retraining
    python benchmarks/doraemon/texts.py --text FILE...
    python benchmarks/doraemon/results.py

![Nanoseconds per query against the number of keys, and over the kinds of keys](images/doraemon.png)

Keys: uniform over uint64, normal and lognormal, as in [SOSD](https://arxiv.org/abs/1911.13014), and synthetic
stand-ins for its cells of OpenStreetMap ("osm") and its users of Facebook ("facebook"), of which
`benchmarks/doraemon/sosd.py` says what they imitate; a multiplicative cascade, dense in dense parts at every scale; the
first 8 bytes at each word of a text; the words' positions in it. Queries for keys that are there: uniform over them;
90 % of them in 10 % of the keys, 99 % in 1 %; zipf of exponent 1.1, scattered.
"""
TARGETS = """A target is met where the worse quartile meets it, and "by the median" where only that does."""
LOSSES = """Each case in which another way to the same answer was faster, and what else costs:"""
BATCHES = """A million queries at once, after `adapt()` to queries of the same kind. The floors answer no question of
order: "position known" gathers keys whose positions are given, and "hash table" is open addressing in NumPy. Nor do two
of the rivals: pandas' `get_indexer` has a hash table, and DuckDB joins the queries with a table that holds positions
and has a primary key."""
SINGLES = """One call per query; the loop's own time is taken off. `in` is compared with what answers only that. pandas'
`get_loc`, SQLite and DuckDB find positions of keys that are there: SQLite and DuckDB in a table in memory whose primary
key is the key, by a prepared statement."""
TAILS = (
    """Each call timed alone, the clock's own time included. DuckDB had fewer queries than the others, 400 a round."""
)
TEXTS = """Keys that are str, and 200,000 queries at once for keys that are there. `bisect` is asked, as we are, with a
list of str; pandas, whose `get_indexer` hashes and knows no order, and polars with columns of their own, beside which
ours is asked with an Arrow column. "Bytes held" are those of keys, codes and what finds them."""
THREADS = """A million uniform queries at once over uniform keys, of an index with `threads=` and of one without;
queries of `count` in pairs. More threads than cores show what threads cost."""
SKEW = """A million queries at once: of an index as built, and of one that saw four million such queries and then
called `adapt()`, which made a table of hot keys where that was measured to pay. The keys are uniform. Zipf queries are
of ranks up to the number of keys, scattered over them; "endless" ranks are wrapped around, so that a fifth of the
queries is uniform and no table can know them. No query that is timed was asked before."""
SKEW_SINGLE = """The same, one query per call, the call from Python included. What is not in the table waits for memory
as before. A round is as long as the median of its ten parts, as other programs took turns on the processor."""
SKEW_MOVING = """The hot keys are others after each million queries. "Following" calls `adapt()` after 300,000 queries
of each million, and its time is counted; "known beforehand" has had the right table from the first query on, and its
making is not counted."""
MOVING = """90 % of the queries in 10 % of the keys, which move by 2 % of the keys from position to position; 10
positions after the first, each of which the index sees in a million queries. "Following" then calls `adapt()`, whose
time is beside it (least and most in brackets); "left behind" adapted to the first position only. Medians over the
positions."""
ADAPTING = """90 % of the queries in 2 % of the keys, which then move by 2 % of the keys, and back, at another place
in each round. "refit" fits all buckets for the same accesses. The smaller the index, the more of `adapt()` is the
same few dozen NumPy calls whatever is fitted, and the less is left to gain."""
WRITING = """Inserts of new keys, from a merge to the first merge after 10 % more keys, so that all of their cost is
counted. Then lookups in batches with the most changes that an index leaves unmerged."""
INSERTS = """A new key, and a question about it after each: its rank, or of BTrees, which count nothing, `in`. After
10,000 the same keys are removed one by one, which leaves the delta short: folds are in the times, merges are not."""
YCSB = """Maps of int64 to int64, 3.75M keys, asked and changed one operation at a time, keys
zipfian of exponent 0.99 and scattered. Folds into the delta are in the times; a merge, due after n/16 changes,
seldom comes. A: half reads, half updates. B: 95 % reads, 5 % updates. C: reads. D: 95 % reads of late keys, 5 %
inserts. E: 95 % scans of up to 100 keys, 5 % inserts. F: half reads, half reads that update what they read.
SortedList holds pairs; SortedDict reads and updates in a dict; SQLite and DuckDB, where they are listed, are tables in
memory with a primary key, and DuckDB had 200 operations a round. The percentiles are of operations timed alone, the
clock's own time included."""
LATENCY = """One million keys, 10,000 leaves, 90 % of the queries in 10 % of the keys. The root is trained on the
keys (weight 0), on the accesses (1), or on both (0.5); "change" is against weight 0, the median over seeds with least
and most. Only the search in the leaf's window is timed, as the paper's gain is there; for our index the whole call
is, as built (0) and after `adapt()` (1). A root can change the steps only: where they are alike, a difference in ns
comes from elsewhere, such as where the Python objects lie that carry the windows."""
RETRAINING = """The hot range moves, and a network root is trained by SGD until its loss is within 20 % of that of
long training: from random weights (cold), or from those before (warm). Beside it what our index does for the same, on
the same keys."""


def readme_part(results: Results) -> str:
    """The targets, for the package's own page."""
    machine = results.machine
    software = f"Python {machine['python']}, NumPy {machine['numpy']}"
    head = f"One thread of {machine['processor']}; {software}; medians and quartiles."
    return f"{head}\n\n{targets(results)}"


def replace_part(text: str, part: str) -> str:
    """The text with this between the two marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{rest.split(END)[1]}"


def plot(results: Results, path: Path) -> None:
    """Two panels: time against size, and over the kinds of keys."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure_, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    names = ["polars", "np.searchsorted", "hash table", "sort + searchsorted", "doraemon", "position known"]
    rows = results.of("lookups_batches", keys="uniform", queries="uniform")
    for name in names:
        points = [(row["n"], *row["ns"][name]) for row in rows if name in row["ns"]]
        n, low, middle, high = zip(*points, strict=True)
        line = left.plot(n, middle, marker="o", label=name, linewidth=2.5 if name == "doraemon" else 1.2)[0]
        left.fill_between(n, low, high, color=line.get_color(), alpha=0.2)
    left.set(
        xscale="log", yscale="log", xlabel="keys", ylabel="ns per query", title="uniform keys and queries, batches"
    )
    left.set_ylim(4, 20_000)
    left.legend(fontsize=8, ncols=2, loc="upper left")
    width = 0.25
    for at, name in enumerate(("np.searchsorted", "sort + searchsorted", "doraemon")):
        found = results.of("lookups_batches", n=TARGET, queries="uniform")
        places = [place + (at - 1) * width for place in range(len(found))]
        right.bar(places, [row["ns"][name][1] for row in found], width, label=name)
    right.set(yscale="log", ylabel="ns per query", title="4M keys, uniform queries, batches")
    right.set_xticks(range(len(found)), [row["keys"] for row in found])
    right.set_ylim(10, 2_000)
    right.legend(fontsize=8, ncols=3, loc="upper center")
    figure_.tight_layout()
    figure_.savefig(path, dpi=110)
    pyplot.close(figure_)


def main() -> None:
    results = Results.read(RESULTS)
    PAGE.write_text(page(results), encoding="utf-8")
    README.write_text(replace_part(README.read_text(encoding="utf-8"), readme_part(results)), encoding="utf-8")
    plot(results, PICTURE)
    print(f"made {PAGE}, {PICTURE} and a part of {README}")


if __name__ == "__main__":
    main()
