"""What each choice in folding is worth: one setting changed at a time, on one model, with the same evaluation text.

    python benchmarks/ablation.py MODEL --wikipedia FILE... --novels FILE... --evaluation FILE --lambada FILE

Every cell is a fold of its own with everything counted. Cells that the output file holds are not computed again, so an
interrupted run goes on where it stopped; `--part 1/2` and `--part 2/2` share the work between two processes.
`benchmarks/results.py` makes the page of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from tardis_llm import FoldConfig, fold
from tardis_llm.allocator import keep_freed_memory
from tardis_llm.calibration.inputs import token_count
from tardis_llm.calibration.limits import default_length
from tardis_llm.calibration.text import Windows, read_windows, some_windows
from tardis_llm.checkpoint.loading import load_dense
from tardis_llm.evaluation.fix_rate import count_fixes, measured
from tardis_llm.evaluation.perplexity import Perplexity, token_perplexity, windows_of
from tardis_llm.files import write_json

RESULTS = Path(__file__).parent / "results" / "ablation.json"
BF16 = {"reduction": 0.78}
INT4 = {"reduction": 0.875, "fold_bits": 4, "fallback_bits": 4}
_HELDOUT = 0.125


@dataclass(frozen=True)
class Cell:
    """One fold.

    Attributes:
        group: what is varied; cells of a group stand in one table.
        name: of the variation.
        settings: of `FoldConfig`.
        tokens: calibration tokens.
        text: "wikipedia", "novels" or "both".
    """

    group: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: int = 65_536
    text: str = "both"

    @property
    def key(self) -> str:
        """The same for cells that are the same fold."""
        defaults = FoldConfig().as_dict()
        changed = {name: value for name, value in self.settings.items() if value != defaults[name]}
        return json.dumps({**changed, "tokens": self.tokens, "text": self.text}, sort_keys=True)


def cells() -> Iterator[Cell]:
    """Every cell, group by group, the most telling first."""
    for kind, base in (("bf16, reduction 0.78", BF16), ("int4, reduction 0.875", INT4)):
        for policy in ("error", "coverage"):
            for refit in (True, False):
                name = f"{policy} ranges, {'refit' if refit else 'no refit'}"
                yield Cell(f"Ranges and refit, {kind}", name, {**base, "policy": policy, "refit": refit})
    for tokens in (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144):
        yield Cell("Calibration tokens, bf16, reduction 0.78", f"{tokens:,}", BF16, tokens)
    for reduction in (0.78, 0.7):
        for bits in (None, 1, 2) if reduction == 0.78 else (None, 1, 2, 3, 4):
            name = "chosen for each layer" if bits is None else f"{bits} bits"
            settings = {"reduction": reduction, "predictor_bits": bits}
            yield Cell(f"Predictor, bf16, reduction {reduction}", name, settings)
    for kind, base in (("bf16, reduction 0.78", BF16), ("int4, reduction 0.875", INT4)):
        for sequential in (True, False):
            name = "behind folded layers" if sequential else "one-shot, behind dense layers"
            yield Cell(f"Calibration of a layer, {kind}", name, {**base, "sequential": sequential})
    for damping in (None, 0.0, 1e-4, 1e-2, 1e-1, 1.0, 10.0):
        name = "chosen on held-out text" if damping is None else f"{damping:g}"
        yield Cell("Damping of the refit, bf16, reduction 0.78", name, {**BF16, "damping": damping})
    for tokens in (8192,):
        for damping in (None, 0.0, 1e-4, 1e-2, 1.0):
            name = "chosen on held-out text" if damping is None else f"{damping:g}"
            group = f"Damping with {tokens:,} tokens, bf16, reduction 0.78"
            yield Cell(group, name, {**BF16, "damping": damping}, tokens)
    for kind, base in (("bf16, reduction 0.78", BF16), ("int4, reduction 0.875", INT4)):
        for group_size in (64, 128, 256):
            yield Cell(f"Weights per scale, {kind}", str(group_size), {**base, "group_size": group_size})
        for rounding in ("gptq", "nearest"):
            yield Cell(f"Rounding, {kind}", rounding, {**base, "rounding": rounding})
    for text in ("wikipedia", "novels", "both"):
        yield Cell("Calibration text, bf16, reduction 0.78", text, BF16, text=text)


@dataclass(frozen=True)
class Bench:
    """What the cells share.

    Attributes:
        model: its directory.
        texts: calibration files by name.
        evaluations: windows [n, length] by name; the first is the one that counts.
        dense: perplexities of the dense model on them.
    """

    model: str
    texts: dict[str, list[Path]]
    evaluations: dict[str, Tensor]
    dense: dict[str, Perplexity]

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Fold once and evaluate."""
        model = load_dense(self.model, "bfloat16")
        windows = self.windows(cell)
        start = time.perf_counter()
        report = fold(model, windows, FoldConfig(tokens=cell.tokens, **cell.settings))
        seconds = time.perf_counter() - start
        found: dict[str, Any] = {"ratio": {}, "ratio_error": {}}
        for number, (name, evaluation) in enumerate(self.evaluations.items()):
            with count_fixes(model) as counts:
                perplexity = token_perplexity(model, evaluation)
            found["ratio"][name], found["ratio_error"][name] = perplexity.ratio(self.dense[name])
            if not number:
                there = measured(report, model, counts.rates)
        return {
            **found,
            "touched": there.touched / there.dense,
            "resident": report.resident / report.dense,
            "fix_rate": there.fix_rate,
            "bits": [layer.bits for layer in report.layers],
            "layer_fix_rates": [layer.fix_rate for layer in there.layers],
            "dampings": [layer.damping for layer in report.layers],
            "tokens": token_count(windows.fit),
            "seconds": seconds,
        }

    def windows(self, cell: Cell) -> Windows:
        """The cell's calibration windows."""
        files = [file for name, some in self.texts.items() if cell.text in (name, "both") for file in some]
        length = next(iter(self.evaluations.values())).shape[1]
        return read_windows(files, _tokenizer(self.model), cell.tokens, length, _HELDOUT)


