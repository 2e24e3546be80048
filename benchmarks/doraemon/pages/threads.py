"""Batches that threads share."""

from __future__ import annotations

from collections.abc import Iterator

from .measured import Results, Section
from .tables import figure, millions, spread, table, times_over

THREADS = """A million uniform queries at once over uniform keys, of an index with `threads=` and of one without;
queries of `count` in pairs. More threads than cores show what threads cost."""


def threads(results: Results) -> str:
    rows = []
    for row in results.rows["threads"]:
        shared = f"{row['threads']} threads"
        cells = [millions(row["n"]), row["question"], str(row["cores"]), str(row["threads"])]
        cells += [spread(row["ns"][name]) for name in ("1 threads", shared)]
        rows.append([*cells, *times_over(row, ["1 threads", "np.searchsorted"])])
    names = ["n", "question", "cores", "threads", "ns, one thread", "ns, threads"]
    return table([*names, "threads over one thread", "over np.searchsorted"], rows)


def costly_threads(results: Results) -> Iterator[str]:
    """Where threads cost more than they save."""
    for row in results.rows["threads"]:
        slower = row["ns"][f"{row['threads']} threads"][1] / row["ns"]["1 threads"][1]
        if slower > 1:
            yield (
                f"`{row['question']}` by {row['threads']} threads on {row['cores']} cores, {millions(row['n'])}: "
                f"{figure(slower)} times as long as by one."
            )


SECTIONS = [Section("Threads", THREADS, threads, "threads")]
