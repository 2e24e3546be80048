"""What each choice is worth: the output of `benchmarks/ablation.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

import ablation
from sections.markdown import table
from tardis_llm.evaluation.plots import STYLE


def ablation_tables(results: dict[str, Any]) -> Iterator[str]:
    """One table per group."""
    groups: dict[str, list[ablation.Cell]] = {}
    for cell in ablation.cells():
        groups.setdefault(cell.group, []).append(cell)
    names = results["evaluations"]
    head = ["", *(f"/ dense on {name}" for name in names), "touched", "resident", "fixed", "predictor bits", "seconds"]
    for group, cells in groups.items():
        lines = []
        for cell in cells:
            found = results["cells"].get(cell.key)
            if found is None:
                continue
            ratios = (f"{found['ratio'][name]:.4f} ± {found['ratio_error'][name]:.4f}" for name in names)
            sizes = f"{found['touched']:.2%}", f"{found['resident']:.1%}", f"{found['fix_rate']:.2%}"
            bits = " ".join(map(str, found["bits"]))
            lines.append([cell.name, *ratios, *sizes, bits, f"{found['seconds']:.0f}"])
        if lines:
            yield f"### {group}\n\n{table(head, lines)}"


def plot_calibration(results: dict[str, Any], path: Path) -> None:
    """What more calibration text is worth."""
    cells = [cell for cell in ablation.cells() if cell.group.startswith("Calibration tokens")]
    found = [(cell.tokens, results["cells"][cell.key]) for cell in cells if cell.key in results["cells"]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, colour in zip(results["evaluations"], ("#0072B2", "#D55E00"), strict=True):
            y, errors = [f["ratio"][name] for _, f in found], [f["ratio_error"][name] for _, f in found]
            axes.errorbar([t for t, _ in found], y, yerr=errors, label=name, color=colour, marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks([t for t, _ in found])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:.0f}k"))
        axes.set_xlabel("calibration tokens")
        axes.set_ylabel("perplexity / dense")
        axes.set_title("bf16, reduction 0.78")
        axes.legend()
        figure.savefig(path, dpi=110)
