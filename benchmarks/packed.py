"""Stacked folds, really packed, saved, loaded and run through the kernels, against the same rounding simulated.

    python benchmarks/packed.py MODEL --text FILE... --evaluation FILE [--output FILE]

Perplexity is measured three times on the same windows: of the dense model, of the checkpoint through the reference,
which writes its weights out and multiplies by torch, and of the checkpoint through the kernels.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer

from tardis_llm import FoldConfig, fold, save_folded
from tardis_llm.allocator import keep_freed_memory
from tardis_llm.calibration.limits import default_length
from tardis_llm.calibration.text import read_windows, some_windows
from tardis_llm.checkpoint.loading import load_dense, load_model
from tardis_llm.evaluation.machine import cpu_name
from tardis_llm.evaluation.perplexity import token_perplexity, windows_of
from tardis_llm.files import write_json
from tardis_llm.runtime.cpu.backend import CpuBackend
from tardis_llm.runtime.cpu.library import open_library
from tardis_llm.runtime.placing import folded_ffns, lay_out

RESULTS = Path(__file__).parent / "results" / "packed.json"
REDUCTIONS = (0.83, 0.875, 0.915)
_TOKENS, _HELDOUT = 65_536, 0.125


def stored_bytes(directory: Path) -> int:
    """Bytes of the FFNs' weights in memory, as loaded."""
    model = load_model(str(directory))
    ffns = folded_ffns(model)
    own = sum(tensor.nbytes for ffn in ffns.values() for tensor in ffn.state_dict().values())
    biases = sum(
        part.nbytes for name, part in model.named_parameters() if ".mlp.c_fc." in name or ".mlp.c_proj." in name
    )
    return own + biases


def measure(model: str, windows: Any, evaluation: Tensor, reduction: float) -> dict[str, Any]:
    """One fold: its perplexities through reference and kernels, seconds, and what it reads and holds."""
    folded = load_dense(model, "bfloat16")
    report = fold(folded, windows, FoldConfig(reduction=reduction, fold_bits=4, fallback_bits=4, tokens=_TOKENS))
    with tempfile.TemporaryDirectory() as scratch:
        save_folded(folded, report, Path(scratch))
        loaded, resident = load_model(scratch), stored_bytes(Path(scratch))
    found: dict[str, Any] = {"touched": report.touched / report.dense, "resident": resident / report.dense}
    perplexities = {}
    reference = patch.object(CpuBackend, "accepts", lambda self, x: False)
    for name, within in (("reference", reference), ("kernels", nullcontext())):
        if name == "kernels":
            lay_out(loaded)  # as for decoding
        start = time.perf_counter()
        with within:
            perplexities[name] = token_perplexity(loaded, evaluation)
        found[name] = perplexities[name].value
        found[f"{name}_seconds"] = time.perf_counter() - start
    found["ratio"], found["ratio_error"] = perplexities["kernels"].ratio(perplexities["reference"])
    return found


def main(
    model: Annotated[str, typer.Argument(help="directory of a dense model")],
    text: Annotated[list[Path], typer.Option(help="calibration text; repeat for several files")],
    evaluation: Annotated[Path, typer.Option(help="text to judge on")],
    eval_tokens: int = 131_072,
    output: Path = RESULTS,
) -> None:
    """Measure the folds and write what was found."""
    keep_freed_memory()
    console, library = Console(), open_library()
    if library is None:
        raise SystemExit("the CPU kernels are not built; install a C++ compiler and reinstall tardis-llm.")
    tokenizer = AutoTokenizer.from_pretrained(model)
    length = default_length(tokenizer, None)
    windows = some_windows(windows_of(evaluation.read_text(encoding="utf-8"), tokenizer, length), eval_tokens)
    dense = token_perplexity(load_dense(model, "bfloat16"), windows)
    calibration = read_windows(text, tokenizer, _TOKENS, length, _HELDOUT)
    results: dict[str, Any] = {
        "title": f"{Path(model).name} in bfloat16, {evaluation.stem}, {windows.numel():,} tokens",
        "window": length,
        "dense": dense.value,
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "isa": library.isa},
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
        "folds": {},
    }
    console.print(f"{results['title']}: dense {dense.value:.2f}")
    for reduction in REDUCTIONS:
        found = measure(model, calibration, windows, reduction)
        results["folds"][str(reduction)] = found
        console.print(
            f"reduction {reduction}: touched {found['touched']:.2%}, resident {found['resident']:.2%}, reference "
            f"{found['reference']:.3f}, kernels {found['kernels']:.3f}, ratio {found['ratio']:.5f}"
        )
        write_json(output, results)


if __name__ == "__main__":
    typer.run(main)
