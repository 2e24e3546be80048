"""`tardis eval`: perplexity on a text, accuracy on tasks; for a folded model also what it fixes and touches there."""

from __future__ import annotations

from typing import Annotated

import typer

from ..calibration.limits import window_length
from ..checkpoint.loading import dtype_name, load_model, load_report, load_tokenizer
from ..checkpoint.manifest import MANIFEST
from ..errors import InvalidInputError
from ..evaluation.judging import Judgement, Recipe, judge
from ..evaluation.tasks import TASKS, Tasks, TaskScore, check_tasks
from ..report import FoldReport
from ..runtime.placing import folded_ffns
from . import output as show
from .options import AsJson, Dtype, ModelName, TaskData, TextField, TextFile, Window, read_texts

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
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a dense or folded model on a text, and its zero-shot accuracy on tasks."""
    clock = show.Clock()
    if text is None and tasks is None:
        raise InvalidInputError("there is nothing to measure; give --text FILE, --tasks NAMES or both.")
    names = [] if tasks is None else [name.strip() for name in tasks.split(",")]
    if tasks is not None:
        check_tasks(names, task_data, limit)
    content = None if text is None else read_texts([text], text_field)[0]
    report = load_report(model)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype)
    length = window_length(loaded, tokenizer, window)
    wanted = Tasks(dict.fromkeys(names, limit), task_data)
    with show.progress_bars() as progress:
        found = judge(loaded, tokenizer, length, content, recipe, wanted, report, progress)
    if as_json:
        what = {"model": model, "text": text, "dtype": dtype_name(loaded)}
        show.print_json({**what, **found.as_dict(), **clock.as_dict()})
        return
    _print(found, report)
    if report is None and folded_ffns(loaded):
        show.say(f"{model} has no {MANIFEST}: what its fold fixes and how many bytes that touches is not known")
    show.say(clock.sentence())


def _print(found: Judgement, report: FoldReport | None) -> None:
    if found.perplexity is not None:
        result = found.perplexity
        value = f"[bold]{result.value:,.2f} ± {result.standard_error:,.2f}[/] (standard error)"
        show.out.print(f"{result.kind} {value}, {result.sentence()}")
    if report is not None and found.folded is not None:
        _print_fold({"held-out calibration text": report, "this text": found.folded})
    if found.scores:
        _print_tasks(found.scores)


def _print_fold(reports: dict[str, FoldReport]) -> None:
    made = show.table("FFN", "measured on", "fixed", "touched", "reduction", "resident")
    for name, figures in reports.items():
        made.add_row(
            name,
            f"{figures.fix_rate:.2%}",
            f"{figures.touched / figures.dense:.2%}",
            f"{figures.reduction:.2%}",
            f"{figures.resident / figures.dense:.1%}",
        )
    show.out.print(made)


def _print_tasks(scores: tuple[TaskScore, ...]) -> None:
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
