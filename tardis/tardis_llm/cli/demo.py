"""`tardis demo`: fold the bundled sample model two ways, compare, generate, draw. No network needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from .. import sample
from ..calibration.limits import window_length
from ..calibration.text import Windows, read_windows
from ..checkpoint.folded import save_folded
from ..checkpoint.loading import load_dense, load_tokenizer
from ..config import FoldConfig
from ..errors import InvalidInputError
from ..evaluation.fix_rate import count_fixes, measured
from ..evaluation.generation import generate, prompt_ids
from ..evaluation.perplexity import Perplexity, token_perplexity, windows_of
from ..evaluation.plots import plot_fold
from ..files import write_json
from ..pipeline.fold import fold
from ..report import FoldReport
from . import output as show
from .options import AsJson
from .place import check_writable

_REDUCTION = 0.78
_TOKENS, _PROBE_TOKENS = 24_576, 4_096
_EVALUATION = 100_000  # characters of the evaluation text
_PROMPT, _ANSWER, _TEMPERATURE = "The city was founded in", 48, 0.7
_CHECKPOINT, _PLOT, _RECORD = "folded", "fold.png", "demo.json"

Output = Annotated[Path, typer.Option("-o", "--output", help="Directory for the folded model, a picture and figures.")]

#: the paper's method, and ours
_COVERAGE = FoldConfig(
    reduction=_REDUCTION, policy="coverage", predictor_bits=2, refit=False, tokens=_TOKENS, probe_tokens=_PROBE_TOKENS
)
_ERROR = FoldConfig(reduction=_REDUCTION, predictor_bits=1, tokens=_TOKENS, probe_tokens=_PROBE_TOKENS)


@dataclass(frozen=True)
class Judged:
    """A model of the demo and its perplexity; the report of its fold, or None for the dense model."""

    name: str
    perplexity: Perplexity
    report: FoldReport | None = None


def demo(output: Output = Path("demo-output"), as_json: AsJson = False) -> None:
    """Fold the bundled sample model, compare it with the dense one, and generate text with both."""
    clock = show.Clock()
    check_place(output)
    name = str(sample.model_dir())
    tokenizer = load_tokenizer(name)
    dense = load_dense(name)
    length = window_length(dense, tokenizer, None)
    windows = windows_of(sample.evaluation_text().read_text(encoding="utf-8")[:_EVALUATION], tokenizer, length)
    calibration = read_windows([sample.calibration_text()], tokenizer, _TOKENS, length, _ERROR.heldout)

    prompt = prompt_ids(dense, tokenizer, _PROMPT)
    rows = [_evaluate("dense", dense, windows)]
    texts = {"dense": generate(dense, tokenizer, prompt, _ANSWER, _TEMPERATURE)}
    paper = load_dense(name)
    rows.append(
        _evaluate("coverage, no refit", paper, windows, _fold("coverage, no refit", paper, calibration, _COVERAGE))
    )
    model = load_dense(name)
    report = _fold("error, refit", model, calibration, _ERROR)
    save_folded(model, report, output / _CHECKPOINT, tokenizer)
    folded = AutoModelForCausalLM.from_pretrained(output / _CHECKPOINT).eval()  # as a user loads it
    rows.append(_evaluate("error, refit", folded, windows, report))
    texts["folded"] = generate(folded, tokenizer, prompt, _ANSWER, _TEMPERATURE)
    plot_fold(folded, rows[-1].report or report, output / _PLOT, "bundled sample")
    figures = {**_figures(rows, texts), **clock.as_dict()}
    write_json(output / _RECORD, show.plain(figures))
    if as_json:
        show.print_json({"output": str(output), **figures})
    else:
        _print(rows, texts)
        _say_next(output, clock)


def check_place(output: Path) -> None:
    """Make the output directory, marked as the demo's own.

    Raises:
        InvalidInputError: it holds something else, or cannot be written.
    """
    check_writable(output)
    if output.exists() and any(output.iterdir()) and not (output / _RECORD).exists():
        raise InvalidInputError(f"{output} holds something that is not from a demo; choose another directory with -o.")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / _RECORD, {"status": "unfinished"})


def _fold(name: str, model: PreTrainedModel, calibration: Windows, config: FoldConfig) -> FoldReport:
    with show.progress_bars(f"{name}: ") as progress:
        return fold(model, calibration, config, progress=progress)


def _evaluate(name: str, model: PreTrainedModel, windows: Tensor, report: FoldReport | None = None) -> Judged:
    with show.progress_bars(f"{name}: ") as progress, count_fixes(model) as counts:
        perplexity = token_perplexity(model, windows, progress)
    return Judged(name, perplexity, report and measured(report, model, counts.rates))


def _figures(rows: list[Judged], texts: dict[str, str]) -> dict[str, Any]:
    compared = []
    for row in rows:
        ratio, error = row.perplexity.ratio(rows[0].perplexity)
        compared.append(
            {
                "name": row.name,
                "perplexity": row.perplexity.as_dict(),
                "ratio": ratio,
                "ratio_standard_error": error,
                "ffn": row.report and row.report.as_dict()["totals"],
            }
        )
    return {"status": "finished", "compared": compared, "prompt": _PROMPT, "texts": texts}


def _print(rows: list[Judged], texts: dict[str, str]) -> None:
    title = f"The bundled sample at reduction {_REDUCTION}, everything measured on held-out text"
    made = show.table(title, "model", "perplexity", "to dense", "touched", "resident", "fixed")
    for row in rows:
        figures = ["1", "100%", "100%", "-"]
        if ffns := row.report:
            ratio, error = row.perplexity.ratio(rows[0].perplexity)
            shares = f"{ffns.touched / ffns.dense:.1%}", f"{ffns.resident / ffns.dense:.1%}"
            figures = [f"{ratio:.3f} ± {error:.3f}", *shares, f"{ffns.fix_rate:.2%}"]
        made.add_row(row.name, show.perplexity(row.perplexity), *figures)
    first = rows[0].perplexity
    show.out.print(made)
    show.out.print(
        f"[dim]token perplexity and ratio with standard errors; {first.tokens:,} tokens in windows of {first.length}. "
        "touched: FFN bytes read per token at batch 1; resident: FFN bytes in memory; both of the dense FFN bytes. "
        "fixed: neurons corrected per token. coverage, no refit: the published method; error, refit: ours.[/]\n"
    )
    for name, text in texts.items():
        show.out.print(f"[dim]{name}:[/] [bold]{escape(_PROMPT)}[/]{escape(text)}\n")


def _say_next(output: Path, clock: show.Clock) -> None:
    place = escape(str(output))
    show.out.print(f"done in {clock.sentence()}; in [green]{place}[/]:")
    for name, what in ((_CHECKPOINT, "folded checkpoint"), (_PLOT, "picture"), (_RECORD, "all figures")):
        show.out.print(f"  {name:<10} {what}")
    show.out.print("next:")
    show.out.print(f'  tardis generate {place}/{_CHECKPOINT} "Once upon a time"')
    show.out.print("  tardis fold MODEL -o DIR --text FILE     with a model and text of yours")
