"""Curves of a comparison: perplexity and accuracy against the bytes touched and the bytes resident."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from .methods import DENSE
from .plots import STYLE
from .rows import Row


class Series(NamedTuple):
    """How a family of methods is drawn, in matplotlib's words."""

    label: str
    color: str
    marker: str
    linewidth: float = 1.4


#: how each method is drawn, by its name without the bits of quantisers; colours are Okabe and Ito's again
_SERIES = {
    "tardis": Series("TARDIS", "#0072B2", "o", 2.4),
    "tardis-int8": Series("TARDIS, int8", "#56B4E9", "o", 2.4),
    "tardis-int4": Series("TARDIS, int4", "#009E73", "o", 2.4),
    "tardis-paper": Series("fold as published", "#7F7F7F", "o"),
    "gptq": Series("GPTQ", "#D55E00", "s"),
    "rtn": Series("round to nearest", "#E69F00", "s"),
    "sparsegpt": Series("SparseGPT", "#CC79A7", "v"),
    "owl-sparsegpt": Series("SparseGPT, OWL", "#CC79A7", "^"),
    "wanda": Series("Wanda", "#8C6D31", "v"),
    "owl-wanda": Series("Wanda, OWL", "#8C6D31", "^"),
    "ria": Series("RIA", "#B5651D", "<"),
    "magnitude": Series("magnitude", "#BBBBBB", ">"),
    "affine": Series("affine map", "#000000", "*"),
    "gptq+affine": Series("GPTQ + affine term", "#A00000", "s"),
    "gptq+refit": Series("GPTQ, down refitted", "#FF9999", "s"),
    "gptq+affine+refit": Series("GPTQ + affine, refitted", "#700000", "D"),
    "rtn+affine": Series("nearest + affine term", "#B89400", "s"),
    "rtn+refit": Series("nearest, down refitted", "#FFD966", "s"),
    "rtn+affine+refit": Series("nearest + affine, refitted", "#806600", "D"),
    "teal": Series("TEAL", "#6A3D9A", "P"),
    "cats": Series("CATS", "#CAB2D6", "P"),
    "flap": Series("FLAP", "#33A02C", "X"),
    "skip": Series("FFNs skipped", "#1F1F7A", "X"),
}
_MARKS: dict[str, Any] = {"markersize": 6, "elinewidth": 1}
_WORST = 3.0  # perplexity over dense beyond which a method is broken, and drawn at the edge


def plot_curves(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw a comparison; the accuracy panels only if there were tasks.

    Args:
        rows: with the dense model among them.
        path: file of the PNG; its folder exists.
        title: model and data.

    Raises:
        OSError: the file cannot be written.
    """
    measured = [row for row in rows if row.infeasible is None]
    accuracy = any(row.accuracy for row in measured)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 10.5 if accuracy else 5.8), layout="constrained")
        panels = figure.subplots(2 if accuracy else 1, 2, squeeze=False)
        for axes, share in zip(panels[0], ("touched", "resident"), strict=True):
            _perplexity(axes, measured, share)
        for axes, share in zip(panels[-1] if accuracy else (), ("touched", "resident"), strict=False):
            _accuracy(axes, measured, share)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=7)
        figure.suptitle(title, fontsize=13, x=0.01, ha="left")
        figure.savefig(path, dpi=110)


def _perplexity(axes: Axes, rows: list[Row], share: str) -> None:
    for series, points in _by_series(rows):
        x = [getattr(row, share) for row in points]
        y = [min(row.ratio, _WORST) for row in points]
        errors = [row.ratio_error if row.ratio < _WORST else 0.0 for row in points]
        axes.errorbar(x, y, yerr=errors, **_MARKS, **series._asdict())
    axes.axhline(1.0, color="#808080", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yscale("function", functions=(_stretch, _shrink))
    axes.set_yticks([1, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, _WORST])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"≥ {value:g}" if value >= _WORST else f"{value:g}"))
    axes.set_ylim(0.9995, _WORST * 1.02)
    axes.set_ylabel("perplexity / dense")
    axes.set_title(f"Perplexity against bytes {share}")
    _bytes_axis(axes, share)


def _stretch(values: np.ndarray) -> np.ndarray:
    """Axis coordinate of a ratio: the root of what it is above 1, so that 1 % and 100 % are both to be seen."""
    return np.sqrt(np.maximum(np.asarray(values, dtype=float) - 0.999, 0.0))


def _shrink(values: np.ndarray) -> np.ndarray:
    return np.square(np.asarray(values, dtype=float)) + 0.999


def _accuracy(axes: Axes, rows: list[Row], share: str) -> None:
    for series, points in _by_series(rows):
        found = [(getattr(row, share), row.accuracy) for row in points if row.accuracy]
        x, y = [share for share, _ in found], [score.value for _, score in found]
        axes.errorbar(x, y, yerr=[score.standard_error for _, score in found], **_MARKS, **series._asdict())
    for row in rows:
        if row.method.name == DENSE and row.accuracy:
            axes.axhline(row.accuracy.value, color="#808080", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_ylabel("accuracy, mean of the tasks")
    axes.set_title(f"Zero-shot accuracy against bytes {share}")
    _bytes_axis(axes, share)


def _bytes_axis(axes: Axes, share: str) -> None:
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(f"bytes {'read per token' if share == 'touched' else 'kept in memory'}, of the dense model's")
    axes.set_xlim(left=0)


def _by_series(rows: list[Row]) -> Iterator[tuple[Series, list[Row]]]:
    """The rows of each family of methods, by rising bytes touched; quantisers in their larger groups only."""
    for key, series in _SERIES.items():
        points = [row for row in rows if _series_of(row.method.name) == key]
        if points:
            yield series, sorted(points, key=lambda row: row.touched)


def _series_of(name: str) -> str:
    quantiser, *repairs = name.split("+")
    kind, _, group = quantiser.partition("-g")
    if kind.startswith(("rtn", "gptq")):
        return "+".join([kind.rstrip("2348"), *repairs]) if group == "128" else ""
    return name
