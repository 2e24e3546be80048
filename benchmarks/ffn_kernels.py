"""One folded FFN against the dense one, by the CPU kernels and by torch, measured in turns in one process.

    python benchmarks/ffn_kernels.py [--d 4544 --h 18176] [--bits 2] [--fix-rate 0.05] [--batch 1,4,8] [--output FILE]

Weights are random, and the ranges are set so that the wanted share of the neurons is fixed. Every round runs each
variant once, so that what else the machine does falls on all of them; ratios are taken within rounds. The order is
drawn anew in each, because a run pays for the code and data that the one before it pushed out of the caches. A
variant's weights are out of the caches before each of its runs where the weights of all variants are larger than these,
as in a whole model. All weights are in huge pages, and those that are read whole in panels, as `tardis generate` has
them; so are the dense model's. Our kernels, dense and folded, are called with arguments that are put together once, as
folded layers of models and engines call them, without torch's dispatch.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tardis_llm.allocator import contiguous_in_huge_pages
from tardis_llm.ffn.neuron import Neurons
from tardis_llm.ffn.packed import PackedMatrix, pack
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights, Matrix
from tardis_llm.runtime.backend import lay_out
from tardis_llm.runtime.cpu.backend import CpuFFN
from tardis_llm.runtime.cpu.library import Kernels, open_library
from tardis_llm.runtime.cpu.structures import Batch, Vector
from tardis_llm.runtime.cpu.structures import Matrix as CMatrix

_ACTIVATION = "gelu"
_GROUP = 256


@dataclass(frozen=True)
class Variant:
    """Something to time.

    Attributes:
        name: as printed.
        run: from x [tokens, d] to the FFN's output.
        read: bytes of weights that one call of x reads.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    read: Callable[[Tensor], int]


@dataclass(frozen=True)
class Shape:
    """What is measured.

    Attributes:
        d, h: width and neurons.
        bits: of the predictor.
        fix_rate: wanted share of fixed neurons.
    """

    d: int
    h: int
    bits: int
    fix_rate: float


