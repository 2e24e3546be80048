"""Measure the GPU backend on the GPU that is here: correctness, every kernel, one FFN, whole models, folding itself.

    python benchmarks/gpu.py [--output FILE] [--quick]

Under ten minutes on an H100, without network; torch 2.11 with Triton 3.6 will do. Weights are random, in the shapes of
Falcon-7B (GELU) and Llama-3-8B (gated); hot ranges are set so that each token fixes 5 % of the neurons. Layers follow
one another, so that no weight is in the caches when it is read. Prints what it finds and writes JSON as it goes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import triton
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, FalconConfig

from tardis_llm import FoldConfig, fold, load_model, load_tokenizer, read_windows, sample
from tardis_llm.ffn.activations import activation
from tardis_llm.ffn.neuron import Neurons, value
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights
from tardis_llm.files import write_json
from tardis_llm.report import LayerReport
from tardis_llm.runtime.reference import fixed_neurons, folded_ffn
from tardis_llm.runtime.triton.backend import TritonBackend, TritonFFN, product
from tardis_llm.runtime.triton.codes import Codes
from tardis_llm.runtime.triton.launch import Launch, multiply

RESULTS = Path(__file__).parent / "results" / "gpu.json"
BATCHES = (1, 2, 4, 8, 16)
FIXED = 0.05
#: keys and values that attention reads for each token
CONTEXT = 512
BF16 = torch.bfloat16
#: how far an output may be from the reference, relative to the largest, and the share of neurons that both fix
MOST_ERROR, LEAST_AGREEMENT = 0.03, 0.97
#: how far error and fix rate of a layer folded on the GPU may be from those on the CPU, relative to them
MOST_APART = 0.05
_RUNS = 5  # of which the median counts
Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A model's.

    Attributes:
        d, h: width and neurons of an FFN.
        k: up-projections of a neuron.
        activation: its name.
        layers, vocabulary: of the whole model.
        kv: width of keys, and of values.
    """

    d: int
    h: int
    k: int
    activation: str
    layers: int
    vocabulary: int
    kv: int


SHAPES = {
    "falcon-7b": Shape(4544, 18176, 1, "gelu", 32, 65024, 64),
    "llama-3-8b": Shape(4096, 14336, 2, "silu", 32, 128256, 1024),
}


# ---- random weights ------------------------------------------------------------------------------------------------


def dense_matrix(rows: int, columns: int) -> Tensor:
    """[rows, columns] bf16 that keeps the size of its inputs."""
    return torch.randn(rows, columns, dtype=BF16, device="cuda") / columns**0.5


def codes(rows: int, columns: int, bits: int, group_size: int = 128, has_zero: bool = False) -> Codes:
    """A random matrix in few bits of the same size."""
    matrix = Codes.empty(rows, columns, bits, group_size, torch.device("cuda"), has_zero)
    matrix.data.random_(-(2**31), 2**31 - 1)
    matrix.scale.fill_(1 / (columns**0.5 * 2**bits / 12**0.5))
    return matrix


def random_fold(shape: Shape, bits: int | None) -> tuple[FoldedWeights, DenseFFN | None]:
    """A fold that fixes 5 % of the neurons of normal inputs, with its dense FFN, or all in so many bits."""
    d, h, rows = shape.d, shape.h, shape.k * shape.h
    zeros, ones = (torch.full((h,), number, dtype=torch.float16, device="cuda") for number in (0.0, torch.inf))
    neurons = Neurons(
        shape.activation, -ones, ones, torch.full((rows,), 0.1, dtype=torch.float16, device="cuda"), zeros
    )
    bias, predictor = torch.zeros(d, dtype=BF16, device="cuda"), codes(rows, d, 2, 256)
    if bits is None:
        dense = DenseFFN(dense_matrix(rows, d), None, dense_matrix(h, d).T, None, shape.activation)
        weights = FoldedWeights(dense_matrix(d, d), bias, predictor, neurons).beside(dense)
    else:
        dense = None
        up, down = codes(rows, d, bits - 2), codes(h, d, bits, has_zero=True)
        weights = FoldedWeights(codes(d, d, bits), bias, predictor, neurons, down, up)
    return replace(weights, neurons=replace(neurons, high=_high(weights))), dense


