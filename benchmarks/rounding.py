"""How long the rounding of a matrix takes while folding, with its loop over columns compiled and in torch.

    python benchmarks/rounding.py [--threads 2] [--rounds 3] [--output FILE]

Matrices are random, and so are the second moments of their inputs; both ways take turns, and must give nearly the same
codes: a sum that is rounded once more may fall on the other side of a bound. The largest takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tardis_llm.evaluation.machine import cpu_name
from tardis_llm.files import write_json
from tardis_llm.folding import columns, rounding
from tardis_llm.runtime.linears.lowbit import GROUP_SIZE

BITS = 4
#: [out, in] of up- and down-projections, and of a fold
SHAPES = {
    "sample, up": (1024, 256),
    "Qwen2.5-0.5B, up": (4864, 896),
    "Qwen2.5-0.5B, down": (896, 4864),
    "Llama-3.2-1B, fold": (2048, 2048),
}


def operands(out: int, inputs: int) -> tuple[Tensor, Tensor]:
    """A weight [out, inputs], and second moments of inputs that are correlated and unlike in size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * inputs, inputs, generator=generator) * torch.linspace(0.2, 2, inputs)
    x = x + x.roll(1, 1)
    return torch.randn(out, inputs, generator=generator), x.T @ x / len(x)


def seconds(shape: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """Of each round, by who runs the loop; raises RuntimeError where codes differ much."""
    w, moments = operands(*shape)
    times: dict[str, list[float]] = {"kernels": [], "torch": []}
    codes = {}
    for _ in range(rounds + 1):
        for name, loop in (("kernels", columns.round_columns), ("torch", columns.by_torch)):
            with patch.object(rounding, "round_columns", loop):
                begin = time.perf_counter()
                codes[name] = rounding.quantise(w, BITS, GROUP_SIZE, moments).planes
                times[name].append(time.perf_counter() - begin)
    if (codes["kernels"] == codes["torch"]).float().mean() < 0.95:
        raise RuntimeError(f"the kernels round a matrix of {shape} otherwise than torch.")
    return {name: found[1:] for name, found in times.items()}  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {name: seconds(shape, options.rounds) for name, shape in SHAPES.items()}
    table = Table("matrix", r"\[out, in]", "kernels, s", "torch, s", "torch / kernels (of rounds)")
    for name, times in found.items():
        ratios = [slow / quick for slow, quick in zip(times["torch"], times["kernels"], strict=True)]
        middle = {by: f"{statistics.median(each):.3f}" for by, each in times.items()}
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, str(list(SHAPES[name])), middle["kernels"], middle["torch"], spread)
    Console(width=120).print(f"{cpu_name()}, {options.threads} threads, {BITS} bits, groups of {GROUP_SIZE}", table)
    if options.output:
        write_json(options.output, {"processor": cpu_name(), "threads": options.threads, "seconds": found})


if __name__ == "__main__":
    main()
