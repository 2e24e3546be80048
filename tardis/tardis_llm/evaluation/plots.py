"""One picture per model: hot ranges, linearity per layer, and where the bytes go."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn

from ..errors import InvalidInputError
from ..ffn.weights import FoldedWeights, nbytes
from ..report import FoldReport, LayerReport
from ..runtime.placing import folded_weights
from .survey import COVERAGE, Survey

matplotlib.use("Agg")  # a file is all that is wanted; no display is needed

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart
_BLUE, _ORANGE, _GREEN, _YELLOW, _VERMILION, _GREY = "#0072B2", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#D9D9D9"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
}
_SLOT = 0.86  # of a layer's place along the axis is filled
_POINTS = 240  # neurons drawn per layer, evenly spread over the sorted ones
_MOST_LABELS = 24


def plot_fold(model: nn.Module, report: FoldReport, path: Path, title: str = "") -> None:
    """Draw a folded model: hot ranges, error per layer with and without fixing, and the bytes of each layer.

    Args:
        model: folded.
        report: report of its fold, or what `fix_rate.measured` makes of it.
        path: file of the PNG; its folder is made if missing.
        title: name of the model.

    Raises:
        InvalidInputError: model and report do not belong together.
        OSError: the file cannot be written.

    Examples:
        >>> from tardis_llm.checkpoint.loading import load_model, load_report
        >>> plot_fold(load_model("folded"), load_report("folded"), Path("fold.png"), title="two blocks")
        >>> Path("fold.png").stat().st_size > 10_000
        True
    """
    ffns = folded_weights(model)
    if list(ffns) != [layer.prefix for layer in report.layers]:
        raise InvalidInputError("the report is not that of this model; use the one of its own checkpoint.")
    hot = [torch.stack([ffn.neurons.low.float(), ffn.neurons.high.float()]) for ffn in ffns.values()]
    names = _layer_names(list(ffns))
    shares = f"touched {report.touched / report.dense:.1%} and resident {report.resident / report.dense:.1%}"
    static = any(ffn.static for ffn in ffns.values())
    figures = f"{shares} of the dense FFN bytes, {report.exact}"
    with _page(path, title, figures) as (top, left, right):
        if static:
            _kept(top, report.layers, names)
        else:
            _hot_ranges(top, hot, names)
        top.set_title("Hot ranges: where a line stands for the activation")
        _errors(left, report.layers, names)
        _bytes(right, report.layers, list(ffns.values()), names)


def plot_survey(survey: Survey, path: Path, title: str = "") -> None:
    """Draw a dense model: the neurons' narrow ranges, linearity and bytes per layer.

    Args:
        survey: made with text.
        path: file of the PNG; its folder is made if missing.
        title: name of the model.

    Raises:
        InvalidInputError: the survey was made without text.
        OSError: the file cannot be written.

    Examples:
        >>> from tardis_llm.calibration.text import split_windows
        >>> from tardis_llm.evaluation.survey import survey
        >>> plot_survey(survey(model, split_windows(windows, 32, 0.125)), Path("survey.png"))
        >>> Path("survey.png").stat().st_size > 10_000
        True
    """
    if not survey.ranges:
        raise InvalidInputError("a plot of a dense model needs text to measure on; give --text FILE.")
    names = _layer_names([layer.prefix for layer in survey.layers])
    position = range(len(names))
    total = sum(layer.dense for layer in survey.layers) / 2**20
    figures = f"{len(names)} dense FFNs of {total / len(names):,.2f} MiB, {survey.tokens:,} tokens of text"
    with _page(path, title, figures) as (top, left, right):
        _hot_ranges(top, survey.ranges, names)
        top.set_title(f"Where {COVERAGE:.0%} of each neuron's inputs fall")
        left.bar(position, [layer.linearity or 0.0 for layer in survey.layers], color=_BLUE, width=0.7)
        _error_axis(left, names)
        left.set_title("Linearity: what the best affine map leaves")
        right.bar(position, [layer.width or 0.0 for layer in survey.layers], color=_ORANGE, width=0.7)
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        right.set_ylim(0, 1)
        right.set_ylabel("of the range of all its inputs, mean neuron")
        _layer_axis(right, names)
        right.set_title(f"Width of the range with {COVERAGE:.0%} of a neuron's inputs")


@contextmanager
def _page(path: Path, title: str, figures: str) -> Iterator[tuple[Axes, Axes, Axes]]:
    """A wide panel above two, drawn within the context and written to the file at its end."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 8.5), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.05))
        yield figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
        figure.suptitle(f"{title}: {figures}" if title else figures, fontsize=13, x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _hot_ranges(axes: Axes, ranges: list[Tensor], names: list[str]) -> None:
    """Per layer, the neurons' [low, high], each [2, h], as bands side by side in the order of their middles."""
    bottom, top = _limits(ranges)
    for index, bounds in enumerate(ranges):
        low, high = (bound.clamp(bottom, top).double().numpy() for bound in bounds)
        order = np.argsort(low + high)
        order = order[np.linspace(0, len(order) - 1, min(_POINTS, len(order))).round().astype(int)]
        x = index + _SLOT * np.linspace(-0.5, 0.5, len(order))
        axes.fill_between(x, low[order], high[order], color=_BLUE, alpha=0.35, linewidth=0, step="mid")
        for bound in (low, high):
            middle = float(np.median(bound))
            axes.plot([x[0], x[-1]], [middle, middle], color=_VERMILION, linewidth=1.6)
    axes.plot([], [], color=_BLUE, alpha=0.35, linewidth=8, label="one neuron's range, neurons sorted")
    axes.plot([], [], color=_VERMILION, linewidth=1.6, label="median bound of the layer")
    axes.axhline(0, color="#808080", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(bottom, top)
    axes.set_ylabel("pre-activation")
    axes.legend(loc="upper right", ncols=2, bbox_to_anchor=(1, 1.13))
    _layer_axis(axes, names)


def _kept(axes: Axes, layers: list[LayerReport], names: list[str]) -> None:
    """Per layer, the share of the neurons that a static fold keeps."""
    axes.bar(range(len(layers)), [layer.kept for layer in layers], 0.7, color=_BLUE)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("of the neurons are kept")
    axes.set_ylim(0, 1)
    _layer_axis(axes, names)


def _limits(ranges: list[Tensor]) -> tuple[float, float]:
    """Bottom and top of the axis: nearly every finite bound, and a margin."""
    bounds = torch.cat([layer.flatten() for layer in ranges])
    finite = bounds[bounds.isfinite()]
    if not len(finite):
        return -1.0, 1.0
    bottom, top = np.quantile(finite.numpy(), (0.002, 0.998))
    margin = 0.05 * max(float(top - bottom), 1e-3)
    return float(bottom) - margin, float(top) + margin


def _errors(axes: Axes, layers: list[LayerReport], names: list[str]) -> None:
    """Per layer, what the best affine map leaves of the output, and what the fold with its fixing leaves."""
    position = np.arange(len(layers))
    axes.bar(position - 0.2, [layer.linearity for layer in layers], 0.4, color=_ORANGE, label="best affine map alone")
    axes.bar(position + 0.2, [layer.error for layer in layers], 0.4, color=_BLUE, label="fold with fixing")
    _error_axis(axes, names)
    axes.set_title("Error of the FFN output, held-out tokens")
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # room for the legend above the bars
    axes.legend(loc="upper right", ncols=2)


def _error_axis(axes: Axes, names: list[str]) -> None:
    axes.set_ylabel("squared error / variance of the output")
    axes.set_ylim(0, None)
    _layer_axis(axes, names)


def _bytes(axes: Axes, layers: list[LayerReport], ffns: list[FoldedWeights], names: list[str]) -> None:
    """Per layer, the bytes a token reads, stacked by part, and those that it no longer reads."""
    shares = np.array([_shares(layer, ffn) for layer, ffn in zip(layers, ffns, strict=True)])  # [layers, parts]
    parts = (
        ("fold", _BLUE),
        ("predictor and scales", _ORANGE),
        ("ranges, lines, up bias", _YELLOW),
        ("kept neurons", _GREEN),
        ("fixed rows and columns", _VERMILION),
    )
    base = np.zeros(len(layers))
    for (name, colour), share in zip(parts, shares.T, strict=True):
        axes.bar(
            range(len(layers)), share, 0.7, bottom=base, color=colour, edgecolor="white", linewidth=0.5, label=name
        )
        base += share
    saved = np.clip(1 - base, 0, None)
    axes.bar(range(len(layers)), saved, 0.7, bottom=base, color="white", edgecolor=_GREY, hatch="///", label="not read")
    if len(layers) <= _MOST_LABELS // 2:
        for index, share in enumerate(base):
            axes.text(index, share + 0.02, f"{share:.1%}", ha="center", va="bottom", fontsize=9, bbox=_LABEL)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("of the layer's dense FFN bytes, per token")
    axes.set_ylim(0, max(1.0, float(base.max()) * 1.05))
    _layer_axis(axes, names)
    axes.set_title("Where the bytes go")
    box = axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.93), ncols=2, fontsize=9, frameon=True, borderpad=0.8)
    box.get_frame().set(facecolor="white", edgecolor=_GREY, alpha=1.0)


_LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}


def _shares(layer: LayerReport, weights: FoldedWeights) -> tuple[float, ...]:
    """Fold, predictor, ranges with lines and up bias, kept neurons and fixing, as shares of the dense bytes."""
    parts = (
        nbytes(weights.fold, weights.bias),
        nbytes(weights.predictor),
        nbytes(weights.neurons, weights.b1),
        weights.keeps,
        layer.fix_rate * weights.fixing,
    )
    return tuple(part / layer.dense for part in parts)


def _layer_axis(axes: Axes, names: list[str]) -> None:
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xlabel("layer")
    axes.grid(False, axis="x")
    step = math.ceil(len(names) / _MOST_LABELS)
    axes.set_xticks(range(0, len(names), step), names[::step])


def _layer_names(prefixes: list[str]) -> list[str]:
    """The number of each layer, out of its full name."""
    return [next((part for part in prefix.split(".") if part.isdigit()), prefix) for prefix in prefixes]
