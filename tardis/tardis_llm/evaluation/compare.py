"""Compare methods on one model: each compresses a fresh copy, which is then judged on the same text and the same tasks.

Every cell of the grid is a file of its own, so a comparison that was interrupted goes on where it stopped, and one that
is finished can be extended by more methods.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..baselines import Scope, find_matrices
from ..calibration.text import Windows
from ..config import FoldConfig
from ..errors import InfeasibleBudgetError, InvalidInputError
from ..families.sites import find_ffns
from ..files import differences, read_json, write_json
from ..report import FoldReport, Progress
from .fix_rate import count_fixes, measured
from .methods import DENSE, Method, compress
from .perplexity import Perplexity, token_perplexity
from .tasks import Metric, TaskScore, run_tasks

RECORD = "compare.json"
_CELLS, _WORK = "cells", ".work"


@dataclass(frozen=True)
class Tasks:
    """Zero-shot tasks and how much of them.

    Attributes:
        limits: items of each task, by its name in `tasks.TASKS`; None for all of them.
        data: folder of local files, or None for the hub's.
    """

    limits: dict[str, int | None] = field(default_factory=dict)
    data: Path | None = None

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, progress: Progress
    ) -> tuple[TaskScore, ...]:
        """The scores of every task; see `run_tasks`."""
        return tuple(
            run_tasks(model, tokenizer, [name], self.data, limit, length, progress)[0]
            for name, limit in self.limits.items()
        )


@dataclass(frozen=True)
class Cell:
    """What one method came to.

    Attributes:
        method: name and reduction.
        infeasible: why the method does not reach the reduction; everything below is empty then.
        dense, touched, resident: bytes of the weights in scope; `touched` on the evaluation text.
        fix_rate: share of neurons fixed per token on the evaluation text; None for what does not fold.
        seconds: taken to compress.
        perplexity: on the evaluation text.
        scores: of the tasks.
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
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
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


@dataclass
class Comparison:
    """A grid of methods on one model.

    Attributes:
        load: a fresh dense model, in eval mode, on every call.
        tokenizer: the model's.
        calibration: windows that every method calibrates on.
        evaluation: [windows, length] token ids for perplexity; no text that was calibrated on.
        tasks: for zero-shot accuracy.
        config: settings of folds.
        scope: "ffn", or "all" for baselines that compress every linear layer of the blocks.
        directory: of the results.
        record: what the comparison is of, in plain values: a directory is only gone on with if it agrees, but for
            "machine", which may change.
    """

    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    calibration: Windows
    evaluation: Tensor
    tasks: Tasks
    config: FoldConfig
    scope: Scope
    directory: Path
    record: dict[str, Any]

    def open(self) -> None:
        """Make the directory, or check that it is of the same comparison.

        Raises:
            InvalidInputError: it is of another one; says what differs.
        """
        path = self.directory / RECORD
        if path.exists():
            found = {**read_json(path), "machine": self.record.get("machine")}
            changed = list(differences(found, self.record))
            if changed:
                raise InvalidInputError(
                    f"{self.directory} holds a different comparison: {'; '.join(changed)}. Use the same settings, or "
                    "another directory."
                )
        (self.directory / _CELLS).mkdir(parents=True, exist_ok=True)
        write_json(path, self.record)

    def finished(self, method: Method) -> Cell | None:
        """The cell of a method, if it has been measured."""
        path = self._path(method)
        return Cell.from_dict(read_json(path)) if path.exists() else None

    def cell(self, method: Method, progress: Progress) -> Cell:
        """Measure one method and keep the result; nothing to do if it is there."""
        found = self.finished(method)
        if found is None:
            found = self._measure(method, progress)
            write_json(self._path(method), found.as_dict())
            shutil.rmtree(self._work(method), ignore_errors=True)
        return found

    def _path(self, method: Method) -> Path:
        return self.directory / _CELLS / f"{re.sub('[^a-z0-9.-]', '_', method.label)}.json"

    def _work(self, method: Method) -> Path:
        return self.directory / _WORK / self._path(method).stem

    def _measure(self, method: Method, progress: Progress) -> Cell:
        model = self.load()
        everything = sum(matrix.dense_bytes for block in find_matrices(model, self.scope) for matrix in block)
        start = time.perf_counter()
        if method.name == DENSE:
            return self._judge(Cell(method, None, everything, everything, everything), model, progress)
        folded = sum(site.weights().nbytes for site in find_ffns(model))
        untouched = everything - folded if method.is_fold else 0  # attention's, where it is in scope
        try:
            report = compress(
                method,
                model,
                self.calibration,
                self.config,
                self.scope,
                self._work(method),
                progress,
            )
        except InfeasibleBudgetError as error:
            return Cell(method, str(error))
        seconds = time.perf_counter() - start
        if not isinstance(report, FoldReport):
            cell = Cell(method, None, report.dense, report.touched, report.resident, None, seconds)
            return self._judge(cell, model, progress)
        with count_fixes(model) as counts:
            perplexity = token_perplexity(model, self.evaluation, progress)
        there = measured(report, model, counts.rates)
        dense, touched, resident = there.dense + untouched, there.touched + untouched, there.resident + untouched
        cell = Cell(method, None, dense, touched, resident, there.fix_rate, seconds, perplexity)
        return self._judge(cell, model, progress)

    def _judge(self, cell: Cell, model: PreTrainedModel, progress: Progress) -> Cell:
        """The cell with perplexity, if it has none yet, and the tasks' scores."""
        values = dict(vars(cell))
        values["perplexity"] = cell.perplexity or token_perplexity(model, self.evaluation, progress)
        values["scores"] = self.tasks.run(model, self.tokenizer, self.evaluation.shape[1], progress)
        return Cell(**values)


