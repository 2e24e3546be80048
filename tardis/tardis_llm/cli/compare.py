"""`tardis compare`: methods side by side on one model, in perplexity, accuracy, bytes and seconds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..baselines import NAMES as BASELINES
from ..baselines import Scope
from ..checkpoint.config_file import load_config
from ..checkpoint.loading import load_dense, load_tokenizer
from ..config import FoldConfig
from ..devices import device_named
from ..errors import InvalidInputError
from ..evaluation.compare import Comparison
from ..evaluation.curves import plot_curves
from ..evaluation.methods import DENSE, Method, parse
from ..evaluation.rows import Row, write_table
from ..evaluation.tasks import Tasks
from . import output as show
from .options import AsJson, Device, ModelName, TaskData, TextField, Texts, Window, numbers, read_texts
from .place import check_writable
from .stopping import stoppable

#: folds in few bits at the reductions that suit them, everything else at each of `--reductions`
METHODS = ",".join(
    [
        "tardis,tardis-paper",
        *(f"tardis-int8@{r}" for r in (0.75, 0.8, 0.83)),
        *(f"tardis-int4@{r}" for r in (0.83, 0.875, 0.915)),
        *BASELINES,
        *(f"gptq{bits}+affine+refit" for bits in (2, 3, 4)),
    ]
)

Output = Annotated[Path, typer.Option("-o", "--output", help="Directory for the results; finished ones are kept.")]
EvalText = Annotated[
    str, typer.Option("--eval-text", help="Text to measure perplexity on; give other text than in --text.")
]
Methods = Annotated[str, typer.Option(help="Methods as name or name@reduction, with commas between.")]
Reductions = Annotated[str, typer.Option(help="Reductions of the methods that are named without one.")]
Tokens = Annotated[int, typer.Option(help="Calibration tokens.")]
EvalTokens = Annotated[int, typer.Option(min=0, help="Tokens of --eval-text, evenly spread over it; 0 for all.")]
TaskNames = Annotated[
    str,
    typer.Option(
        "--tasks", help="Zero-shot tasks as name or name:items, such as blimp:2010,lambada; default: no tasks."
    ),
]
Limit = Annotated[int, typer.Option(min=0, help="Items of each task without a number, evenly spread; 0 for all.")]
ScopeOption = Annotated[
    Scope,
    typer.Option(
        help="What the baselines compress: the FFNs, or all linear layers in the blocks. Folds are of FFNs only."
    ),
]
DenseDtype = Annotated[str, typer.Option(help="Load the dense model in float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Picks the calibration windows.")]


def compare(
    model: ModelName,
    directory: Output,
    eval_text: EvalText,
    text: Texts = None,
    text_field: TextField = None,
    methods: Methods = METHODS,
    reductions: Reductions = "0.5,0.7,0.8",
    tokens: Tokens = FoldConfig.tokens,
    eval_tokens: EvalTokens = 131_072,
    window: Window = None,
    tasks: TaskNames = "",
    task_data: TaskData = None,
    limit: Limit = 500,
    scope: ScopeOption = "ffn",
    dtype: DenseDtype = "bfloat16",
    seed: Seed = FoldConfig.seed,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compress a model by several methods, and compare what is left of it at what size.

    Every method gets the same calibration text and goes through the model in the same order. Run the same command again
    to go on after an interruption, or with more methods.
    """
    clock = show.Clock()
    chosen = [Method(DENSE), *parse(methods, numbers("--reductions", reductions, float, "0.5,0.7,0.8"))]
    wanted = Tasks.parse(tasks, task_data, limit)
    config = FoldConfig(tokens=tokens, sequence_length=window, seed=seed)
    place = device_named(device)
    check_writable(directory)
    load_config(model)
    if not text:
        raise InvalidInputError("calibration needs text: give --text FILE (repeatable), none of it in --eval-text.")
    tokenizer = load_tokenizer(model)
    *texts, judged = read_texts([*text, eval_text], text_field)
    load = partial(load_dense, model, dtype)
    comparison = Comparison.prepare(
        load, model, tokenizer, texts, judged, eval_tokens, wanted, config, scope, directory, place
    )
    rows = _run(comparison, chosen)
    if as_json:
        records = [row.as_dict() for row in rows]
        show.print_json({"comparison": comparison.record, "rows": records, **clock.as_dict()})
        return
    _print(rows)
    show.say(f"[green]table.csv and curves.png written to {escape(str(directory))}[/], {clock.sentence()}")


def _run(comparison: Comparison, methods: list[Method]) -> list[Row]:
    """Every row, with a line for each on the screen; writes table.csv and curves.png."""
    comparison.open()
    show.say(escape(comparison.title))
    with stoppable(lambda: "Finished methods are kept: run the same command again to go on behind them."):
        rows = _rows(comparison, methods)
    write_table(comparison.directory / "table.csv", rows)
    plot_curves(rows, comparison.directory / "curves.png", comparison.title)
    return rows


def _rows(comparison: Comparison, methods: list[Method]) -> list[Row]:
    cells = []
    for number, method in enumerate(methods, 1):
        prefix = f"{number}/{len(methods)} {method.label}: "
        cell = comparison.finished(method)
        if cell is None:
            with show.progress_bars(prefix) as progress:
                cell = comparison.cell(method, progress)
        cells.append(cell)
        show.say(escape(prefix) + _sentence(Row.of(cell, cells[0])))
    return [Row.of(cell, cells[0]) for cell in cells]


def _sentence(row: Row) -> str:
    if row.infeasible:
        return f"[yellow]does not fit:[/] {escape(row.infeasible)}"
    return f"{row.ratio:.4f} of the dense perplexity, touched {row.touched:.1%}, {row.seconds:.0f} s"


def _print(rows: list[Row]) -> None:
    """Two tables, each narrow enough for a terminal of 80 columns."""
    show.print_table("Perplexity and bytes", rows[0].shown(), (row.shown().values() for row in rows))
    show.out.print(
        "[dim]token perplexity; / dense: its ratio to the dense model's, standard error paired by window. touched: "
        "bytes read per token, resident: bytes kept, both with mask indices, scales, ranges and biases, as shares of "
        "the dense model's. fixed: share of neurons that a fold corrects per token. seconds: to compress.[/]"
    )
    if rows[0].scores:
        made = show.table("Zero-shot accuracy in %", "method", *rows[0].scores, "mean")
        for row in rows:
            if row.accuracy:
                made.add_row(row.method.label, *(score.percent() for score in [*row.scores.values(), row.accuracy]))
        show.out.print(made)
