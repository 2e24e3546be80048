"""One folded FFN against the dense one, by the CPU kernels and by torch, measured in turns in one process.

    python benchmarks/ffn_kernels.py [--shape falcon-7b] [--bits 2] [--fix-rate 0.05] [--batch 1,4,8] [--output FILE]
    python benchmarks/ffn_kernels.py --shape llama-3-8b --fix-rate 0.2

Weights are random, and the ranges are set so that the wanted share of the neurons is fixed, others by each input. Every
round has an input of its own, and runs each variant once, so that what else the machine does falls on all of them;
ratios are taken within rounds. The order is drawn anew in each, because a run pays for the code and data that the one
before it pushed out of the caches. A variant's weights are out of the caches before each of its runs where the weights
of all variants are larger than these, as in a whole model. All weights are in huge pages, and those that are read whole
in panels, as `tardis generate` has them; so are the dense model's. Our kernels, dense and folded, are called with
arguments that are put together once, as folded layers of models and engines call them, without torch's dispatch.
"""

from __future__ import annotations

import argparse
import functools
import json
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
from tardis_llm.evaluation.machine import cpu_name
from tardis_llm.ffn.activations import activation
from tardis_llm.ffn.neuron import Neurons, value
from tardis_llm.ffn.packed import PackedMatrix
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights, Matrix
from tardis_llm.runtime.backend import lay_out
from tardis_llm.runtime.cpu.backend import CpuFFN
from tardis_llm.runtime.cpu.library import Kernels, open_library
from tardis_llm.runtime.cpu.operators import ACTIVATION_BITS
from tardis_llm.runtime.cpu.structures import Batch, Vector
from tardis_llm.runtime.cpu.structures import Matrix as CMatrix

