"""What folding costs in perplexity: policy, refit, predictor bits and reduction on the sample model, side by side.

    python benchmarks/fold_table.py --text TEXT... --evaluation FILE [--model DIR]

Without options: the bundled model and texts. Every cell is a fold of its own, in bf16 with everything counted,
evaluated as stored; cells that the output file holds already are not computed again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tardis_llm import FoldConfig, fold, sample
from tardis_llm.allocator import keep_freed_memory
from tardis_llm.calibration.text import Windows, default_length, read_windows
from tardis_llm.evaluation.fix_rate import count_fixes, measured
from tardis_llm.evaluation.perplexity import Perplexity, token_perplexity, windows_of

EVALUATION = sample.evaluation_text()
RESULTS = Path(__file__).parent / "results" / "fold_table.json"

COLUMNS = ("policy", "refit", "bits", "reduction", "perplexity", "/ dense", "touched", "fix_rate", "by layer", "s")
#: (policy, refit, predictor bits or None for the budget's choice, reductions)
CELLS: tuple[tuple[str, bool, int | None, tuple[float, ...]], ...] = (
    ("error", True, None, (0.78, 0.75, 0.8, 0.7, 0.5)),
    ("coverage", False, 2, (0.78, 0.7, 0.5)),
    ("coverage", True, 2, (0.78, 0.7, 0.5)),
    ("error", False, None, (0.78, 0.7, 0.5)),
    ("coverage", False, 1, (0.8,)),
    ("coverage", True, 1, (0.8,)),
    ("error", False, 1, (0.8,)),
    ("error", True, 1, (0.78, 0.7, 0.5)),
    ("error", True, 2, (0.78, 0.7, 0.5)),
    ("error", True, 3, (0.7, 0.5)),
    ("error", True, 4, (0.7, 0.5)),
)


def settings() -> list[dict[str, Any]]:
    """The settings of every cell."""
    return [
        {"policy": policy, "refit": refit, "predictor_bits": bits, "reduction": reduction}
        for policy, refit, bits, reductions in CELLS
        for reduction in reductions
    ]


def load(model: str) -> PreTrainedModel:
    """The model in bf16."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()


def measure(
    model: PreTrainedModel, dense: Perplexity, calibration: Windows, evaluation: torch.Tensor, config: FoldConfig
) -> dict[str, Any]:
    """Fold once and evaluate."""
    start = time.perf_counter()
    report = fold(model, calibration, config)
    seconds = time.perf_counter() - start
    with count_fixes(model) as counts:
        perplexity = token_perplexity(model, evaluation)
    there = measured(report, model, counts.rates)
    ratio, error = perplexity.ratio(dense)
    return {
        "perplexity": perplexity.value,
        "ratio": ratio,
        "ratio_error": error,
        "touched": there.touched / there.dense,
        "resident": report.resident / report.dense,
        "fix_rate": there.fix_rate,
        "bits": [layer.bits for layer in report.layers],
        "layer_fix_rates": [layer.fix_rate for layer in there.layers],
        "seconds": seconds,
    }


def show(console: Console, results: dict[str, Any]) -> None:
    """The cells as a table."""
    table = Table(title=results["title"])
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for cell in results["cells"].values():
        setting = cell["setting"]
        table.add_row(
            setting["policy"],
            "yes" if setting["refit"] else "no",
            "auto" if setting["predictor_bits"] is None else str(setting["predictor_bits"]),
            f"{setting['reduction']:.2f}",
            f"{cell['perplexity']:.2f}",
            f"{cell['ratio']:.4f} ± {cell['ratio_error']:.4f}",
            f"{cell['touched']:.2%}",
            f"{cell['fix_rate']:.2%}",
            " ".join(f"{bits}b:{rate:.1%}" for bits, rate in zip(cell["bits"], cell["layer_fix_rates"], strict=True)),
            f"{cell['seconds']:.0f}",
        )
    console.print(table)


def main(
    model: str = str(sample.model_dir()),
    text: Annotated[list[Path] | None, typer.Option(help="calibration text; repeat for several files")] = None,
    evaluation: Path = EVALUATION,
    tokens: int = 65_536,
    output: Path = RESULTS,
    part: Annotated[str, typer.Option(help="k/n: only every n-th cell from the k-th, to share the work")] = "1/1",
    show_only: bool = False,
) -> None:
    """Measure the cells that are missing, then print the table."""
    keep_freed_memory()
    console = Console(width=160)
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"cells": {}}
    if show_only:
        show(console, results)
        return
    tokenizer = AutoTokenizer.from_pretrained(model)
    length = default_length(tokenizer, None)
    calibration = read_windows(text or [sample.calibration_text()], tokenizer, tokens, length, 0.125)
    windows = windows_of(evaluation.read_text(encoding="utf-8"), tokenizer, length)
    exact = token_perplexity(load(model).float(), windows)
    dense = token_perplexity(load(model), windows)
    results["title"] = (
        f"{Path(model).name} on {evaluation.name}: {windows.numel()} tokens, windows of {length}, token perplexity; "
        f"dense {dense.value:.2f} in bf16, {exact.value:.2f} in fp32; {calibration.fit.numel()} + "
        f"{calibration.heldout.numel()} calibration tokens; torch {torch.__version__}"
    )
    console.print(results["title"])
    first, every = (int(number) for number in part.split("/"))
    for setting in settings()[first - 1 :: every]:
        key = json.dumps(setting)
        if key in results["cells"]:
            continue
        cell = measure(load(model), dense, calibration, windows, FoldConfig(tokens=tokens, **setting))
        results["cells"][key] = {"setting": setting, **cell}
        found = f"ratio {cell['ratio']:.4f}, touched {cell['touched']:.2%}, {cell['seconds']:.0f} s"
        console.print(f"{setting}: {found}")
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(results, indent=1))
    show(console, results)


if __name__ == "__main__":
    typer.run(main)
