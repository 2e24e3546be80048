"""What each method of a comparison came to, and the table that sets it beside the dense model."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .methods import Method
from .perplexity import Perplexity
from .tasks import Metric, TaskScore

#: the figures of a row that every method has
FIGURES = ("perplexity", "perplexity_error", "ratio", "ratio_error", "touched", "resident")


@dataclass(frozen=True)
class Cell:
    """What one method came to.

    Attributes:
        method: name and reduction.
        infeasible: why the method does not reach the reduction; everything below is empty then.
        dense: bytes of the dense weights in scope.
        touched: bytes of the weights in scope that a token reads, on the evaluation text.
        resident: bytes of the weights in scope that are kept in memory.
        fix_rate: share of neurons fixed per token on the evaluation text; None for what does not fold.
        seconds: seconds taken to compress.
        perplexity: perplexity on the evaluation text.
        scores: scores of the tasks.
    """

    method: Method
    infeasible: str | None = None
    dense: int = 0
    touched: float = 0.0
    resident: int = 0
    fix_rate: float | None = None
    seconds: float = 0.0
    perplexity: Perplexity | None = None
    scores: tuple[TaskScore, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with those of single windows and items, by which cells are paired."""
        values = dict(vars(self))
        if self.perplexity:
            values["perplexity"] = {"losses": self.perplexity.losses.tolist(), "length": self.perplexity.length}
        values["scores"] = [{**score.as_dict(), "correct": list(score.correct)} for score in self.scores]
        return {**values, "method": asdict(self.method)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        """The inverse of `as_dict`."""
        found = dict(values)
        found["method"] = Method(**values["method"])
        if values["perplexity"]:
            losses = torch.tensor(values["perplexity"]["losses"], dtype=torch.float64)
            found["perplexity"] = Perplexity.of(losses, values["perplexity"]["length"])
        found["scores"] = tuple(_score(score) for score in values["scores"])
        return cls(**found)


def _score(values: dict[str, Any]) -> TaskScore:
    also = {name: Metric(**metric) for name, metric in values["also"].items()}
    return TaskScore(**{**values, "also": also, "correct": tuple(values["correct"])})


@dataclass(frozen=True)
class Row:
    """A method beside the dense model, in the figures that people read; NaN or empty where they are not known.

    Attributes:
        method: name and reduction.
        infeasible: why the method does not reach the reduction; None if it does.
        perplexity: token perplexity on the evaluation text.
        perplexity_error: standard error of the perplexity.
        ratio: perplexity over the dense model's.
        ratio_error: standard error of the ratio, paired by window.
        scores: accuracy on each task and its standard error.
        changes: per task, accuracy less the dense model's and its standard error, paired by item.
        touched: bytes that a token reads, as a share of the dense model's.
        resident: bytes kept in memory, as a share of the dense model's.
        fix_rate: share of neurons fixed per token on the evaluation text; None for what does not fold.
        seconds: seconds taken to compress.
    """

    method: Method
    infeasible: str | None = None
    perplexity: float = math.nan
    perplexity_error: float = math.nan
    ratio: float = math.nan
    ratio_error: float = math.nan
    scores: dict[str, Metric] = field(default_factory=dict)
    changes: dict[str, Metric] = field(default_factory=dict)
    touched: float = math.nan
    resident: float = math.nan
    fix_rate: float | None = None
    seconds: float = math.nan

    @classmethod
    def of(cls, cell: Cell, dense: Cell) -> Row:
        """The figures of a cell beside those of the dense model's."""
        if cell.perplexity is None or dense.perplexity is None:
            return cls(cell.method, cell.infeasible)
        ratio, ratio_error = cell.perplexity.ratio(dense.perplexity)
        references = {score.task: score for score in dense.scores}
        return cls(
            method=cell.method,
            perplexity=cell.perplexity.value,
            perplexity_error=cell.perplexity.standard_error,
            ratio=ratio,
            ratio_error=ratio_error,
            scores={score.task: Metric(score.value, score.standard_error) for score in cell.scores},
            changes={score.task: Metric(*score.difference(references[score.task])) for score in cell.scores},
            touched=cell.touched / cell.dense,
            resident=cell.resident / cell.dense,
            fix_rate=cell.fix_rate,
            seconds=cell.seconds,
        )

    @property
    def accuracy(self) -> Metric | None:
        """Mean accuracy of the tasks, and its standard error; None without tasks."""
        if not self.scores:
            return None
        values, count = list(self.scores.values()), len(self.scores)
        error = sum(score.standard_error**2 for score in values) ** 0.5
        return Metric(sum(score.value for score in values) / count, error / count)

    def shown(self) -> dict[str, str]:
        """The figures for people, by the heads of the columns; tasks are left out."""
        if self.infeasible:
            return {"method": self.method.label, "perplexity": "does not fit"}
        return {
            "method": self.method.label,
            "perplexity": f"{self.perplexity:.2f}",
            "/ dense": self.shown_ratio(),
            "touched": f"{self.touched:.1%}",
            "resident": f"{self.resident:.1%}",
            "fixed": "" if self.fix_rate is None else f"{self.fix_rate:.1%}",
            "seconds": f"{self.seconds:.0f}",
        }

    def shown_ratio(self) -> str:
        """The ratio of perplexities with its standard error, for people."""
        digits = 4 if self.ratio < 10 else 1
        return f"{self.ratio:.{digits}f} ± {self.ratio_error:.{digits}f}"

    def as_dict(self) -> dict[str, Any]:
        """Flat plain values, one per figure."""
        values: dict[str, Any] = {"method": self.method.name, "reduction": self.method.reduction}
        values |= {name: getattr(self, name) for name in FIGURES}
        for task, score in self.scores.items():
            change = self.changes[task]
            values |= {task: score.value, f"{task}_error": score.standard_error}
            values |= {f"{task}_change": change.value, f"{task}_change_error": change.standard_error}
        return values | {"fix_rate": self.fix_rate, "seconds": self.seconds, "infeasible": self.infeasible}


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write rows to a CSV file, a column per figure."""
    records = [row.as_dict() for row in rows]
    names = list(dict.fromkeys(name for record in records for name in record))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(records)