def _high(weights: FoldedWeights) -> Tensor:
    """[h] fp16 bounds that 5 % of the predictions for normal inputs are above."""
    assert isinstance(weights.predictor, Codes)
    x = torch.randn(512, weights.predictor.columns, dtype=BF16, device="cuda")
    predicted = torch.cat([product(some, weights.predictor, None) for some in x.split(64)]).float()
    tested = weights.neurons.tested(predicted)
    return torch.quantile(tested, 1 - FIXED, dim=0).half()


# ---- time ----------------------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], object], calls: int = 1) -> float:
    """Median milliseconds of one of the calls that `run` makes."""
    run()
    torch.cuda.synchronize()
    found = []
    for _ in range(_RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / calls)
    return statistics.median(found)


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """What runs, captured in a CUDA graph: replaying it launches all kernels at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth() -> float:
    """GB/s of a copy within the GPU's memory, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


# ---- what is measured ----------------------------------------------------------------------------------------------


def correctness() -> list[dict[str, Any]]:
    """The largest difference from the reference, relative to the largest output, for every format and batch."""
    rows, backend = [], TritonBackend()
    for k, bits, dtype in [
        (k, bits, dtype) for k in (1, 2) for bits in (None, 4, 8) for dtype in (BF16, torch.float16)
    ]:
        shape = Shape(1100, 3000, k, "silu" if k == 2 else "gelu", 1, 1, 1)
        weights = _stored(random_fold(shape, bits)[0], dtype)
        ffn = backend.prepare(weights, dtype)
        assert ffn is not None, "contiguous weights in one dtype are read"
        for tokens in (1, 2, 7, 16, 33, 64, 200):
            x = torch.randn(tokens, shape.d, dtype=dtype, device="cuda")
            y, expected = ffn(x).float(), folded_ffn(x, weights).float()
            agree = (ffn.fixed(x) == fixed_neurons(x, weights)).float().mean()
            error = (y - expected).abs().max() / expected.abs().max()
            rows.append({"k": k, "bits": bits, "dtype": str(dtype), "tokens": tokens, "error": float(error)}
                        | {"same_neurons": float(agree)})  # fmt: skip
    return rows


def _stored(weights: FoldedWeights, dtype: torch.dtype) -> FoldedWeights:
    """The weights as they are stored, dense ones in this dtype."""

    def stored(part: Any) -> Any:
        return part.matrix() if isinstance(part, Codes) else part if part is None else part.to(dtype).contiguous()

    parts = {name: stored(getattr(weights, name)) for name in ("fold", "bias", "predictor", "up", "down")}
    return replace(weights, **parts)


@dataclass(frozen=True)
class Layer:
    """An FFN, dense and folded.

    Attributes:
        folded: by the kernels.
        dense: in bf16; None where only weights in few bits are there.
        weights: of the fold.
    """

    folded: TritonFFN
    dense: DenseFFN | None
    weights: FoldedWeights


def layers_of(shape: Shape, bits: int | None, count: int) -> list[Layer]:
    """So many FFNs of a shape."""
    backend, found = TritonBackend(), []
    for _ in range(count):
        weights, dense = random_fold(shape, bits)
        ffn = backend.prepare(weights, BF16)
        assert ffn is not None, "contiguous weights in one dtype are read"
        found.append(Layer(ffn, dense, weights))
    return found


def kernels(layers: Sequence[Layer], tokens: int, copy: float) -> list[dict[str, Any]]:
    """Time of each kernel, and GB/s of the weights that it reads."""
    x = torch.randn(tokens, layers[0].weights.predictor.columns, dtype=BF16, device="cuda")  # type: ignore[union-attr]
    steps = [launches_of(layer, x) for layer in layers]
    for step in steps:
        for launch in step:
            launch.run()
    share = layers[0].folded.fixed(x).any(0).float().mean().item()
    weights = layers[0].weights
    read = {
        "predict": weights.predictor.nbytes,
        "gather": 0,
        "residuals": share * (weights.up.nbytes if weights.up is not None else 0),
        "correct": share * weights.down.nbytes,  # type: ignore[union-attr]
        "multiply": weights.fold.nbytes,  # type: ignore[union-attr]
    }
    rows = []
    for number, (name, size) in enumerate(read.items()):
        took = milliseconds(graphed(partial(run_all, [step[number] for step in steps])), len(steps))
        rate = size / took / 1e6
        rows.append({"kernel": name, "us": 1e3 * took, "bytes": size, "gb_s": rate, "of_copy": rate / copy})
    return rows


