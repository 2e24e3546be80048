"""Measure one model: perplexity on a text, scores on tasks, and what a folded model fixes and touches on that text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.documents import Documents
from ..calibration.limits import check_windows
from ..report import FoldReport, Progress
from .fix_rate import count_fixes, measured
from .perplexity import Perplexity, token_perplexity, windows_of
from .rolling import Document, WordPerplexity, documents_of, word_perplexity
from .tasks import Tasks, TaskScore

Recipe = Literal["tokens", "words"]


@dataclass(frozen=True)
class Judgement:
    """What was measured of a model.

    Attributes:
        perplexity: perplexity on the text; None without one.
        folded: report of the fold, with fix rates and bytes as measured on the text; None for a dense model.
        scores: scores of the tasks.
    """

    perplexity: Perplexity | WordPerplexity | None
    folded: FoldReport | None
    scores: tuple[TaskScore, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without those of single windows, documents and items."""
        folded = self.folded
        return {
            "measure": self.perplexity and self.perplexity.kind,
            "perplexity": self.perplexity and self.perplexity.as_dict(),
            "ffn": folded and folded.as_dict()["totals"],
            "linears": folded and folded.as_dict()["linears"],
            "fix_rate_per_layer": folded and {layer.prefix: layer.fix_rate for layer in folded.layers},
            "tasks": [score.as_dict() for score in self.scores],
        }


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text: Documents | None,
    recipe: Recipe,
    tasks: Tasks,
    report: FoldReport | None,
    progress: Progress,
) -> Judgement:
    """Measure a model on a text and on tasks.

    Args:
        model: dense or folded, in eval mode.
        tokenizer: the model's.
        length: tokens that the model sees at once.
        text: what perplexity is measured on; None for no perplexity.
        recipe: perplexity per token of windows over the whole text, or per word of whole documents.
        tasks: zero-shot tasks.
        report: report of the fold that made the model; None for a dense model.
        progress: told of each step.

    Raises:
        InvalidInputError: too little text, tokens that the model does not know, or as `run_tasks`.
    """
    perplexity = folded = None
    if text is not None:
        with count_fixes(model) as counts:
            perplexity = _perplexity(model, tokenizer, length, text, recipe, progress)
        folded = report and measured(report, model, counts.rates)
    return Judgement(perplexity, folded, tasks.run(model, tokenizer, length, progress))


def _perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text: Documents,
    recipe: Recipe,
    progress: Progress,
) -> Perplexity | WordPerplexity:
    if recipe == "words":
        documents = [Document.of(each) for each in text.texts] if text.records else documents_of(text.text)
        return word_perplexity(model, tokenizer, documents, length, progress)
    windows = windows_of(text.text, tokenizer, length)
    check_windows(model, windows, tokenizer)
    return token_perplexity(model, windows, progress)