def random_packed(rows: int, d: int, bits: int) -> PackedMatrix:
    """A low-bit matrix of random codes, whose products with normal inputs are of order one."""
    planes = contiguous_in_huge_pages(pack(torch.randint(2**bits, (rows, d), dtype=torch.uint8), bits))
    scale = torch.full((rows, -(-d // _GROUP)), 3.5 / 2**bits / d**0.5, dtype=torch.float16)
    return PackedMatrix(planes, scale, d, _GROUP)


def random_matrix(rows: int, d: int) -> Tensor:
    """bf16, rows of length one on average."""
    return contiguous_in_huge_pages(torch.empty(rows, d, dtype=torch.bfloat16).normal_().mul_(d**-0.5))


def predictions(x: Tensor, predictor: PackedMatrix) -> Tensor:
    """[tokens, h] by the kernels."""
    y: Tensor = torch.ops.tardis.linear(x, predictor.planes, None, predictor.scale, predictor.group_size)
    return y.float()


def folded_weights(shape: Shape, predictor: PackedMatrix, stacked: bool) -> FoldedWeights:
    """A random fold with ranges that a share `fix_rate` of the predictions of normal inputs leaves."""
    d, h = shape.d, shape.h
    x = torch.randn(16, d).bfloat16()
    top = predictions(x, predictor).flatten().sort().values[int(16 * h * (1 - shape.fix_rate))]
    low, high = torch.full((h,), -torch.inf), torch.full((h,), float(top))
    neurons = Neurons(_ACTIVATION, low, high, torch.full((h,), 0.5), torch.zeros(h)).map(Tensor.half)
    up, down = (random_packed(h, d, 4 - shape.bits), random_packed(h, d, 4)) if stacked else (None, None)
    fold = random_packed(d, d, 8) if stacked else random_matrix(d, d)
    return FoldedWeights(fold, torch.zeros(d).bfloat16(), predictor, neurons, down, up)


def prepared_linear(kernels: Kernels, lies: Matrix) -> Callable[[Tensor], Tensor]:
    """The product with a dense weight, as it lies, by the kernels."""
    matrix, bias = CMatrix.of(lies), Vector.of(None, 0)  # type: ignore[arg-type]  # Panels are the only layout here

    def run(x: Tensor) -> Tensor:
        y = x.new_empty(len(x), matrix.rows)
        if isinstance(lies, Tensor):
            kernels.linear(matrix, bias, Batch.of(x, y, 16))
        else:
            kernels.gemm(matrix, False, bias, Batch.of(x, y, 16))
        return y

    return run


def folded_variant(name: str, folded: FoldedWeights, dense: DenseFFN) -> Variant:
    """A folded FFN by the kernels."""
    weights = folded.beside(dense)
    assert isinstance(weights.fold, Tensor | PackedMatrix), "a random fold is not laid out"
    assert isinstance(weights.predictor, PackedMatrix), "a random predictor is not laid out"
    fold, predictor = (lay_out(part, torch.bfloat16) or part for part in (weights.fold, weights.predictor))
    run = CpuFFN(replace(weights, fold=fold, predictor=predictor))
    return Variant(name, run, lambda x: round(weights.touched(float(run.fixed(x).any(0).float().mean()))))


def variants(kernels: Kernels, shape: Shape) -> list[Variant]:
    """Dense and folded FFNs of a shape; the first is what the others are compared with."""
    dense = DenseFFN(random_matrix(shape.h, shape.d), None, random_matrix(shape.h, shape.d).T, None, _ACTIVATION)
    down, act = random_matrix(shape.d, shape.h), dense.act
    up_rows, down_rows = prepared_linear(kernels, dense.w1), prepared_linear(kernels, down)
    up_own, down_own = (
        prepared_linear(kernels, lay_out(weight, weight.dtype) or weight) for weight in (dense.w1, down)
    )
    size = dense.w1.nbytes + down.nbytes
    predictor = random_packed(shape.h, shape.d, shape.bits)
    return [
        Variant("dense, our bf16 kernel", lambda x: down_own(act(up_own(x))), lambda x: size),
        Variant("dense, our kernel row by row", lambda x: down_rows(act(up_rows(x))), lambda x: size),
        Variant("dense, F.linear", lambda x: F.linear(act(F.linear(x, dense.w1)), down), lambda x: size),
        folded_variant("folded, bf16", folded_weights(shape, predictor, False), dense),
        folded_variant("folded, int8 fold + int4 fallback", folded_weights(shape, predictor, True), dense),
    ]


def read_bandwidth(kernels: Kernels, repeats: int = 7) -> float:
    """Bytes per second at which torch's threads read 512 MiB; the best of some tries."""
    data = contiguous_in_huge_pages(torch.ones(2**26, dtype=torch.int64))
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        kernels.read(data)
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def measure(todo: list[Variant], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round that is not counted; none runs twice in succession."""
    times: dict[str, list[float]] = {variant.name: [] for variant in todo}
    draw, order = random.Random(0), list(todo)
    for number in range(rounds + 1):
        last = order[-1]
        draw.shuffle(order)
        if order[0] is last:
            order.append(order.pop(0))
        for variant in order:
            start = time.perf_counter()
            variant.run(x)
            if number:
                times[variant.name].append(time.perf_counter() - start)
    return times


def ratio(base: list[float], own: list[float]) -> list[float]:
    """Quartiles of how many times faster one variant is than another, from runs next to each other."""
    return statistics.quantiles([b / t for b, t in zip(base, own, strict=True)], n=4)


def summary(todo: list[Variant], times: dict[str, list[float]], x: Tensor, bandwidth: float) -> list[dict[str, Any]]:
    """One row per variant: median time, ratios to the first two with their quartiles, bytes and rate."""
    rows = []
    for variant in todo:
        own = times[variant.name]
        low, middle, high = ratio(times[todo[0].name], own)
        low_rows, middle_rows, high_rows = ratio(times[todo[1].name], own)
        seconds, size = statistics.median(own), variant.read(x)
        rows.append(
            {
                "variant": variant.name,
                "batch": len(x),
                "ms": 1e3 * seconds,
                "ratio": middle,
                "ratio_quartiles": [low, high],
                "ratio_to_rows": middle_rows,
                "ratio_to_rows_quartiles": [low_rows, high_rows],
                "bytes": size,
                "gb_per_s": size / seconds / 1e9,
                "of_bandwidth": size / seconds / bandwidth,
            }
        )
    return rows


def processor() -> str:
    """Its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    low, high = row["ratio_quartiles"]
    print(
        f"batch {row['batch']:2d}  {row['variant']:34s} {row['ms']:8.2f} ms  {row['ratio']:5.2f}x "
        f"[{low:.2f}-{high:.2f}]  {row['bytes'] / 1e6:7.1f} MB  {row['gb_per_s']:5.1f} GB/s = "
        f"{row['of_bandwidth']:4.0%} of the read bandwidth"
    )


def arguments() -> argparse.Namespace:
    """The command line; the default is an FFN of Falcon-7B."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=4544)
    parser.add_argument("--h", type=int, default=18176)
    parser.add_argument("--bits", type=int, default=2, help="of the predictor, below 4")
    parser.add_argument("--fix-rate", type=float, default=0.05)
    parser.add_argument("--batch", default="1")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    args = arguments()
    kernels = open_library()
    if kernels is None:
        raise SystemExit("the CPU kernels are not built; install a C++ compiler and reinstall tardis-llm.")
    torch.manual_seed(0)
    todo = variants(kernels, Shape(args.d, args.h, args.bits, args.fix_rate))
    machine = {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "isa": kernels.isa,
        "read_gb_per_s": read_bandwidth(kernels) / 1e9,
    }
    print(
        ", ".join(
            f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in machine.items()
        )
    )
    rows = []
    for batch in map(int, args.batch.split(",")):
        x = torch.randn(batch, args.d).bfloat16()
        times = measure(todo, x, args.rounds)
        for row in summary(todo, times, x, 1e9 * float(str(machine["read_gb_per_s"]))):
            rows.append(row)
            show(row)
    if args.output:
        args.output.write_text(
            json.dumps({"machine": machine, "settings": vars(args), "rows": rows}, indent=1, default=str)
        )


if __name__ == "__main__":
    main()
