"""Methods side by side on one model: the output of `tardis compare`."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sections.markdown import table
from tardis_llm.evaluation.methods import Method
from tardis_llm.evaluation.rows import FIGURES, Row
from tardis_llm.evaluation.tasks import Metric

_RANGE = (0.085, 0.275)  # of the dense bytes: from the smallest fold to the largest 4-bit quantiser


@dataclass(frozen=True)
class Compared:
    """A comparison as its directory has it.

    Attributes:
        record: compare.json.
        rows: of table.csv, the dense model first.
    """

    record: dict[str, Any]
    rows: list[Row]

    @classmethod
    def read(cls, directory: Path) -> Compared:
        """From the directory."""
        record = json.loads((directory / "compare.json").read_text())
        return cls(record, read_table(directory / "table.csv", list(record["tasks"]["items"])))

    @property
    def title(self) -> str:
        """Model, data and versions."""
        record, software, machine = self.record, self.record["software"], self.record["machine"]
        evaluation, calibration = record["evaluation"], record["calibration"]
        named: list[str] = calibration["files"]
        files = named[0] if len(named) == 1 else f"{len(named)} files, {named[0]} to {named[-1]}"
        items = (f"{name} ({'all' if n is None else f'{n:,}'} items)" for name, n in record["tasks"]["items"].items())
        return (
            f"{record['model']['name']} in {record['model']['dtype']}; token perplexity on {evaluation['file']}, "
            f"{evaluation['tokens']:,} tokens in windows of {evaluation['window']}, evenly spread; zero-shot "
            f"{', '.join(items)} by lm-eval; {calibration['tokens']:,} + {calibration['heldout_tokens']:,} calibration "
            f"tokens of {files}; torch {software['torch']}, transformers "
            f"{software['transformers']}; {machine['cpu']}, threads: {machine['threads']}."
        )

    def find(self, label: str) -> Row:
        """The row of a method."""
        return next(row for row in self.rows if row.method.label == label)

    def of(self, *names: str) -> list[Row]:
        """The rows of methods whose names begin so, by rising bytes touched."""
        found = (row for row in self.rows if row.method.name.startswith(names) and not row.infeasible)
        return sorted(found, key=lambda row: row.touched)


def read_table(path: Path, tasks: Sequence[str]) -> list[Row]:
    """Read the rows that `write_table` wrote, given the names of the tasks."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(record, tasks) for record in csv.DictReader(file)]


def _row(values: Mapping[str, str], tasks: Sequence[str]) -> Row:
    known = {name: value for name, value in values.items() if value}

    def metrics(suffix: str) -> dict[str, Metric]:
        names = {task: task + suffix for task in tasks if task in known}
        return {task: Metric(float(known[name]), float(known[f"{name}_error"])) for task, name in names.items()}

    return Row(
        method=Method(known["method"], float(known["reduction"]) if "reduction" in known else None),
        infeasible=known.get("infeasible"),
        scores=metrics(""),
        changes=metrics("_change"),
        **{name: float(known[name]) for name in (*FIGURES, "fix_rate", "seconds") if name in known},
    )


def compared_table(compared: Compared) -> str:
    """Every method."""
    tasks = list(compared.record["tasks"]["items"])
    head = [*compared.rows[0].shown(), *(f"{task}, %" for task in tasks)]
    lines = []
    for row in compared.rows:
        cells = [*row.shown().values(), *(row.scores[task].percent() for task in tasks if row.scores)]
        lines.append([*cells, *[""] * (len(head) - len(cells))])
    return table(head, lines)


def against_masks(compared: Compared) -> str:
    """What folding in the model's dtype loses, beside masks at the same reduction."""
    names = ("sparsegpt", "owl-sparsegpt", "wanda", "owl-wanda", "ria", "magnitude")
    lines = []
    for fold in compared.of("tardis"):
        if fold.method.name != "tardis":
            continue
        masks = [compared.find(f"{name}@{fold.method.reduction:g}") for name in names]
        losses = (f"{(mask.ratio - 1) / (fold.ratio - 1):.1f}x ({mask.touched:.0%})" for mask in masks)
        lines.append([f"{fold.method.reduction:g}", fold.shown_ratio(), f"{fold.touched:.1%}", *losses])
    head = ["reduction", "TARDIS, / dense", "touched", *names]
    return "\n\n".join(
        [
            "What each mask adds to the perplexity, as a multiple of what TARDIS in bf16 adds at the same reduction. "
            "In brackets are the bytes that the mask touches. They are more, as its index is read, too.",
            table(head, lines),
        ]
    )


def against_quantisers(compared: Compared) -> str:
    """At the bytes of each quantiser, the best fold that touches no more."""
    folds = [row for row in compared.of("tardis") if row.method.name != "tardis-paper"]
    lines = []
    wins = within_range = wins_there = 0
    rivals = compared.of("gptq", "rtn", "affine")
    for rival in rivals:
        its = [rival.method.label, f"{rival.touched:.1%}", rival.shown_ratio()]
        within = [fold for fold in folds if fold.touched <= rival.touched + 1e-4]
        if not within:
            lines.append([*its, "no fold so small", "", "", ""])
            continue
        best = min(within, key=lambda fold: fold.ratio)
        below = best.ratio < rival.ratio
        wins += below
        if _RANGE[0] <= rival.touched <= _RANGE[1]:
            within_range += 1
            wins_there += below
        own = [best.method.label, f"{best.touched:.1%}", best.shown_ratio(), "yes" if below else "**no**"]
        lines.append([*its, *own])
    head = [
        "method",
        "touched",
        "/ dense",
        "best fold in no more bytes",
        "its touched",
        "its / dense",
        "fold is better",
    ]
    return "\n\n".join(
        [
            "Quantisation is what people would use instead. Beside each quantiser stands the best fold that touches no "
            f"more bytes: it is better in {wins} of {len(rivals)} cases, and in {wins_there} of {within_range} between "
            f"{_RANGE[0]:.1%} and {_RANGE[1]:.1%} of the dense bytes. In memory, a stacked fold is larger than a "
            "quantised FFN that touches as many bytes: it keeps what it does not read.",
            table(head, lines),
        ]
    )


def zero_shot(compared: Compared) -> str:
    """Paired changes of accuracy against the dense model."""
    tasks = list(compared.record["tasks"]["items"])
    labels = [row for row in compared.rows if row.changes and row.method.reduction in (0.7, 0.8)]
    labels += [row for row in compared.rows if row.changes and row.method.reduction is None and row.ratio != 1]
    dense = compared.rows[0]
    lines = []
    for row in labels:
        changes = []
        for task in tasks:
            change, error = 100 * row.changes[task].value, 100 * row.changes[task].standard_error
            within = abs(row.changes[task].value) <= dense.scores[task].standard_error
            changes.append(f"{change:+.1f} ± {error:.1f}{'' if within else ' (!)'}")
        lines.append([row.method.label, *changes])
    errors = ", ".join(f"{task} {dense.scores[task].percent()}" for task in tasks)
    return "\n\n".join(
        [
            f"Zero-shot accuracy less the dense model's, in points, with the standard error paired by item; (!) where "
            f"the change is more than one standard error of the dense model's own accuracy. Dense: {errors}.",
            table(["method", *tasks], lines),
        ]
    )
