"""`tardis compare`: methods side by side on one model, in perplexity, accuracy, bytes and seconds."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedModel

from .. import __version__
from ..baselines import NAMES as BASELINES
from ..baselines import Scope
from ..calibration.text import check_windows
from ..checkpoint.loading import load_config, load_dense, load_tokenizer, window_length
from ..config import FoldConfig
from ..errors import InvalidInputError
from ..evaluation.compare import Cell, Comparison, Row, Tasks, as_records, row
from ..evaluation.curves import plot_curves
from ..evaluation.methods import DENSE, Method, parse
from ..evaluation.perplexity import windows_of
from ..evaluation.speed import cpu_name
from ..evaluation.tasks import ACCURACIES, TASKS, Metric, check_tasks
from ..files import digest
from . import output as show
from .options import AsJson, ModelName, TextField, Texts
from .place import check_writable
from .stopping import stoppable
from .texts import calibration_windows, read

#: folds in few bits at the bytes where they are at home, everything else at each of the reductions
METHODS = ",".join(
    [
        "tardis,tardis-paper",
        *(f"tardis-int8@{r}" for r in (0.75, 0.8, 0.83)),
        *(f"tardis-int4@{r}" for r in (0.83, 0.875, 0.915)),
        *BASELINES,
    ]
)
_REDUCTIONS = "0.5,0.7,0.8"
_TOKENS = 131_072
_LIMIT = 500
_DEFAULT = FoldConfig()

Output = Annotated[Path, typer.Option("-o", "--output", help="Directory of the results; gone on with if there.")]
Evaluation = Annotated[
    str, typer.Option("--eval-text", help="Text to judge perplexity on, none of it calibrated on.", show_default=False)
]
TaskNames = Annotated[
    str,
    typer.Option("--tasks", help="Zero-shot tasks as name or name:items, such as blimp:2010,lambada; none if empty."),
]
TaskData = Annotated[
    Path | None, typer.Option(help="Folder of the tasks' files; the hub's data without.", show_default=False)
]


def compare(
    model: ModelName,
    directory: Output,
    eval_text: Evaluation,
    text: Texts = None,
    text_field: TextField = None,
    methods: Annotated[str, typer.Option(help="name or name@reduction, with commas.")] = METHODS,
    reductions: Annotated[str, typer.Option(help="For the methods named without one.")] = _REDUCTIONS,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = _DEFAULT.tokens,
    eval_tokens: Annotated[
        int, typer.Option(min=0, help="Evaluation tokens, evenly spread windows; 0 for all.")
    ] = _TOKENS,
    window: Annotated[
        int | None, typer.Option(help="Tokens per window; what the model allows without.", show_default=False)
    ] = None,
    tasks: TaskNames = "",
    task_data: TaskData = None,
    limit: Annotated[int, typer.Option(min=0, help="Items per task, evenly spread; 0 for all.")] = _LIMIT,
    scope: Annotated[Scope, typer.Option(help="What baselines compress; folds are of FFNs only.")] = "ffn",
    dtype: Annotated[str, typer.Option(help="Of the dense model.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Picks the calibration windows.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compress a model by several methods and compare what is left of it, at what size.

    Every method gets the same calibration text and goes through the model in the same order. Run the same command again
    to go on after an interruption, or with more methods.
    """
    clock = show.Clock()
    chosen = [Method(DENSE), *parse(methods, _numbers(reductions))]
    wanted = _tasks(tasks, task_data, limit)
    config = FoldConfig(tokens=tokens, sequence_length=window, seed=seed)
    check_writable(directory)
    comparison = _prepare(model, text, text_field, eval_text, eval_tokens, wanted, config, scope, dtype, directory)
    comparison.open()
    title = _title(comparison)
    show.say(escape(title))
    with stoppable(lambda: "Finished methods are kept: run the same command again to go on behind them."):
        cells = _run(comparison, chosen)
    rows = [row(cell, cells[0]) for cell in cells]
    _write(directory, rows, title)
    if as_json:
        show.print_json({"comparison": comparison.record, "rows": as_records(rows), **clock.as_dict()})
        return
    _print(rows)
    show.say(f"[green]table.csv and curves.png written to {escape(str(directory))}[/], {clock.sentence()}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidInputError(f"--reductions is {text!r}; give numbers such as 0.5,0.7,0.8.") from error


def _tasks(names: str, data: Path | None, limit: int) -> Tasks:
    """Tasks out of "blimp:2010,lambada", checked."""
    limits: dict[str, int | None] = {}
    for part in filter(None, names.split(",")):
        name, _, items = part.partition(":")
        if items and not items.isdigit():
            raise InvalidInputError(f"--tasks has {part!r}; write for example blimp:2010.")
        limits[name] = int(items or limit) or None
        check_tasks([name], data, limits[name])
        if TASKS[name].headline not in ACCURACIES:
            raise InvalidInputError(f"{name} has no accuracy to compare; give its text as --eval-text.")
    return Tasks(limits, data)


def _prepare(
    model: str,
    text: Sequence[str] | None,
    field: str | None,
    eval_text: str,
    eval_tokens: int,
    tasks: Tasks,
    config: FoldConfig,
    scope: Scope,
    dtype: str,
    directory: Path,
) -> Comparison:
    """Everything read and checked."""
    load_config(model)
    if not text:
        raise InvalidInputError("calibration needs text: give --text FILE (repeatable), none of it in --eval-text.")
    tokenizer = load_tokenizer(model)
    *documents, judged = read([*text, eval_text], field)
    dense = load_dense(model, dtype)
    length = window_length(dense, tokenizer, config.sequence_length)
    calibration = calibration_windows(documents, dense, tokenizer, config, length)
    evaluation = _spread(windows_of(judged.text, tokenizer, length), eval_tokens)
    check_windows(dense, evaluation, tokenizer)
    record = {
        "model": {"name": Path(model).name, "sha256": digest(dense.state_dict().values()), "dtype": dtype},
        "calibration": {
            "files": [Path(name).name for name in text],
            "tokens": calibration.fit.numel(),
            "heldout_tokens": calibration.heldout.numel(),
            "sha256": digest([calibration.fit, calibration.heldout]),
        },
        "evaluation": {
            "file": Path(eval_text).name,
            "tokens": evaluation.numel(),
            "window": length,
            "sha256": digest([evaluation]),
        },
        "tasks": {"items": tasks.limits, "local": tasks.data is not None},
        "fold": {name: value for name, value in config.as_dict().items() if name != "reduction"},
        "scope": scope,
        "software": {"tardis": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
    }

    def load() -> PreTrainedModel:
        return load_dense(model, dtype)

    return Comparison(load, tokenizer, calibration, evaluation, tasks, config, scope, directory, record)


def _spread(windows: Tensor, tokens: int) -> Tensor:
    """Evenly spread windows, `tokens` in all; every window for 0."""
    count = min(len(windows), max(2, tokens // windows.shape[1])) if tokens else len(windows)
    return windows[torch.arange(count) * len(windows) // count]


def _title(comparison: Comparison) -> str:
    record = comparison.record
    calibration, evaluation, tasks = record["calibration"], record["evaluation"], record["tasks"]
    parts = [
        f"{record['model']['name']} in {record['model']['dtype']}",
        f"{evaluation['file']}: token perplexity, {evaluation['tokens']:,} tokens in windows of {evaluation['window']}",
        f"{calibration['tokens']:,} + {calibration['heldout_tokens']:,} calibration tokens",
    ]
    if tasks["items"]:
        items = (f"{name} ({count:,} items)" if count else name for name, count in tasks["items"].items())
        parts.append(f"zero-shot {', '.join(items)}")
    return "; ".join(parts)


def _run(comparison: Comparison, methods: list[Method]) -> list[Cell]:
    """Every cell, with a line for each that is new."""
    cells = []
    for number, method in enumerate(methods, 1):
        prefix = f"{number}/{len(methods)} {method.label}: "
        cell = comparison.finished(method)
        if cell is None:
            with show.progress_bars(prefix) as progress:
                cell = comparison.cell(method, progress)
        cells.append(cell)
        show.say(escape(prefix) + _sentence(row(cell, cells[0])))
    return cells


def _sentence(found: Row) -> str:
    if found.infeasible:
        return f"[yellow]does not fit:[/] {escape(found.infeasible)}"
    return f"{found.ratio:.4f} of the dense perplexity, touched {found.touched:.1%}, {found.seconds:.0f} s"


def _write(directory: Path, rows: list[Row], title: str) -> None:
    """table.csv and curves.png."""
    records = as_records(rows)
    names = list(dict.fromkeys(name for record in records for name in record))
    with (directory / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(records)
    plot_curves(rows, directory / "curves.png", title)


def _print(rows: list[Row]) -> None:
    """Two tables, each narrow enough for a terminal of 80 columns."""
    made = show.table("Perplexity and bytes", "method", "perplexity", "/ dense", "touched", "resident", "fixed", "s")
    for each in rows:
        if each.infeasible:
            made.add_row(each.method.label, "", "does not fit")
            continue
        made.add_row(
            each.method.label,
            f"{each.perplexity:.2f}",
            f"{each.ratio:.4f} ± {each.ratio_error:.4f}",
            f"{each.touched:.1%}",
            f"{each.resident:.1%}",
            "" if each.fix_rate is None else f"{each.fix_rate:.1%}",
            f"{each.seconds:.0f}",
        )
    show.out.print(made)
    show.out.print(
        "[dim]token perplexity; / dense: its ratio to the dense model's, standard error paired by window. touched: "
        "bytes read per token, resident: bytes kept, both with mask indices, scales, ranges and biases, as shares of "
        "the dense model's. fixed: share of neurons that a fold corrects per token. s: seconds to compress.[/]"
    )
    if rows[0].scores:
        _print_scores(rows)


def _print_scores(rows: list[Row]) -> None:
    tasks = list(rows[0].scores)
    made = show.table("Zero-shot accuracy in %", "method", *tasks, "mean")
    for each in rows:
        if each.accuracy:
            made.add_row(each.method.label, *map(_percent, [*each.scores.values(), each.accuracy]))
    show.out.print(made)


def _percent(score: Metric) -> str:
    return f"{100 * score.value:.1f} ± {100 * score.standard_error:.1f}"