@dataclass(frozen=True)
class Row:
    """A cell beside the dense model, in the figures that people read.

    Attributes:
        method: name and reduction.
        infeasible: see `Cell`; everything below is NaN or empty then.
        perplexity, perplexity_error: value and standard error.
        ratio, ratio_error: perplexity over the dense model's, standard error paired by window.
        scores: per task, accuracy and standard error.
        changes: per task, accuracy less the dense model's and its standard error paired by item.
        touched, resident: shares of the dense bytes.
        fix_rate, seconds: see `Cell`.
    """

    method: Method
    infeasible: str | None = None
    perplexity: float = float("nan")
    perplexity_error: float = float("nan")
    ratio: float = float("nan")
    ratio_error: float = float("nan")
    scores: dict[str, Metric] = field(default_factory=dict)
    changes: dict[str, Metric] = field(default_factory=dict)
    touched: float = float("nan")
    resident: float = float("nan")
    fix_rate: float | None = None
    seconds: float = float("nan")

    @property
    def accuracy(self) -> Metric | None:
        """Mean accuracy of the tasks, and its standard error; None without tasks."""
        if not self.scores:
            return None
        values, count = list(self.scores.values()), len(self.scores)
        error = sum(score.standard_error**2 for score in values) ** 0.5
        return Metric(sum(score.value for score in values) / count, error / count)


def row(cell: Cell, dense: Cell) -> Row:
    """A cell beside that of the dense model."""
    if cell.perplexity is None or dense.perplexity is None:
        return Row(cell.method, cell.infeasible)
    references = {score.task: score for score in dense.scores}
    return Row(
        cell.method,
        None,
        cell.perplexity.value,
        cell.perplexity.standard_error,
        *cell.perplexity.ratio(dense.perplexity),
        {score.task: Metric(score.value, score.standard_error) for score in cell.scores},
        {score.task: Metric(*score.difference(references[score.task])) for score in cell.scores},
        cell.touched / cell.dense,
        cell.resident / cell.dense,
        cell.fix_rate,
        cell.seconds,
    )


def as_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as flat plain values, one column per figure: for CSV and JSON."""
    records = []
    for each in rows:
        record: dict[str, Any] = {"method": each.method.name, "reduction": each.method.reduction}
        for name in ("perplexity", "perplexity_error", "ratio", "ratio_error", "touched", "resident"):
            record[name] = getattr(each, name)
        for task, score in each.scores.items():
            record |= {task: score.value, f"{task}_error": score.standard_error}
            change = each.changes[task]
            record |= {f"{task}_change": change.value, f"{task}_change_error": change.standard_error}
        record |= {"fix_rate": each.fix_rate, "seconds": each.seconds, "infeasible": each.infeasible}
        records.append(record)
    return records


def from_records(records: Sequence[dict[str, Any]], tasks: Sequence[str]) -> list[Row]:
    """The inverse of `as_records`, from numbers or from the text of a CSV file."""

    def number(value: Any) -> float:
        return float("nan") if value in (None, "") else float(value)

    def metrics(record: dict[str, Any], suffix: str = "") -> dict[str, Metric]:
        names = [task for task in tasks if record.get(task) not in (None, "")]
        return {task: Metric(number(record[task + suffix]), number(record[f"{task}{suffix}_error"])) for task in names}

    rows = []
    for record in records:
        method = Method(record["method"], None if record["reduction"] in (None, "") else float(record["reduction"]))
        figures = {name: number(record[name]) for name in _FIGURES}
        fix_rate = None if record["fix_rate"] in (None, "") else float(record["fix_rate"])
        rows.append(
            Row(
                method,
                record["infeasible"] or None,
                **figures,
                scores=metrics(record),
                changes=metrics(record, "_change"),
                fix_rate=fix_rate,
            )
        )
    return rows


_FIGURES = ("perplexity", "perplexity_error", "ratio", "ratio_error", "touched", "resident", "seconds")
