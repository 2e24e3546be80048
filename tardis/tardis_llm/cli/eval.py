"""`tardis eval`: token perplexity on a text; for a folded model also what it fixes and touches there."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import InvalidInputError
from ..evaluation.fix_rate import count_fixes, measured
from ..evaluation.perplexity import Perplexity, token_perplexity, windows_of
from ..loading import load_model, load_report, load_tokenizer, window_length
from ..report import FoldReport
from . import output as show
from .options import AsJson, Dtype, ModelName, TextFile


def evaluate(
    model: ModelName,
    text: TextFile,
    window: Annotated[
        int | None, typer.Option(help="Tokens per window; what the model allows without.", show_default=False)
    ] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Measure the token perplexity of a dense or folded model on a text."""
    clock = show.Clock()
    content = read_text(text)
    report = load_report(model)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype)
    windows = windows_of(content, tokenizer, window_length(loaded, tokenizer, window))
    with count_fixes(loaded) as counts, show.progress_bars() as progress:
        result = token_perplexity(loaded, windows, progress)
    found = report and measured(report, loaded, counts.rates)
    if as_json:
        show.print_json(_figures(model, text, str(loaded.dtype), result, found, clock))
        return
    _print(result, report, found)
    show.say(clock.sentence())


def read_text(path: Any) -> str:
    """The text of a file.

    Raises:
        InvalidInputError: it is missing or not UTF-8.
    """
    try:
        content: str = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not UTF-8 text ({error}); convert it first.") from error
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read ({error.strerror}); give a text file.") from error
    return content


def _figures(
    model: str, text: Any, dtype: str, result: Perplexity, report: FoldReport | None, clock: show.Clock
) -> dict[str, Any]:
    return {
        "model": model,
        "text": str(text),
        "dtype": dtype.removeprefix("torch."),
        "measure": "token perplexity",
        "perplexity": result.as_dict(),
        "ffn": report and report.as_dict()["totals"],
        "fix_rate_per_layer": report and {layer.prefix: layer.fix_rate for layer in report.layers},
        **clock.as_dict(),
    }


def _print(result: Perplexity, report: FoldReport | None, found: FoldReport | None) -> None:
    show.out.print(
        f"token perplexity [bold]{show.perplexity(result)}[/] (standard error), {result.tokens:,} tokens predicted in "
        f"{result.windows:,} windows of {result.length}"
    )
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
