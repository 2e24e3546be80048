"""`tardis inspect`: hot ranges, linearity and bytes per layer, before or after folding."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..calibration.limits import window_length
from ..calibration.text import Windows, calibration_windows
from ..checkpoint.config_file import load_config
from ..checkpoint.format import CheckpointConfig
from ..checkpoint.loading import is_folded, load_dense, load_model, load_report, load_tokenizer
from ..checkpoint.manifest import MANIFEST
from ..config import FoldConfig
from ..errors import InvalidInputError
from ..evaluation.plots import plot_fold, plot_survey
from ..evaluation.survey import COVERAGE, Feasible, Survey, feasible, survey
from ..report import FoldReport
from . import output as show
from .options import AsJson, ModelName, TextField, Texts, read_texts
from .place import check_plot

_BITS = (1, 2, 3, 4)
_REDUCTIONS = (0.5, 0.7, 0.8)


def inspect(
    model: ModelName,
    plot: Annotated[Path | None, typer.Option(help="File to draw a picture to, such as fold.png.")] = None,
    text: Texts = None,
    text_field: TextField = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to measure a dense model on, at most.")] = 16_384,
    as_json: AsJson = False,
) -> None:
    """Show what a folded model consists of, or how well a dense one would fold.

    Of a folded model: fix rate, error and bytes of every layer. Of a dense model: its FFNs and the reductions that fit,
    and with --text how linear each FFN is and how narrow the ranges of its neurons' inputs are.
    """
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
            f"{model} is folded and has no {MANIFEST}, which holds the figures to draw; give the directory of the fold "
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
        f"{model} has no {MANIFEST}: what was measured when it was folded, and what it fixes and touches, is not known"
    )


def _inspect_folded(model: str, report: FoldReport, plot: Path | None, text: list[str] | None, as_json: bool) -> None:
    if text:
        raise InvalidInputError(f"{model} is folded and holds its figures; to measure on a text: tardis eval {model}.")
    if plot:
        plot_fold(load_model(model), report, plot, Path(model).name)
    if as_json:
        show.print_json({"model": model, "folded": True, "plot": plot and str(plot), **report.as_dict()})
        return
    config, calibration = report.config, report.calibration
    show.print_fold(report, f"{model}, folded")
    show.out.print(
        f"policy {config.get('policy')}, refit {'on' if config.get('refit') else 'off'}, rounding "
        f"{config.get('rounding')}, calibrated on {calibration.get('tokens', 0):,} tokens in windows of "
        f"{calibration.get('sequence_length')}"
    )
    if source := report.source:
        show.out.print(escape(f"folded from {source.get('file')}, whose weights were in {source.get('quantisation')}"))
    _say_where(plot)


def _inspect_dense(
    model: str, plot: Path | None, text: list[str] | None, field: str | None, tokens: int, as_json: bool
) -> None:
    if plot and not text:
        raise InvalidInputError("a plot of a dense model needs text to measure on; give --text FILE.")
    windows: Windows | None = None
    documents = read_texts(text, field) if text else []
    loaded = load_dense(model)
    if text:
        tokenizer, config = load_tokenizer(model), FoldConfig(tokens=tokens)
        length = window_length(loaded, tokenizer, None)
        windows = calibration_windows(documents, loaded, tokenizer, config, length)
    with show.progress_bars() as progress:
        found = survey(loaded, windows, progress)
    reachable = [feasible(found, bits, _REDUCTIONS) for bits in _BITS]
    if plot:
        plot_survey(found, plot, Path(model).name)
    if as_json:
        what = {"model": model, "folded": False, "plot": plot and str(plot)}
        show.print_json({**what, **found.as_dict(), "feasible": [asdict(each) for each in reachable]})
        return
    _print_survey(model, found)
    _print_feasible(reachable)
    if not text:
        show.say("give --text FILE to measure linearity and the width of the inputs' ranges")
    _say_where(plot)


def _print_survey(model: str, found: Survey) -> None:
    made = show.table(f"{model}, dense", "FFN", "d", "h", "activation", "bytes", "linearity", f"{COVERAGE:.0%} range")
    for layer in found.layers:
        measured = layer.linearity is not None and layer.width is not None
        figures = (f"{layer.linearity:.4f}", f"{layer.width:.1%}") if measured else ("-", "-")
        sizes = str(layer.d), str(layer.h), layer.activation, show.size(layer.dense)
        made.add_row(layer.prefix, *sizes, *figures)
    show.out.print(made)
    show.out.print(
        "[dim]linearity: squared error of the best affine map over the variance of the FFN's output. "
        f"{COVERAGE:.0%} range: width of the range that holds {COVERAGE:.0%} of a neuron's inputs, over the range of "
        "all of them, mean of the neurons.[/]"
    )


def _print_feasible(reachable: list[Feasible]) -> None:
    made = show.table("What fits", "predictor bits", "largest reduction", *(f"fixed at {r:g}" for r in _REDUCTIONS))
    for each in reachable:
        made.add_row(str(each.bits), f"{each.largest_reduction:.2%}", *map(_rate, each.fix_rates.values()))
    show.out.print(made)


def _rate(rate: float | None) -> str:
    return "does not fit" if rate is None else f"{rate:.2%}"


def _say_where(plot: Path | None) -> None:
    if plot:
        show.say(f"[green]drawn to {escape(str(plot))}[/]")
