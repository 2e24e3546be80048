"""What each processor measured of what was aimed at, side by side."""

from __future__ import annotations

from collections.abc import Iterator

from .measured import LARGE, TARGET, Results
from .skew import GAINS, WANTED
from .tables import Spread, millions, percents, spread, table
from .targets import met

PROCESSORS = """What was aimed at, on each processor that measured it. A cell says the median, its quartiles, and
whether they meet the target. No figure is made of two processors', and the columns were measured on different days, of
code that went on meanwhile."""
#: what, as it was measured, the target if there is one, whether more is better, and the unit
Aim = tuple[str, Spread, float | None, bool, str]


def processors(all_results: list[Results]) -> str:
    """A row for each aim, a column for each processor."""
    columns = [{aim[0]: aim[1:] for aim in _aims(results)} for results in all_results]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        _, target, more, unit = next(column[name] for column in columns if name in column)
        wanted = "-" if target is None else _wanted(target, more, unit)
        cells = [_cell(*column[name]) if name in column else "-" for column in columns]
        rows.append([name, wanted, *cells])
    names = [next(iter(results.machines.values()))["processor"] for results in all_results]
    return table(["", "target", *names], rows)


def _wanted(target: float, more: bool, unit: str) -> str:
    return f"{'at least' if more else 'at most'} {target:{'+g' if unit == ' %' else 'g'}}{unit}"


def _cell(values: Spread, target: float | None, more: bool, unit: str) -> str:
    said = percents(values) if unit == " %" else spread(values, unit)
    return said if target is None else f"{said}: {met(values, target, more)}"


def _aims(results: Results) -> Iterator[Aim]:
    yield from _of_skew(results)
    for row in results.rows["texts"]:
        yield f"{row['keys']}, over bisect on a list", row["ratio"]["bisect on a list"], 5, True, "x"
        yield f"{row['keys']}, Arrow, over pandas", row["ratio, Arrow"]["pandas, str"], 5, True, "x"
        yield f"{row['keys']}, one by one, over bisect", row["single ratio"]["bisect on a list"], None, True, "x"
    for row in results.of("single_inserts", n=TARGET):
        yield "insert + rank, 4M", row["insert + rank us"]["doraemon"], 2, False, " us"
    for row in results.rows["changes_writing"]:
        if row["n"] in (TARGET, LARGE):
            size = millions(row["n"])
            yield f"insert in batches of 10,000, {size}", row["insert ns, batches of 10000"], 400, False, " ns"
            yield f"look-ups with n/16 unmerged over merged, {size}", row["lookup ratio"]["unmerged"], 1.3, False, "x"
    for row in results.rows["single_ycsb"]:
        yield f"YCSB {row['mix']}, over BTrees", row["ratio"]["BTrees"], 1, True, "x"
    for row in results.of("changes_adapting", n=LARGE):
        yield "adapt() to a range that moved, over a refit, 64M", row["faster"]["adapt"], 20, True, "x"
        yield "return to a known workload, over a refit, 64M", row["faster"]["return"], 20, True, "x"


def _of_skew(results: Results) -> Iterator[Aim]:
    for part, how in (("skew_batches", "in batches"), ("skew_single", "one by one")):
        for row in results.rows[part]:
            target = GAINS.get(row["queries"]) if part == "skew_batches" else None
            name = f"adapt(), {row['queries']}, {millions(row['n'])}, {how}"
            yield name, row["change %"]["as built"], target, False, " %"
    for row in results.rows["skew_moving"]:
        name = f"moving, {row['queries']}, {millions(row['n'])}, over the best fixed table"
        yield name, row["change %"]["known beforehand"], WANTED, False, " %"