def run_all(launches: Sequence[Launch]) -> None:
    """Launch one after the other."""
    for launch in launches:
        launch.run()


def launches_of(layer: Layer, x: Tensor) -> list[Launch]:
    """The launches of a folded FFN."""
    launches, parts = layer.folded._fixing.launches(x)
    y = torch.empty_like(x)
    return [*launches, multiply(x, layer.folded._fold, layer.weights.bias, y, parts)]


def dense_step(dense: DenseFFN) -> Step:
    """An FFN in bf16 by torch."""
    return lambda x: F.linear(value(F.linear(x, dense.w1), dense.act, dense.k), dense.w2)


def low_bit_step(shape: Shape) -> Step:
    """An FFN whose weights are in 4 bits, by our kernel."""
    up, down, act = codes(shape.k * shape.h, shape.d, 4), codes(shape.d, shape.h, 4), activation(shape.activation)
    return lambda x: product(value(product(x, up, None), act, shape.k), down, None)


def timed(steps: Sequence[Step], x: Tensor) -> dict[str, float]:
    """Microseconds of one of some steps, eager and in a graph."""

    def run() -> None:
        y = x
        for step in steps:
            y = step(y)

    return {"eager_us": 1e3 * milliseconds(run, len(steps)), "graph_us": 1e3 * milliseconds(graphed(run), len(steps))}


# ---- whole models --------------------------------------------------------------------------------------------------


