"""Where it loses."""

from __future__ import annotations

from collections.abc import Iterator

from .changes import costly_changes
from .lookups import RIVALS, SINGLE_RIVALS
from .measured import Results, Section
from .moving import vain_adapting
from .skew import vain_following
from .tables import figure, millions
from .threads import costly_threads

LOSSES = """Each case in which another way to the same answer was faster, and what else costs:"""


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


SECTIONS = [Section("Where it loses", LOSSES, losses, "lookups_batches")]
