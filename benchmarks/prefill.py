"""What prompts through the dense FFNs are worth: loss behind a prompt, and time of the prompt, exact and folded.

    python benchmarks/prefill.py MODEL --text FILE... --evaluation FILE [--output FILE]

The first half of each window is the prompt. The second half is always folded, as decoding is, and judged: behind a
dense prompt it attends to keys and values without the folds' errors.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from tardis_llm import FoldConfig, fold
from tardis_llm.allocator import keep_freed_memory
from tardis_llm.calibration.limits import default_length
from tardis_llm.calibration.text import read_windows, some_windows
from tardis_llm.checkpoint.loading import load_dense
from tardis_llm.evaluation.machine import cpu_name
from tardis_llm.evaluation.perplexity import windows_of
from tardis_llm.files import write_json
from tardis_llm.runtime.decoding import prepare_decoding
from tardis_llm.runtime.placing import folded_ffns

RESULTS = Path(__file__).parent / "results" / "prefill.json"
_REDUCTIONS, _TOKENS, _HELDOUT, _BATCH = (0.75, 0.78, 0.8), 65_536, 0.125, 1


def set_exact(model: PreTrainedModel, exact: bool) -> None:
    """Send what comes next through the dense FFNs, or through the folds."""
    for ffn in folded_ffns(model).values():
        ffn.exact = exact


@torch.inference_mode()
def losses(model: PreTrainedModel, windows: Tensor, prompt: bool, rest: bool) -> tuple[Tensor, float]:
    """Mean loss of each window's second half [windows], and the seconds that the prompts took.

    Args:
        model: folded.
        windows: token ids [windows, length].
        prompt, rest: whether the first and the second half are exact.
    """
    found, seconds, half = [], 0.0, windows.shape[1] // 2
    for some in windows.split(_BATCH):
        set_exact(model, prompt)
        start = time.perf_counter()
        first = model(some[:, :half], use_cache=True)
        seconds += time.perf_counter() - start
        set_exact(model, rest)
        second = model(some[:, half:], past_key_values=first.past_key_values).logits
        logits = torch.cat([first.logits[:, -1:], second[:, :-1]], 1).float()
        loss = F.cross_entropy(logits.transpose(1, 2), some[:, half:], reduction="none")
        found.append(loss.double().mean(1))
    set_exact(model, False)
    return torch.cat(found), seconds


def compared(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Ratio of perplexities with its standard error, paired by window."""
    difference = ours - theirs
    ratio = float(difference.mean().exp())
    return {"ratio": ratio, "error": ratio * float(difference.std()) / len(difference) ** 0.5}


def main(
    model: Annotated[str, typer.Argument(help="directory of a dense model")],
    text: Annotated[list[Path], typer.Option(help="calibration text; repeat for several files")],
    evaluation: Annotated[Path, typer.Option(help="text to judge on")],
    eval_tokens: int = 131_072,
    output: Path = RESULTS,
) -> None:
    """Measure both kinds of prompts, and write what was found."""
    keep_freed_memory()
    tokenizer, console = AutoTokenizer.from_pretrained(model), Console()
    length = default_length(tokenizer, None)
    windows = some_windows(windows_of(evaluation.read_text(encoding="utf-8"), tokenizer, length), eval_tokens)
    calibration = read_windows(text, tokenizer, _TOKENS, length, _HELDOUT)
    results: dict[str, Any] = {
        "title": f"{Path(model).name} in bfloat16, {evaluation.stem}, {windows.numel():,} tokens",
        "window": length,
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        "folds": {},
    }
    for reduction in _REDUCTIONS:
        folded = load_dense(model, "bfloat16")
        fold(folded, calibration, FoldConfig(reduction=reduction, tokens=_TOKENS))
        prepare_decoding(folded)
        (dense, _), (exact, exact_seconds), (whole, folded_seconds) = (
            losses(folded, windows, prompt, rest) for prompt, rest in ((True, True), (True, False), (False, False))
        )
        found = {
            "dense": float(dense.mean().exp()),
            "exact": compared(exact, dense) | {"seconds": exact_seconds},
            "folded": compared(whole, dense) | {"seconds": folded_seconds},
        }
        results["folds"][str(reduction)] = found
        console.print(reduction, found)
        write_json(output, results)


if __name__ == "__main__":
    typer.run(main)
