"""Look-ups, in batches and one by one."""

from __future__ import annotations

from .measured import TARGET, Results, Row, Section
from .tables import asked, figure, millions, spread, table, times, times_over

RIVALS = ["np.searchsorted", "sort + searchsorted", "polars", "pandas", "DuckDB"]
SINGLE_RIVALS = ["pygm", "SortedDict", "bisect on a list", "np.searchsorted", "pandas", "SQLite", "DuckDB"]
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


SECTIONS = [
    Section("Batches, 4M keys", BATCHES, batches_by_keys, "lookups_batches"),
    Section("Batches, other sizes", "The same for more and fewer keys.", batches_by_size, "lookups_batches"),
    Section("One by one", SINGLES, singles, "lookups_single"),
    Section("One by one, the slowest", TAILS, single_tails, "lookups_single", "us, percentiles"),
]
