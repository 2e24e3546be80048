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

COLUMNS = (
    "policy", "refit", "bits", "reduction", "perplexity", "/ dense", "touched", "resident", "fix_rate", "by layer",
)  # fmt: skip
PAGE = """# Results

No figure here is typed by hand; this page comes from

    python benchmarks/fold_table.py --model MODEL --text FILE [--text FILE ...] --evaluation FILE
    python benchmarks/fold_table.py --show-only benchmarks/results/fold_table.json --markdown docs/results.md

{title}

Every row is a fold of its own: bf16 weights, one byte budget for the model, everything counted. Perplexity and its
ratio to dense (standard error paired by window), bytes touched and fix rate are measured on the evaluation text.
`coverage` without refit is nearest to the published method; `bits` "auto" lets the budget choose 1 to 4 for each layer;
"by layer" gives predictor bits and fix rate."""
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


def together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of several parts of the same table as one."""
    cells: dict[str, Any] = {}
    for part in parts:
        cells |= part["cells"]
    return {"title": parts[0]["title"], "cells": cells}


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The cells as text, in the order of `settings`, whichever were measured."""
    cells = (results["cells"].get(json.dumps(setting)) for setting in settings())
    return [row(cell) for cell in cells if cell]


def row(cell: dict[str, Any]) -> list[str]:
    """One cell as text, in the order of `COLUMNS`."""
    setting = cell["setting"]
    layers = zip(cell["bits"], cell["layer_fix_rates"], strict=True)
    return [
        setting["policy"],
        "yes" if setting["refit"] else "no",
        "auto" if setting["predictor_bits"] is None else str(setting["predictor_bits"]),
        f"{setting['reduction']:.2f}",
        f"{cell['perplexity']:.2f}",
        f"{cell['ratio']:.4f} ± {cell['ratio_error']:.4f}",
        f"{cell['touched']:.2%}",
        f"{cell['resident']:.1%}",
        f"{cell['fix_rate']:.2%}",
        " ".join(f"{bits}b:{rate:.1%}" for bits, rate in layers),
    ]


def show(console: Console, results: dict[str, Any]) -> None:
    """The cells as a table."""
    table = Table(*COLUMNS, title=results["title"])
    for line in rows(results):
        table.add_row(*line)
    console.print(table)


def as_markdown(results: dict[str, Any]) -> str:
    """The cells as a page of the documentation."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows(results)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{PAGE.format(title=results['title'])}\n\n{table}\n"


def main(
    model: str = str(sample.model_dir()),
    text: Annotated[list[Path] | None, typer.Option(help="calibration text; repeat for several files")] = None,
    evaluation: Path = EVALUATION,
    tokens: int = 65_536,
    output: Path = RESULTS,
    part: Annotated[str, typer.Option(help="k/n: only every n-th cell from the k-th, to share the work")] = "1/1",
    show_only: Annotated[list[Path] | None, typer.Option(help="only show these result files together")] = None,
    markdown: Annotated[Path | None, typer.Option(help="with --show-only: page to write")] = None,
) -> None:
    """Measure the cells that are missing, then print the table."""
    keep_freed_memory()
    console = Console(width=160)
    if show_only:
        results = together([json.loads(path.read_text()) for path in show_only])
        show(console, results)
        if markdown:
            markdown.write_text(as_markdown(results), encoding="utf-8")
        return
    results = json.loads(output.read_text()) if output.exists() else {"cells": {}}
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
