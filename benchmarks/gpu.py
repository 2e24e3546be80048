"""Measure the GPU backend on the GPU that is here: correctness, every kernel, one FFN, whole models, folding itself.

    python benchmarks/gpu.py [--output FILE] [--quick]

Under ten minutes on an H100, without network; torch 2.11 with Triton 3.6 will do. Weights are random, in the shapes of
Falcon-7B (GELU) and Llama-3-8B (gated); hot ranges are set so that each token fixes 5 % of the neurons. Layers follow
one another, so that no weight is in the caches when it is read. Prints what it finds and writes JSON as it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from torch import Tensor

from gpu_folding import folded_twice, large_fold
from gpu_layers import (
    BF16,
    FIXED,
    SHAPES,
    Layer,
    Shape,
    Step,
    dense_step,
    ffn_step,
    int4_linears,
    layers_of,
    random_fold,
)
from gpu_models import models
from gpu_timing import copy_bandwidth, graphed, milliseconds, timed
from tardis_llm.ffn.weights import FoldedWeights
from tardis_llm.files import write_json
from tardis_llm.runtime.reference import fixed_neurons, folded_ffn
from tardis_llm.runtime.triton.backend import TritonBackend
from tardis_llm.runtime.triton.codes import Codes
from tardis_llm.runtime.triton.launch import Launch, multiply

RESULTS = Path(__file__).parent / "results" / "gpu.json"
BATCHES = (1, 2, 4, 8, 16)
#: how far an output may be from the reference, relative to the largest, and the share of neurons that both fix
MOST_ERROR, LEAST_AGREEMENT = 0.03, 0.97


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


def rivals(shape: Shape, layers: Sequence[Layer]) -> dict[str, list[Step]]:
    """What folds are measured against: the same FFNs unfolded, in as many bits."""
    if dense := [dense_step(layer.dense) for layer in layers if layer.dense]:
        return {"dense": dense}
    return {f"dense{name}": [ffn_step(shape, linear) for _ in layers] for name, linear in int4_linears().items()}


def run_all(launches: Sequence[Launch]) -> None:
    """Launch one after the other."""
    for launch in launches:
        launch.run()


def launches_of(layer: Layer, x: Tensor) -> list[Launch]:
    """The launches of a folded FFN."""
    launches, parts = layer.folded._fixing.launches(x)
    y = torch.empty_like(x)
    return [*launches, multiply(x, layer.folded._fold, layer.weights.bias, y, parts)]


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
            inputs = [torch.randn(tokens, shape.d, dtype=BF16, device="cuda") for tokens in BATCHES]
            ways = rivals(shape, layers) | {"folded": [layer.folded for layer in layers]}
            keep(f"ffn {label}", [{"batch": len(x)} | {way: timed(ways[way], x) for way in ways} for x in inputs])
            del layers, ways
        for label, model in models(shape, 4 if quick else shape.layers):
            inputs = [torch.randn(tokens, shape.d, dtype=BF16, device="cuda") for tokens in BATCHES]
            steps = {len(x): timed([model], x) for x in inputs}
            keep(f"model {name} {label}", steps)
    keep("folding the sample", folded_twice("cuda", 8_192 if quick else 32_768))
    keep("folding falcon-7b", large_fold("cuda", 2, 16_384 if quick else 65_536))


if __name__ == "__main__":
    typer.run(main)
