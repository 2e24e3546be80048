"""`tardis eval`: perplexity on a text, accuracy on tasks; for a folded model also what it fixes and touches there."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.documents import Documents
from ..calibration.limits import check_windows, window_length
from ..checkpoint.loading import dtype_name, load_model, load_report, load_tokenizer
from ..checkpoint.manifest import MANIFEST
from ..devices import device_named
from ..errors import InvalidInputError
from ..evaluation.fix_rate import count_fixes, measured
from ..evaluation.perplexity import Perplexity, token_perplexity, windows_of
from ..evaluation.rolling import Document, WordPerplexity, documents_of, word_perplexity
from ..evaluation.tasks import TASKS, Tasks, TaskScore, check_tasks
from ..report import FoldReport, Progress
from ..runtime.placing import folded_ffns
from . import output as show
from .options import AsJson, Device, Dtype, ModelName, TaskData, TextField, TextFile, Window, read_texts

Recipe = Literal["tokens", "words"]
TaskNames = Annotated[str | None, typer.Option(help=f"Zero-shot tasks, with commas between: {', '.join(TASKS)}.")]
Limit = Annotated[int | None, typer.Option(help="Items of each task, evenly spread; default: all.")]
RecipeOption = Annotated[
    Recipe,
    typer.Option(
        help="What perplexity is measured per: tokens of windows over the whole text, as in papers on compression, or "
        "words of whole documents, as in lm-eval."
    ),
]


def evaluate(
    model: ModelName,
    text: TextFile = None,
    text_field: TextField = None,
    tasks: TaskNames = None,
    task_data: TaskData = None,
    limit: Limit = None,
    recipe: RecipeOption = "tokens",
    window: Window = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a dense or folded model on a text, and its zero-shot accuracy on tasks."""
    clock = show.Clock()
    if text is None and tasks is None:
        raise InvalidInputError("there is nothing to measure; give --text FILE, --tasks NAMES or both.")
    names = [] if tasks is None else [name.strip() for name in tasks.split(",")]
    if tasks is not None:
        check_tasks(names, task_data, limit)
    place = device_named(device)
    content = None if text is None else read_texts([text], text_field)[0]
    report = load_report(model)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype).to(place)
    length = window_length(loaded, tokenizer, window)
    perplexity = folded = None
    with show.progress_bars() as progress:
        if content is not None:
            with count_fixes(loaded) as counts:
                perplexity = _perplexity(loaded, tokenizer, length, content, recipe, progress)
            folded = report and measured(report, loaded, counts.rates)
        scores = Tasks(dict.fromkeys(names, limit), task_data).run(loaded, tokenizer, length, progress)
    if as_json:
        what = {"model": model, "text": text, "dtype": dtype_name(loaded)}
        show.print_json({**what, **_figures(perplexity, folded, scores), **clock.as_dict()})
        return
    if perplexity is not None:
        value = f"[bold]{perplexity.value:,.2f} ± {perplexity.standard_error:,.2f}[/] (standard error)"
        show.out.print(f"{perplexity.kind} {value}, {perplexity.sentence()}")
    if report is not None and folded is not None:
        _print_fold({"held-out calibration text": report, "this text": folded})
    if scores:
        _print_tasks(scores)
    if report is None and folded_ffns(loaded):
        show.say(f"{model} has no {MANIFEST}: what its fold fixes and how many bytes that touches is not known")
    show.say(clock.sentence())


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


def _figures(
    perplexity: Perplexity | WordPerplexity | None, folded: FoldReport | None, scores: tuple[TaskScore, ...]
) -> dict[str, Any]:
    """Plain values, without those of single windows, documents and items."""
    return {
        "measure": perplexity and perplexity.kind,
        "perplexity": perplexity and perplexity.as_dict(),
        "ffn": folded and folded.as_dict()["totals"],
        "linears": folded and folded.as_dict()["linears"],
        "fix_rate_per_layer": folded and {layer.prefix: layer.fix_rate for layer in folded.layers},
        "tasks": [score.as_dict() for score in scores],
    }


def _print_fold(reports: dict[str, FoldReport]) -> None:
    rows = []
    for name, ffns in reports.items():
        shares = f"{ffns.touched / ffns.dense:.2%}", f"{ffns.reduction:.2%}", f"{ffns.resident / ffns.dense:.1%}"
        rows.append([name, f"{ffns.fix_rate:.2%}", *shares])
    show.print_table("FFN", ["measured on", "fixed", "touched", "reduction", "resident"], rows)


def _print_tasks(scores: tuple[TaskScore, ...]) -> None:
    made = show.table("Tasks, zero-shot", "task", "metric", "value", "standard error", "items")
    for score in scores:
        first = (score.metric, (score.value, score.standard_error))
        for metric, (value, error) in (first, *score.also.items()):
            form = ".2%" if metric.startswith("acc") else ",.2f"
            figures = metric, format(value, form), f"± {format(error, form)}"
            if metric == score.metric:
                made.add_row(score.task, *figures, f"{score.items:,}")
            else:
                made.add_row("", *figures, "", style="dim")
    show.out.print(made)