@lru_cache
def _tokenizer(model: str) -> Any:
    return AutoTokenizer.from_pretrained(model)


def stories(path: Path) -> str:
    """The passages of LAMBADA, one after the other."""
    return "\n\n".join(json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())


def title(bench: Bench) -> str:
    """What was measured on what."""
    parts = [
        f"{name}: {windows.numel():,} tokens in windows of {windows.shape[1]}, dense token perplexity "
        f"{bench.dense[name].value:.2f}"
        for name, windows in bench.evaluations.items()
    ]
    return f"{Path(bench.model).name} in bfloat16; {'; '.join(parts)}"


def main(
    model: Annotated[str, typer.Argument(help="directory of a dense model")],
    wikipedia: Annotated[list[Path], typer.Option(help="calibration text; repeat for several files")],
    novels: Annotated[list[Path], typer.Option(help="calibration text of another kind; repeat for several files")],
    evaluation: Annotated[Path, typer.Option(help="text to judge on")],
    lambada: Annotated[Path, typer.Option(help="LAMBADA's JSON lines: passages of novels, to judge on too")],
    eval_tokens: int = 81_920,
    output: Path = RESULTS,
    part: Annotated[str, typer.Option(help="k/n: only every n-th cell from the k-th")] = "1/1",
) -> None:
    """Measure the cells that are missing."""
    keep_freed_memory()
    console = Console()
    tokenizer = _tokenizer(model)
    length = default_length(tokenizer, None)
    texts = {evaluation.stem: evaluation.read_text(encoding="utf-8"), lambada.stem: stories(lambada)}
    evaluations = {name: some_windows(windows_of(text, tokenizer, length), eval_tokens) for name, text in texts.items()}
    dense_model: PreTrainedModel = load_dense(model, "bfloat16")
    dense = {name: token_perplexity(dense_model, windows) for name, windows in evaluations.items()}
    bench = Bench(model, {"wikipedia": wikipedia, "novels": novels}, evaluations, dense)
    results = json.loads(output.read_text()) if output.exists() else {"cells": {}}
    software = {"torch": torch.__version__, "transformers": transformers.__version__}
    results |= {"title": title(bench), "evaluations": list(evaluations), "software": software}
    console.print(results["title"])
    first, every = (int(number) for number in part.split("/"))
    for cell in list({cell.key: cell for cell in cells()}.values())[first - 1 :: every]:
        if cell.key in results["cells"]:
            continue
        found = bench.measure(cell)
        results["cells"][cell.key] = found
        figures = ", ".join(f"{name} {ratio:.4f}" for name, ratio in found["ratio"].items())
        console.print(f"{cell.group}: {cell.name}: {figures}, {found['touched']:.2%}, {found['seconds']:.0f} s")
        output.parent.mkdir(exist_ok=True)
        write_json(output, results)


if __name__ == "__main__":
    typer.run(main)
