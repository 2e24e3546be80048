"""`tardis eval`: perplexity on a text, accuracy on tasks; for a folded model also what it fixes and touches there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.documents import Documents
from ..calibration.text import check_windows
from ..checkpoint.loading import load_model, load_report, load_tokenizer, window_length
from ..checkpoint.record import RECORD
from ..errors import InvalidInputError
from ..evaluation.fix_rate import count_fixes, measured
from ..evaluation.perplexity import Perplexity, token_perplexity, windows_of
from ..evaluation.rolling import Document, WordPerplexity, documents_of, word_perplexity
from ..evaluation.tasks import TASKS, TaskScore, check_tasks, run_tasks
from ..report import FoldReport
from ..runtime.placing import folded_ffns
from . import output as show
from .options import AsJson, Dtype, ModelName, TextField, TextFile
from .texts import read

Recipe = Literal["tokens", "words"]


def evaluate(
    model: ModelName,
    text: TextFile = None,
    text_field: TextField = None,
    tasks: Annotated[
        str | None,
        typer.Option(help=f"Tasks of lm-eval, such as blimp,lambada; all: {', '.join(TASKS)}.", show_default=False),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder of the tasks' files; from the hub without.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items per task, evenly spread; all without.", show_default=False)
    ] = None,
    recipe: Annotated[
        Recipe,
        typer.Option(
            help="Perplexity per token of windows over the whole text, as in papers on compression, or per word of "
            "whole documents, as in lm-eval."
        ),
    ] = "tokens",
    window: Annotated[
        int | None, typer.Option(help="Tokens per window; what the model allows without.", show_default=False)
    ] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a dense or folded model on a text, and its zero-shot accuracy on tasks."""
    clock = show.Clock()
    names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
    content = _check(text, text_field, names if tasks is not None else None, task_data, limit)
    report = load_report(model)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype)
    length = window_length(loaded, tokenizer, window)
    result = found = None
    with show.progress_bars() as progress:
        if content is not None:
            with count_fixes(loaded) as counts:
                result = _perplexity(loaded, tokenizer, content, recipe, length, progress)
            found = report and measured(report, loaded, counts.rates)
        scores = run_tasks(loaded, tokenizer, names, task_data, limit, length, progress) if names else []
    if as_json:
        show.print_json(_figures(model, text, str(loaded.dtype), result, found, scores, clock))
        return
    _print(result, report, found)
    _print_tasks(scores)
    if report is None and folded_ffns(loaded):
        show.say(f"{model} has no {RECORD}: what its fold fixes and how many bytes that touches is not known")
    show.say(clock.sentence())


def _check(
    text: str | None, field: str | None, names: list[str] | None, data: Path | None, limit: int | None
) -> Documents | None:
    """The text to measure on, if there is one; raises InvalidInputError on wrong input before anything is loaded."""
    if text is None and names is None:
        raise InvalidInputError("there is nothing to measure; give --text FILE, --tasks NAMES or both.")
    if names is not None:
        check_tasks(names, data, limit)
    return None if text is None else read([text], field)[0]


def _perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    content: Documents,
    recipe: Recipe,
    length: int,
    progress: Any,
) -> Perplexity | WordPerplexity:
    if recipe == "words":
        texts = [Document.of(text) for text in content.texts] if content.records else documents_of(content.text)
        return word_perplexity(model, tokenizer, texts, length, progress)
    windows = windows_of(content.text, tokenizer, length)
    check_windows(model, windows, tokenizer)
    return token_perplexity(model, windows, progress)


def _figures(
    model: str,
    text: str | None,
    dtype: str,
    result: Perplexity | WordPerplexity | None,
    report: FoldReport | None,
    scores: list[TaskScore],
    clock: show.Clock,
) -> dict[str, Any]:
    return {
        "model": model,
        "text": text,
        "dtype": dtype.removeprefix("torch."),
        "measure": result and _kind(result),
        "perplexity": result and result.as_dict(),
        "ffn": report and report.as_dict()["totals"],
        "linears": report and report.as_dict()["linears"],
        "fix_rate_per_layer": report and {layer.prefix: layer.fix_rate for layer in report.layers},
        "tasks": [score.as_dict() for score in scores],
        **clock.as_dict(),
    }


def _kind(result: Perplexity | WordPerplexity) -> str:
    return "word perplexity" if isinstance(result, WordPerplexity) else "token perplexity"


def _print(result: Perplexity | WordPerplexity | None, report: FoldReport | None, found: FoldReport | None) -> None:
    if result is None:
        return
    value = f"{_kind(result)} [bold]{result.value:,.2f} ± {result.standard_error:,.2f}[/] (standard error)"
    if isinstance(result, WordPerplexity):
        counts = (
            f"{result.words:,} words, {result.tokens:,} tokens predicted in {result.documents:,} documents, up to "
            f"{result.length} at once; {result.byte_perplexity:.4f} per byte"
        )
    else:
        counts = f"{result.tokens:,} tokens predicted in {result.windows:,} windows of {result.length}"
    show.out.print(f"{value}, {counts}")
    if report is None or found is None:
        return
    made = show.table("FFN", "measured on", "fixed", "touched", "reduction", "resident")
    for name, figures in (("held-out calibration text", report), ("this text", found)):
        made.add_row(
            name,
            f"{figures.fix_rate:.2%}",
            f"{figures.touched / figures.dense:.2%}",
            f"{figures.reduction:.2%}",
            f"{figures.resident / figures.dense:.1%}",
        )
    show.out.print(made)


def _print_tasks(scores: list[TaskScore]) -> None:
    if not scores:
        return
    made = show.table("Tasks, zero-shot", "task", "metric", "value", "standard error", "items")
    for score in scores:
        first = (score.metric, (score.value, score.standard_error))
        for metric, (value, error) in (first, *score.also.items()):
            form = ".2%" if metric.startswith("acc") else ",.2f"
            shown = metric == score.metric
            made.add_row(
                score.task if shown else "",
                metric,
                format(value, form),
                f"± {format(error, form)}",
                f"{score.items:,}" if shown else "",
                style=None if shown else "dim",
            )
    show.out.print(made)
