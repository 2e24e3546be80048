"""What `adapt()` gains where some keys are asked for more than others."""

from __future__ import annotations

from collections.abc import Iterator

from .measured import Results, Section
from .tables import figure, millions, percents, range_of, spread, table
from .targets import met

#: by how many percent `adapt()` is to change the time of a batch
GAINS = {"uniform": 2.0, "90/10": -15.0, "99/1": -15.0, "zipf 1.1": -30.0, "zipf 1.3": -45.0}
SKEW = """A million queries at once: of an index as built, and of one that saw four million such queries and then
called `adapt()`, which made a table of hot keys where that was measured to pay. The keys are uniform. Zipf queries are
of ranks up to the number of keys, scattered over them; "endless" ranks are wrapped around, so that a fifth of the
queries is uniform and no table can know them. No query that is timed was asked before."""
SKEW_SINGLE = """The same, one query per call, the call from Python included. What is not in the table waits for memory
as before. A round is as long as the median of its ten parts, as other programs took turns on the processor."""
SKEW_MOVING = """The hot keys are others after each million queries. "Following" calls `adapt()` after 50,000 queries of
each million, and its time is counted; "known beforehand" has had the right table, which stays as it is, from the first
query on, and its making is not counted. Following was to take at most 10 % more than that. What bounds it are two
things, which are beside it: how much more time it took to be told the hot keys and their ranks at once, and only to
write that table; and the share of the queries that were the first for a key of the table, which only who is told can
answer from it."""
WANTED = 10.0  #: by how many percent following may take longer than what was known beforehand


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
            percents(row["change %"]["known beforehand"]),
            met(row["change %"]["known beforehand"], WANTED, more=False),
            percents(row["making %"]),
            f"{row['first touches'][1]:.0%}",
            spread(row["adapt ms"]),
        ]
        for row in results.rows["skew_moving"]
    ]
    names = ["n", "queries", "ns, as built", "ns, following", "ns, known beforehand", "following against as built"]
    names += ["against known beforehand", f"within {WANTED:.0f} %", "writing the table", "first touches"]
    return table([*names, "ms of adapt()"], rows)


def skew_verdict(results: Results) -> str:
    """What our own index gains under the skew that the paper speaks of."""
    rows = [row for row in results.rows["skew_batches"] if row["queries"] not in ("uniform", "zipf 1.1, endless")]
    changes = [row["change %"]["as built"][1] for row in rows]
    return (
        f"* **With our good root** no placing of leaves gains much; the hot table does. Over {len(rows)} skewed "
        f"workloads in batches `adapt()` changed the time of a look-up by {range_of(changes)} %, of the index as built."
    )


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


SECTIONS = [
    Section("Skew, in batches", SKEW, skew_head, "skew_batches"),
    Section("Skew, one by one", SKEW_SINGLE, skew_single, "skew_single"),
    Section("Skew that moves", SKEW_MOVING, skew_moving, "skew_moving"),
]