#: d, h and whether the FFN is gated
SHAPES = {
    "falcon-7b": (4544, 18176, False),
    "llama-3-8b": (4096, 14336, True),
    "qwen2.5-1.5b": (1536, 8960, True),
}
#: makes the product with a weight, from x [tokens, in] to [tokens, out]
Product = Callable[[Matrix], Callable[[Tensor], Tensor]]
_GROUP = 256  # of our formats, unless told otherwise
_DENSE_GROUPS = (128, _GROUP)  # of the dense FFN in int4


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
        gated: whether neurons have two up-projections.
        bits: of the predictor.
        fix_rate: wanted share of fixed neurons.
    """

    d: int
    h: int
    gated: bool
    bits: int
    fix_rate: float

    @property
    def k(self) -> int:
        """Up-projections per neuron."""
        return 2 if self.gated else 1

    @property
    def activation(self) -> str:
        """The name of the usual one."""
        return "silu" if self.gated else "gelu"


def random_packed(rows: int, d: int, bits: int, group_size: int = _GROUP) -> PackedMatrix:
    """A low-bit matrix of random codes, whose products with normal inputs are of order one."""
    planes = contiguous_in_huge_pages(torch.randint(256, (rows, bits, -(-d // 8)), dtype=torch.uint8))
    scale = torch.full((rows, -(-d // group_size)), 3.5 / 2**bits / d**0.5, dtype=torch.float16)
    return PackedMatrix(planes, scale, d, group_size)


def random_matrix(rows: int, d: int) -> Tensor:
    """bf16, rows of length one on average."""
    return contiguous_in_huge_pages(torch.empty(rows, d, dtype=torch.bfloat16).normal_().mul_(d**-0.5))


def predictions(x: Tensor, predictor: PackedMatrix) -> Tensor:
    """[tokens, k h] by the kernels."""
    y: Tensor = torch.ops.tardis.linear(x, predictor.planes, None, predictor.scale, predictor.group_size)
    return y.float()


def random_neurons(shape: Shape, predictor: PackedMatrix) -> Neurons:
    """Lines, and ranges that a share `fix_rate` of the predictions of normal inputs leaves.

    Those of a plain neuron are bounded above; those of a gated one by the size of the residual.
    """
    h, v = shape.h, predictions(torch.randn(16, shape.d).bfloat16(), predictor)
    nothing = torch.full((h,), torch.inf)
    slope = 0.1 * torch.randn(2 * h) if shape.gated else torch.full((h,), 0.5)
    neurons = Neurons(shape.activation, -nothing, nothing, slope, torch.zeros(h))
    tested = neurons.residual(v).abs() if shape.gated else v
    top = float(tested.flatten().sort().values[int(tested.numel() * (1 - shape.fix_rate))])
    high = torch.full((h,), top)
    return replace(neurons, low=-high if shape.gated else -nothing, high=high).map(Tensor.half)


def folded_weights(
    shape: Shape, predictor: PackedMatrix, fold_bits: int | None = None, remainder_bits: int | None = None
) -> FoldedWeights:
    """A random fold, in few bits with the fallback in int4, or all in bf16."""
    d, rows = shape.d, shape.k * shape.h
    neurons, bias = random_neurons(shape, predictor), torch.zeros(d).bfloat16()
    if fold_bits is None:
        return FoldedWeights(random_matrix(d, d), bias, predictor, neurons)
    up = random_packed(rows, d, 4 - shape.bits if remainder_bits is None else remainder_bits)
    return FoldedWeights(random_packed(d, d, fold_bits), bias, predictor, neurons, random_packed(shape.h, d, 4), up)


def prepared_linear(kernels: Kernels, lies: Matrix) -> Callable[[Tensor], Tensor]:
    """The product with a weight, as it lies, by the kernels."""
    matrix, bias = CMatrix.of(lies), Vector.of(None, 0)  # type: ignore[arg-type]  # Panels are the only layout here

    def run(x: Tensor) -> Tensor:
        y = x.new_empty(len(x), matrix.rows)
        if isinstance(lies, Tensor | PackedMatrix) or getattr(lies, "scale", None) is not None:
            kernels.linear(matrix, bias, Batch.of(x, y, ACTIVATION_BITS))
        else:
            kernels.gemm(matrix, False, bias, Batch.of(x, y, ACTIVATION_BITS))
        return y

    return run


def folded_variant(name: str, folded: FoldedWeights, dense: DenseFFN) -> Variant:
    """A folded FFN by the kernels, its matrices laid out as for decoding."""
    weights = folded.beside(dense)
    assert isinstance(weights.fold, Tensor | PackedMatrix), "a random fold is not laid out"
    assert isinstance(weights.predictor, PackedMatrix), "a random predictor is not laid out"
    fold, predictor = (lay_out(part, torch.bfloat16) or part for part in (weights.fold, weights.predictor))
    rows = lay_out(weights.down, torch.bfloat16, by_rows=True) if isinstance(weights.down, PackedMatrix) else None
    run = CpuFFN(replace(weights, fold=fold, predictor=predictor, down=rows or weights.down))
    return Variant(name, run, lambda x: round(weights.touched(float(run.fixed(x).any(0).float().mean()))))


def dense_variant(name: str, shape: Shape, up: Matrix, down: Matrix, product: Product) -> Variant:
    """The dense FFN from its up- and down-projections [k h, d] and [d, h]; `product` prepares one with a weight."""
    act, k, product_up, product_down = activation(shape.activation), shape.k, product(up), product(down)
    size = up.nbytes + down.nbytes
    return Variant(name, lambda x: product_down(value(product_up(x), act, k)), lambda x: size)


def torch_linear(weight: Matrix) -> Callable[[Tensor], Tensor]:
    """The product with a dense weight by torch."""
    assert isinstance(weight, Tensor), "torch multiplies dense weights only"
    return lambda x: F.linear(x, weight)


def few_bits_variant(kernels: Kernels, shape: Shape, group_size: int) -> Variant:
    """The dense FFN in int4 by the kernels, in panels where they can be."""
    up, down = (
        random_packed(rows, columns, 4, group_size)
        for rows, columns in ((shape.k * shape.h, shape.d), (shape.d, shape.h))
    )
    up_own, down_own = (lay_out(part, torch.bfloat16) or part for part in (up, down))
    name, product = f"dense, int4 in groups of {group_size}", functools.partial(prepared_linear, kernels)
    return dense_variant(name, shape, up_own, down_own, product)


def variants(kernels: Kernels, shape: Shape) -> list[Variant]:
    """Dense and folded FFNs of a shape; the others are compared with the first two, and with the dense ones in int4."""
    w1, down = random_matrix(shape.k * shape.h, shape.d), random_matrix(shape.d, shape.h)
    dense = DenseFFN(w1, None, random_matrix(shape.h, shape.d).T, None, shape.activation)
    predictor = random_packed(shape.k * shape.h, shape.d, shape.bits)
    own_up, own_down = (lay_out(weight, weight.dtype) or weight for weight in (w1, down))
    ours = functools.partial(prepared_linear, kernels)
    found = [
        dense_variant("dense, our bf16 kernel", shape, own_up, own_down, ours),
        dense_variant("dense, our kernel row by row", shape, w1, down, ours),
        dense_variant("dense, F.linear", shape, w1, down, torch_linear),
        *(few_bits_variant(kernels, shape, size) for size in _DENSE_GROUPS),
        folded_variant("folded, bf16", folded_weights(shape, predictor), dense),
        folded_variant("folded, int8 fold + int4 fallback", folded_weights(shape, predictor, 8), dense),
        folded_variant("folded, int4 fold + int4 fallback", folded_weights(shape, predictor, 4), dense),
    ]
    if shape.gated:
        found.append(folded_variant("folded, int4 fold + 2 + 3 bits", folded_weights(shape, predictor, 4, 3), dense))
    return found


def read_bandwidth(kernels: Kernels, repeats: int = 7) -> float:
    """Bytes per second at which torch's threads read 512 MiB; the best of some tries."""
    data = contiguous_in_huge_pages(torch.ones(2**26, dtype=torch.int64))
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        kernels.read(data)
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def measure(todo: list[Variant], inputs: list[Tensor]) -> dict[str, list[float]]:
    """Seconds of each variant for each input but the first, which is not counted; none runs twice in succession."""
    times: dict[str, list[float]] = {variant.name: [] for variant in todo}
    draw, order = random.Random(0), list(todo)
    for number, x in enumerate(inputs):
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
    """One row per variant: median time, ratios with their quartiles to the first two and to int4, bytes and rate."""
    rows = []
    int4 = min(
        (variant.name for variant in todo if "int4 in" in variant.name), key=lambda n: statistics.median(times[n])
    )
    for variant in todo:
        own = times[variant.name]
        low, middle, high = ratio(times[todo[0].name], own)
        low_rows, middle_rows, high_rows = ratio(times[todo[1].name], own)
        low_int4, middle_int4, high_int4 = ratio(times[int4], own)
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
                "ratio_to_int4": middle_int4,
                "ratio_to_int4_quartiles": [low_int4, high_int4],
                "bytes": size,
                "gb_per_s": size / seconds / 1e9,
                "of_bandwidth": size / seconds / bandwidth,
            }
        )
    return rows


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    low, high = row["ratio_quartiles"]
    low_int4, high_int4 = row["ratio_to_int4_quartiles"]
    print(
        f"batch {row['batch']:2d}  {row['variant']:34s} {row['ms']:8.2f} ms  {row['ratio']:5.2f}x "
        f"[{low:.2f}-{high:.2f}], of int4 {row['ratio_to_int4']:4.2f}x [{low_int4:.2f}-{high_int4:.2f}]  "
        f"{row['bytes'] / 1e6:7.1f} MB  {row['gb_per_s']:5.1f} GB/s = "
        f"{row['of_bandwidth']:4.0%} of the read bandwidth"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="falcon-7b")
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
    shape = Shape(*SHAPES[args.shape], args.bits, args.fix_rate)
    todo = variants(kernels, shape)
    machine = {
        "cpu": cpu_name(),
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
        inputs = [torch.randn(batch, shape.d).bfloat16() for _ in range(args.rounds + 1)]
        times = measure(todo, inputs)
        for row in summary(todo, times, inputs[0], 1e9 * float(str(machine["read_gb_per_s"]))):
            rows.append(row)
            show(row)
    if args.output:
        args.output.write_text(
            json.dumps(
                {"machine": machine, "settings": vars(args) | {"d": shape.d, "h": shape.h}, "rows": rows},
                indent=1,
                default=str,
            )
        )


if __name__ == "__main__":
    main()
