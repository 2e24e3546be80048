"""Compare methods on one model: each compresses a fresh copy, which is then judged on the same text and the same tasks.

Every cell of the grid is a file of its own, so a comparison that was interrupted goes on where it stopped, and one that
is finished can be extended by more methods.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..baselines import BaselineReport, Scope, count_skips, find_matrices
from ..calibration.documents import Documents
from ..calibration.inputs import tensors_of, token_count
from ..calibration.limits import check_windows, window_length
from ..calibration.text import Windows, calibration_windows, some_windows
from ..checkpoint.loading import dtype_name
from ..config import FoldConfig
from ..errors import InfeasibleBudgetError, InvalidInputError
from ..families.sites import find_ffns
from ..files import differences, digest, read_json, write_json
from ..report import FoldReport, Progress
from .fix_rate import count_fixes, measured
from .machine import cpu_name
from .methods import DENSE, Method, apply_method
from .perplexity import token_perplexity, windows_of
from .rows import Cell
from .tasks import Tasks

RECORD = "compare.json"
_CELLS, _WORK = "cells", ".work"


@dataclass
class Comparison:
    """A grid of methods on one model.

    Attributes:
        load: makes a fresh dense model, in eval mode and on the CPU, on every call.
        tokenizer: the model's tokenizer.
        calibration: windows that every method calibrates on.
        evaluation: [windows, length] token ids for perplexity; no text that was calibrated on.
        tasks: tasks for zero-shot accuracy.
        config: settings of folds.
        scope: "ffn", or "all" for baselines that compress every linear layer of the blocks.
        directory: holds the results.
        device: what models are compressed and judged on, and must fit into.
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
    device: torch.device
    record: dict[str, Any]

    @classmethod
    def prepare(
        cls,
        load: Callable[[], PreTrainedModel],
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[Documents],
        eval_text: Documents,
        eval_tokens: int,
        tasks: Tasks,
        config: FoldConfig,
        scope: Scope,
        directory: Path,
        device: torch.device,
    ) -> Comparison:
        """A comparison with its windows, everything checked, and the record of what it is of.

        Args:
            name: directory or hub name of the model.
            texts: what methods calibrate on.
            eval_text: what perplexity is measured on.
            eval_tokens: tokens of it, evenly spread; 0 for all.
            load, tokenizer, tasks, config, scope, directory, device: attributes of the comparison.

        Raises:
            InvalidInputError: there is too little text, or the model does not know a token.
        """
        model = load()
        length = window_length(model, tokenizer, config.sequence_length)
        calibration = calibration_windows(texts, model, tokenizer, config, length)
        evaluation = some_windows(windows_of(eval_text.text, tokenizer, length), eval_tokens)
        check_windows(model, evaluation, tokenizer)
        record = {
            "model": {
                "name": Path(name).name,
                "sha256": digest(model.state_dict().values()),
                "dtype": dtype_name(model),
            },
            "calibration": {
                "files": [Path(text.source).name for text in texts],
                "tokens": token_count(calibration.fit),
                "heldout_tokens": token_count(calibration.heldout),
                "sha256": digest([part for inputs in calibration for part in tensors_of(inputs)]),
            },
            "evaluation": {
                "file": Path(eval_text.source).name,
                "tokens": evaluation.numel(),
                "window": length,
                "sha256": digest([evaluation]),
            },
            "tasks": {"items": tasks.limits, "local": tasks.data is not None},
            "fold": {name: value for name, value in config.as_dict().items() if name != "reduction"},
            "scope": scope,
            "software": {"tardis": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": str(device)},
        }
        return cls(load, tokenizer, calibration, evaluation, tasks, config, scope, directory, device, record)

    @property
    def title(self) -> str:
        """Model, texts and tasks, for people."""
        calibration, evaluation = self.record["calibration"], self.record["evaluation"]
        parts = [
            f"{self.record['model']['name']} in {self.record['model']['dtype']}",
            f"{evaluation['file']}: token perplexity, {evaluation['tokens']:,} tokens in windows of "
            f"{evaluation['window']}",
            f"{calibration['tokens']:,} + {calibration['heldout_tokens']:,} calibration tokens",
        ]
        if self.tasks.limits:
            items = (f"{name} ({count:,} items)" if count else name for name, count in self.tasks.limits.items())
            parts.append(f"zero-shot {', '.join(items)}")
        return "; ".join(parts)

    def open(self) -> None:
        """Make the directory, or check that it is of this comparison.

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
            found = self._measured(method, progress)
            write_json(self._path(method), found.as_dict())
            shutil.rmtree(self._work(method), ignore_errors=True)
        return found

    def _path(self, method: Method) -> Path:
        return self.directory / _CELLS / f"{re.sub('[^a-z0-9.-]', '_', method.label)}.json"

    def _work(self, method: Method) -> Path:
        return self.directory / _WORK / self._path(method).stem

    def _measured(self, method: Method, progress: Progress) -> Cell:
        model = self.load().to(self.device)
        everything = sum(matrix.dense_bytes for block in find_matrices(model, self.scope) for matrix in block)
        beside = everything - sum(site.outline().nbytes for site in find_ffns(model))  # what a fold leaves as it is
        cell = Cell(method, None, everything, everything, everything)
        report: FoldReport | BaselineReport | None = None
        if method.name != DENSE:
            start, work = time.perf_counter(), self._work(method)
            try:
                config = replace(self.config, device=str(self.device))
                report = apply_method(method, model, self.calibration, config, self.scope, work, progress)
            except InfeasibleBudgetError as error:
                return Cell(method, infeasible=str(error))
            cell = replace(cell, seconds=time.perf_counter() - start)
        with count_fixes(model) as counts, count_skips(model) as skips:
            perplexity = token_perplexity(model, self.evaluation, progress)
        if isinstance(report, FoldReport):
            report = measured(report, model, counts.rates)
            cell = replace(cell, fix_rate=report.fix_rate)
        else:
            report, beside = report and skips.measured(report), 0
        if report is not None:
            sizes = {name: getattr(report, name) + beside for name in ("dense", "touched", "resident")}
            cell = replace(cell, **sizes)
        scores = self.tasks.run(model, self.tokenizer, self.evaluation.shape[1], progress)
        return replace(cell, perplexity=perplexity, scores=scores)
