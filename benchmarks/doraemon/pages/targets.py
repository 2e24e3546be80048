"""The targets, and whether they are met."""

from __future__ import annotations

from .measured import LARGE, TARGET, Results, Section
from .tables import Spread, spread, table

TARGETS = """A target is met where the worse quartile meets it, and "by the median" where only that does."""


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


SECTIONS = [Section("Targets", TARGETS, targets, "lookups_batches")]