def attention(shape: Shape, bits: int | None) -> Step:
    """Attention of new tokens, each of another sequence, to what is kept of `CONTEXT` tokens."""
    d, kv, heads = shape.d, shape.kv, shape.d // (64 if shape.kv == 64 else 128)
    size = d // heads
    wanted = [(d + 2 * kv, d), (d, d)]
    into, out = (codes(*each, 4) if bits else dense_matrix(*each) for each in wanted)
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def run(x: Tensor) -> Tensor:
        if len(x) not in cache:
            kept = (torch.randn(len(x), kv // size, CONTEXT, size, dtype=BF16, device="cuda") for _ in range(2))
            cache[len(x)] = tuple(kept)  # type: ignore[assignment]
        keys, values = cache[len(x)]
        q = product(x, into, None)[:, :d].reshape(len(x), heads, 1, size)
        y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return product(y.reshape(len(x), d), out, None)

    return run


def decoder(shape: Shape, ffns: Sequence[Step], bits: int | None) -> Step:
    """One token of a model for each row of its inputs [batch, d], to logits."""
    blocks = [(attention(shape, bits), ffn) for ffn in ffns]
    head = codes(shape.vocabulary, shape.d, 4) if bits else dense_matrix(shape.vocabulary, shape.d)

    def run(x: Tensor) -> Tensor:
        for attend, ffn in blocks:
            x = x + attend(F.rms_norm(x, x.shape[-1:]))
            x = x + ffn(F.rms_norm(x, x.shape[-1:]))
        return product(F.rms_norm(x, x.shape[-1:]), head, None)

    return run


def models(shape: Shape, count: int) -> Iterator[tuple[str, Step]]:
    """Whole models with so many layers: dense in bf16 and int4, folded beside bf16 and stacked on int4."""
    layers = layers_of(shape, None, count)
    yield "dense bf16", decoder(shape, [dense_step(layer.dense) for layer in layers if layer.dense], None)
    yield "folded bf16", decoder(shape, [layer.folded for layer in layers], None)
    del layers
    yield "dense int4", decoder(shape, [low_bit_step(shape) for _ in range(count)], 4)
    yield "folded int4", decoder(shape, [layer.folded for layer in layers_of(shape, 4, count)], 4)


# ---- folding -------------------------------------------------------------------------------------------------------


def folded_twice(device: str, tokens: int) -> dict[str, Any]:
    """The sample model folded on the CPU and on a device: seconds, and how far apart the two are at most."""
    directory = str(sample.model_dir())
    windows = read_windows([sample.calibration_text()], load_tokenizer(directory), tokens, 256, 0.125)
    seconds: dict[str, float] = {}
    layers: list[Sequence[LayerReport]] = []
    for each in ("cpu", device):
        start = time.perf_counter()
        report = fold(load_model(directory), windows, FoldConfig(fold_bits=8, fallback_bits=4, device=each))
        seconds[each] = time.perf_counter() - start
        layers.append(report.layers)
    pairs = list(zip(*layers, strict=True))
    apart = {
        "error": max(abs(there.error / here.error - 1) for here, there in pairs),
        "fix_rate": max(abs(there.fix_rate / here.fix_rate - 1) for here, there in pairs),
    }
    return {"seconds": seconds, "apart": apart, "as_on_cpu": max(apart.values()) <= MOST_APART}


def large_fold(device: str, blocks: int, tokens: int) -> dict[str, float]:
    """Random blocks of Falcon-7B's shape folded on a GPU: seconds for each, and the most memory taken there."""
    model = AutoModelForCausalLM.from_config(FalconConfig(num_hidden_layers=blocks), dtype=BF16).eval()
    windows = torch.randint(1000, 60_000, (tokens // 1024, 1024))
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    fold(model, windows, FoldConfig(split="uniform", sequence_length=1024, fold_bits=8, fallback_bits=4, device=device))
    seconds = (time.perf_counter() - start) / blocks
    return {"seconds_a_block": seconds, "peak_bytes": torch.cuda.max_memory_allocated()}


def main(
    output: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
    quick: Annotated[bool, typer.Option(help="Four layers a model, for a first look.")] = False,
) -> None:
    """Measure the GPU backend."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "there is no GPU that torch can use here; run this on one. Kernels compile without: gpu_compiled."
        )
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(0)
    results: dict[str, Any] = {
        "machine": {"gpu": properties.name, "multiprocessors": properties.multi_processor_count},
        "software": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "copy_gb_s": copy_bandwidth(),
        "fixed": FIXED,
    }
    print(f"{properties.name}: a copy moves {results['copy_gb_s']:.0f} GB/s")

    def keep(name: str, found: Any) -> None:
        results[name] = found
        write_json(output, results)
        print(name, found)

    keep("correctness", found := correctness())
    if wrong := [row for row in found if not (row["error"] <= MOST_ERROR and row["same_neurons"] >= LEAST_AGREEMENT)]:
        raise SystemExit(
            f"the kernels differ from the reference in {len(wrong)} cases, the first of them {wrong[0]}; nothing was "
            "timed. Run tardis/tests/test_triton.py, which has the same cases in Triton's interpreter."
        )
    for name, shape in SHAPES.items():
        for bits in (None, 4):
            layers = layers_of(shape, bits, 8)
            label = f"{name} {'bf16' if bits is None else 'int4'}"
            keep(f"kernels {label}", {tokens: kernels(layers, tokens, results["copy_gb_s"]) for tokens in BATCHES})
            dense = [dense_step(layer.dense) if layer.dense else low_bit_step(shape) for layer in layers]
            inputs = [torch.randn(tokens, shape.d, dtype=BF16, device="cuda") for tokens in BATCHES]
            folded = [layer.folded for layer in layers]
            ffn = [{"batch": len(x), "dense": timed(dense, x), "folded": timed(folded, x)} for x in inputs]
            keep(f"ffn {label}", ffn)
            del layers, dense, folded
        for label, model in models(shape, 4 if quick else shape.layers):
            inputs = [torch.randn(tokens, shape.d, dtype=BF16, device="cuda") for tokens in BATCHES]
            steps = {len(x): timed([model], x) for x in inputs}
            keep(f"model {name} {label}", steps)
    keep("folding the sample", folded_twice("cuda", 8_192 if quick else 32_768))
    keep("folding falcon-7b", large_fold("cuda", 2, 16_384 if quick else 65_536))


if __name__ == "__main__":
    typer.run(main)
