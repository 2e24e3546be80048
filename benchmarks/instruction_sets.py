"""One FFN in few bits by each instruction set that processor and build have, measured in turns in one process.

    python benchmarks/instruction_sets.py [--shape falcon-7b] [--batch 1,8] [--rounds 40] [--output FILE]

The dense FFN is in int4. Folds are in int4 with a 2-bit predictor; shares of their neurons are fixed. All sets get the
same weights, in panels where they are read whole; how turns are taken is said in `ffn_kernels.py`. `portable`, which
has no panels and takes a hundred times as long, is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffn_kernels import (
    SHAPES,
    Shape,
    Variant,
    few_bits_variant,
    folded_variant,
    folded_weights,
    measure,
    random_matrix,
    random_packed,
    ratio,
)
from tardis_llm.evaluation.machine import cpu_name
from tardis_llm.ffn.weights import DenseFFN
from tardis_llm.runtime.cpu.library import Kernels, loaded

_GROUP = 128  # of the dense FFN


def variants(kernels: Kernels, shape: Shape, fix_rates: list[float]) -> list[Variant]:
    """The dense FFN and folds that fix these shares, in few bits."""
    predictor = random_packed(shape.k * shape.h, shape.d, shape.bits)
    unread = DenseFFN(random_matrix(1, shape.d), None, random_matrix(1, shape.d).T, None, shape.activation)
    folds = []
    for rate in fix_rates:
        weights = folded_weights(replace(shape, fix_rate=rate), predictor, 4, 3 if shape.gated else None)
        folds.append(folded_variant(f"folded, int4, {rate:.0%} fixed", weights, unread))
    return [few_bits_variant(kernels, shape, _GROUP), *folds]


def on(kernels: Kernels, isa: str, variant: Variant) -> Variant:
    """A variant on one instruction set."""

    def run(x: Tensor) -> Tensor:
        kernels.use(isa)
        return variant.run(x)

    return Variant(f"{variant.name} ({isa})", run, variant.read)


def rows(kernels: Kernels, isas: list[str], todo: list[Variant], inputs: list[Tensor]) -> list[dict[str, Any]]:
    """For each variant and set: median time, bytes read, and how many times faster than the first set."""
    times = measure([on(kernels, isa, variant) for variant in todo for isa in isas], inputs)
    found = []
    for variant in todo:
        first, size = times[f"{variant.name} ({isas[0]})"], variant.read(inputs[0])
        for isa in isas:
            own = times[f"{variant.name} ({isa})"]
            low, middle, high = ratio(first, own)
            seconds = statistics.median(own)
            figures = {"ms": 1e3 * seconds, "ratio": middle, "ratio_quartiles": [low, high]}
            read = {"bytes": size, "gb_per_s": size / seconds / 1e9}
            found.append({"batch": len(inputs[0]), "variant": variant.name, "isa": isa, **figures, **read})
    return found


def show(row: dict[str, Any], first: str) -> None:
    """Print a row."""
    low, high = row["ratio_quartiles"]
    print(
        f"batch {row['batch']:2d}  {row['variant']:28s} {row['isa']:11s} {row['ms']:7.2f} ms  {row['gb_per_s']:5.1f} "
        f"GB/s  {row['ratio']:.2f}x [{low:.2f}-{high:.2f}] of {first}"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="falcon-7b")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--fix-rates", default="0.05,0.2")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    args, kernels = arguments(), loaded()
    isas = [isa for isa in kernels.isas if isa != "portable"]
    if not isas:
        raise SystemExit("this processor has none of the instruction sets that the kernels are written for.")
    torch.manual_seed(0)
    shape = Shape(*SHAPES[args.shape], 2, 0.0)
    todo = variants(kernels, shape, [float(rate) for rate in args.fix_rates.split(",")])
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "isas": isas}
    print(f"{machine['cpu']}, {machine['threads']} threads")
    found = []
    for batch in map(int, args.batch.split(",")):
        inputs = [torch.randn(batch, shape.d).bfloat16() for _ in range(args.rounds + 1)]
        found += rows(kernels, isas, todo, inputs)
    for row in found:
        show(row, isas[0])
    if args.output:
        record = {"machine": machine, "settings": vars(args), "rows": found}
        args.output.write_text(json.dumps(record, indent=1, default=str))


if __name__ == "__main__":
    main()
