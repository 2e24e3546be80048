"""`tardis inspect`: hot ranges, linearity and bytes per layer, before or after folding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..calibration.text import Windows
from ..checkpoint.format import CheckpointConfig
from ..checkpoint.loading import (
    is_folded,
    load_config,
    load_dense,
    load_model,
    load_report,
    load_tokenizer,
    window_length,
)
from ..checkpoint.record import RECORD
from ..config import FoldConfig
from ..errors import InvalidInputError
from ..evaluation.plots import plot_fold, plot_survey
from ..evaluation.survey import COVERAGE, Survey, survey
from ..ffn.accounting import planned
from ..report import FoldReport
from . import output as show
from .options import AsJson, ModelName, TextField, Texts
from .place import check_plot
from .texts import calibration_windows, read

_TOKENS = 16_384
_BITS = (1, 2, 3, 4)
_REDUCTIONS = (0.5, 0.7, 0.8)


def inspect(
    model: ModelName,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw.", show_default=False)] = None,
    text: Texts = None,
    text_field: TextField = None,
    tokens: Annotated[int, typer.Option(help="Of the text, at most.")] = _TOKENS,
    as_json: AsJson = False,
) -> None:
    """Show what folding a dense model would start from, or what a folded one consists of."""
    if plot:
        check_plot(plot)
    report = load_report(model)
    if report is not None:
        _inspect_folded(model, report, plot, text, as_json)
    elif is_folded(model):
        _inspect_unrecorded(model, plot, text, as_json)
    else:
        _inspect_dense(model, plot, text, text_field, tokens, as_json)


def _inspect_unrecorded(model: str, plot: Path | None, text: list[str] | None, as_json: bool) -> None:
    """Show a fold without tardis.json, as transformers saves it anew: how it is stored, and what is not known."""
    if plot or text:
        raise InvalidInputError(
            f"{model} is folded and has no {RECORD}, which holds the figures to draw; give the directory of the fold "
            f"as tardis fold wrote it. To measure on a text: tardis eval {model}."
        )
    settings = CheckpointConfig.read(load_config(model).quantization_config)
    if as_json:
        figures = {"layers": settings.layers, "linears": settings.linears, "calibration": settings.calibration}
        show.print_json({"model": model, "folded": True, "plot": None, "recorded": False, **figures})
        return
    made = show.table(f"{model}, folded", "FFN", "activation", "predictor bits", "group size", "fold", "fallback")
    for name, layer in settings.formats().items():
        stored = (f"int{bits}" if bits else "dense" for bits in (layer.fold_bits, layer.fallback_bits))
        made.add_row(name, layer.activation, str(layer.bits), str(layer.group_size), *stored)
    show.out.print(made)
    show.out.print(
        f"{model} has no {RECORD}: what was measured when it was folded, and what it fixes and touches, is not known"
    )


def _inspect_folded(model: str, report: FoldReport, plot: Path | None, text: list[str] | None, as_json: bool) -> None:
    if text:
        raise InvalidInputError(f"{model} is folded and holds its figures; to measure on a text: tardis eval {model}.")
    if plot:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_fold(load_model(model), report, plot, Path(model).name)
    if as_json:
        show.print_json({"model": model, "folded": True, "plot": plot and str(plot), **report.as_dict()})
        return
    config, calibration = report.config, report.calibration
    show.out.print(show.layer_table(report, f"{model}, folded"))
    show.out.print(show.legend())
    show.out.print(show.totals(report))
    if report.linears:
        show.out.print(show.linears(report.linears))
    show.out.print(
        f"policy {config.get('policy')}, refit {'on' if config.get('refit') else 'off'}, rounding "
        f"{config.get('rounding')}, calibrated on {calibration.get('tokens', 0):,} tokens in windows of "
        f"{calibration.get('sequence_length')}"
    )
    _say_where(plot)


def _inspect_dense(
    model: str, plot: Path | None, text: list[str] | None, field: str | None, tokens: int, as_json: bool
) -> None:
    if plot and not text:
        raise InvalidInputError("a plot of a dense model needs text to measure on; give --text FILE.")
    windows: Windows | None = None
    documents = read(text, field) if text else []
    loaded = load_dense(model)
    if text:
        tokenizer, config = load_tokenizer(model), FoldConfig(tokens=tokens)
        length = window_length(loaded, tokenizer, None)
        windows = calibration_windows(documents, loaded, tokenizer, config, length)
    with show.progress_bars() as progress:
        found = survey(loaded, windows, progress)
    if plot:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_survey(found, plot, Path(model).name)
    if as_json:
        figures = {"model": model, "folded": False, "plot": plot and str(plot), **found.as_dict()}
        show.print_json({**figures, "feasible": [_feasible(found, bits) for bits in _BITS]})
        return
    _print_survey(model, found)
    if not text:
        show.say("give --text FILE to measure linearity and the width of the inputs' ranges")
    _say_where(plot)


def _print_survey(model: str, found: Survey) -> None:
    made = show.table(f"{model}, dense", "FFN", "d", "h", "activation", "bytes", "linearity", f"{COVERAGE:.0%} range")
    for layer in found.layers:
        measured = layer.linearity is not None and layer.width is not None
        made.add_row(
            layer.prefix,
            str(layer.d),
            str(layer.h),
            layer.activation,
            show.size(layer.dense),
            f"{layer.linearity:.4f}" if measured else "-",
            f"{layer.width:.1%}" if measured else "-",
        )
    show.out.print(made)
    show.out.print(
        "[dim]linearity: squared error of the best affine map over the variance of the FFN's output. "
        f"{COVERAGE:.0%} range: width of the range that holds {COVERAGE:.0%} of a neuron's inputs, over the range of "
        "all of them, mean of the neurons.[/]"
    )
    budget = show.table("What fits", "predictor bits", "largest reduction", *(f"fixed at {r:g}" for r in _REDUCTIONS))
    for bits in _BITS:
        row = _feasible(found, bits)
        budget.add_row(str(bits), f"{row['largest_reduction']:.2%}", *map(_rate, row["fix_rates"].values()))
    show.out.print(budget)


def _feasible(found: Survey, bits: int) -> dict[str, Any]:
    """The largest reduction with a predictor of `bits`, and the neurons fixed at others; None where none fits."""
    costs = [planned(ffn, FoldConfig().storage, bits) for ffn in found.ffns]
    dense, always, every = (sum(getattr(cost, part) for cost in costs) for part in ("dense", "always", "fixing"))
    rates = {str(r): ((1 - r) * dense - always) / every for r in _REDUCTIONS}
    return {
        "bits": bits,
        "largest_reduction": 1 - always / dense,
        "fix_rates": {r: min(rate, 1.0) if rate >= 0 else None for r, rate in rates.items()},
    }


def _say_where(plot: Path | None) -> None:
    if plot:
        show.say(f"[green]drawn to {escape(str(plot))}[/]")


def _rate(rate: float | None) -> str:
    return "does not fit" if rate is None else f"{rate:.2%}"
