"""Existing int8 and int4 linear layers on the CPU against F.linear in bf16, measured in turns in one process.

    python benchmarks/linears.py [--shapes 4672x4544,65024x4544] [--batch 1,8] [--threads 1,2] [--only NAME,...]

What is there but is no part of the package's dependencies is measured where it is installed:
`pip install -c tardis/constraints.txt torchao`, and with `--no-deps` bitsandbytes, optimum-quanto, hqq, onnxruntime.
Every round runs each variant once, on so many copies of its weights that they do not stay in the caches; ratios are
taken within rounds. Errors are those of the output for normal inputs and normal weights, relative to its norm.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor

from tardis_llm.errors import TardisError
from tardis_llm.evaluation.machine import cpu_name, read_bandwidth
from tardis_llm.evaluation.turns import Ratio
from tardis_llm.pipeline.linears import low_bit_copy

#: bytes of weights that a variant reads before it reads the same again; no cache that we know keeps so many
_COLD_BYTES = 96 * 2**20
#: shapes [out, in]: Falcon-7B's attention and head, GPT-2 XL's attention
_SHAPES = "4672x4544,4544x4544,65024x4544,4800x1600,1600x1600"
#: a variant so many times slower than F.linear is not timed further
_HOPELESS = 4.0

Run = Callable[[Tensor], Tensor]
#: a weight [out, in] in bf16 -> what multiplies by it, and the bytes that it reads
Make = Callable[[Tensor], tuple[Run, int]]


def stock(weight: Tensor) -> tuple[Run, int]:
    """What transformers does."""
    return lambda x: F.linear(x, weight), weight.nbytes


def ours_bf16(weight: Tensor) -> tuple[Run, int]:
    """Our own bf16 kernel."""
    return lambda x: torch.ops.tardis.linear(x, weight, None), weight.nbytes


def ours_low_bit(bits: int, group_size: int) -> Make:
    """What `tardis fold --linears` stores, through our own kernel."""

    def make(weight: Tensor) -> tuple[Run, int]:
        layer = low_bit_copy(linear(weight), bits, group_size)
        layer.lay_out(weight.dtype)
        return layer, layer.nbytes

    return make


def int8_pack(weight: Tensor) -> tuple[Run, int]:
    """torch's own weight-only int8, one scale per output; what torchao and quanto call under torch.compile."""
    codes, scale = rows_in_int8(weight)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scale), codes.nbytes + scale.nbytes


def rows_in_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [out, in] int8 and scales [out] bf16, rounded to the nearest."""
    scale = (weight.float().abs().amax(1) / 127).bfloat16()
    codes = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes, scale


def int4_pack(group_size: int) -> Make:
    """torch's own weight-only int4; torchao's opaque format calls it."""

    def make(weight: Tensor) -> tuple[Run, int]:
        codes, scale, low = groups_in_int4(weight, group_size)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        zero = low + 8 * scale  # the kernel's weight is (code - 8) * scale + zero
        scales = torch.stack([scale, zero], -1).transpose(0, 1).contiguous().bfloat16()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return lambda x: product(x, packed, group_size, scales), packed.nbytes + scales.nbytes

    return make


def groups_in_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in] int32 from 0 to 15, and scales and lowest values [out, groups] fp32."""
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low) / 15
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    return codes.flatten(1).to(torch.int32), scale, low


def dynamic_4bit(weight: Tensor) -> tuple[Run, int]:
    """torch's int4 with activations in int8, one scale per output (4 bits in groups need bf16 and ARM)."""
    n, k = weight.shape
    scale = weight.float().abs().amax(1, keepdim=True) / 7
    codes = (weight.float() / scale).round().clamp(-8, 7).to(torch.int32) + 8
    pairs = (codes[:, 1::2] << 4 | codes[:, ::2]).to(torch.uint8)
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(pairs, scale, None, k, k, n)
    product = torch.ops.aten._dyn_quant_matmul_4bit
    return lambda x: product(x.float(), packed, k, k, n).to(x.dtype), packed.nbytes


def quantised_dynamic(engine: str) -> Make:
    """torch.ao's dynamic quantisation: int8 weights and activations, fp32 in and out."""

    def make(weight: Tensor) -> tuple[Run, int]:
        torch.backends.quantized.engine = engine
        layer = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear(weight).float()), {nn.Linear})
        return lambda x: layer(x.float()).to(x.dtype), weight.numel()

    return make


def onednn_int8(weight: Tensor) -> tuple[Run, int]:
    """oneDNN's int8 product, which inductor's x86 quantiser uses, on activations in 8 bits, one scale per token."""
    codes, scale = rows_in_int8(weight)
    packed = torch.ops.onednn.qlinear_prepack(codes.clone(), None)
    zero, row, product = torch.zeros(len(scale), dtype=torch.int32), scale.float(), torch.ops.onednn.qlinear_pointwise

    def run(x: Tensor) -> Tensor:
        step = x.abs().amax(1, keepdim=True).float() / 127
        codes = (x / step).round_().add_(128).to(torch.uint8)
        y = product(codes, 1.0, 128, packed, row, zero, None, 1.0, 0, torch.float32, "none", [], "")
        return (y * step).to(x.dtype)

    return run, codes.nbytes + scale.nbytes


def int_mm(weight: Tensor) -> tuple[Run, int]:
    """torch._int_mm on activations in int8, one scale per token."""
    codes, scale = rows_in_int8(weight)

    def run(x: Tensor) -> Tensor:
        step = x.abs().amax(1, keepdim=True).float() / 127
        return (torch._int_mm((x / step).round().to(torch.int8), codes.T) * step * scale).to(x.dtype)

    return run, codes.nbytes + scale.nbytes


def torchao(config: Callable[[], Any], bits: int) -> Make:
    """torchao's `quantize_`, not compiled."""

    def make(weight: Tensor) -> tuple[Run, int]:
        from torchao.quantization import quantize_

        layer = linear(weight)
        quantize_(layer, config())
        return layer, weight.numel() * bits // 8

    return make


def compiled(make: Make) -> Make:
    """Another variant through inductor, which is what torchao is made for."""

    def made(weight: Tensor) -> tuple[Run, int]:
        torch._dynamo.config.recompile_limit = 1000
        inductor.freezing = inductor.max_autotune = True
        run, size = make(weight)
        return torch.compile(run), size

    return made


def torchao_int4() -> Any:
    """torchao's int4 for CPUs."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=64)


def torchao_named(name: str) -> Callable[[], Any]:
    """A config of torchao's by name, with its defaults."""

    def config() -> Any:
        import torchao.quantization

        return getattr(torchao.quantization, name)()

    return config


def bitsandbytes_int8(weight: Tensor) -> tuple[Run, int]:
    """bitsandbytes' LLM.int8()."""
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

    layer = Linear8bitLt(weight.shape[1], len(weight), bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu").eval(), weight.numel()


def bitsandbytes_nf4(weight: Tensor) -> tuple[Run, int]:
    """bitsandbytes' NF4, groups of 64."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    layer = Linear4bit(weight.shape[1], len(weight), bias=False, compute_dtype=torch.bfloat16)
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to("cpu").eval(), weight.numel() // 2 + weight.numel() // 64 * 4


def quanto(name: str, bits: int) -> Make:
    """optimum-quanto."""

    def make(weight: Tensor) -> tuple[Run, int]:
        import optimum.quanto

        model = nn.Sequential(linear(weight))
        optimum.quanto.quantize(model, weights=getattr(optimum.quanto, name))
        optimum.quanto.freeze(model)
        return model, weight.numel() * bits // 8

    return make


def hqq_int4(weight: Tensor) -> tuple[Run, int]:
    """HQQ in plain torch, groups of 64."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    layer = HQQLinear(linear(weight), config, compute_dtype=torch.bfloat16, device="cpu")
    return layer, weight.numel() // 2 + weight.numel() // 64 * 4


def onnxruntime_bits(bits: int) -> Make:
    """ONNX Runtime's MatMulNBits with activations in int8, groups of 32; a session of its own per layer."""

    def make(weight: Tensor) -> tuple[Run, int]:
        return onnx_layer(weight, bits)

    return make


def onnx_layer(weight: Tensor, bits: int) -> tuple[Run, int]:
    """A session that multiplies by a weight in few bits, symmetric, group by group."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    n, k, group, top = *weight.shape, 32, 2 ** (bits - 1) - 1
    groups = weight.float().unflatten(1, (-1, group))
    scale = groups.abs().amax(2) / top
    codes = ((groups / scale[..., None]).round() + top + 1).to(torch.uint8)
    blob = codes if bits == 8 else codes[..., 1::2] << 4 | codes[..., ::2]
    fields: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": group, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **fields)
    x, y = (helper.make_tensor_value_info(a, TensorProto.FLOAT, ["t", b]) for a, b in (("x", k), ("y", n)))
    constants = [numpy_helper.from_array(blob.numpy(), "w"), numpy_helper.from_array(scale.flatten().numpy(), "s")]
    graph = helper.make_graph([node], "linear", [x], [y], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.float().numpy()})[0]).to(x.dtype)

    return run, blob.numel() + scale.nbytes


def linear(weight: Tensor) -> nn.Linear:
    """A layer with this weight and no bias."""
    layer = nn.Linear(weight.shape[1], len(weight), bias=False, dtype=weight.dtype, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


VARIANTS: dict[str, Make] = {
    "F.linear bf16": stock,
    "tardis bf16": ours_bf16,
    "int8 _weight_int8pack_mm": int8_pack,
    "int8 torchao weight-only": torchao(torchao_named("Int8WeightOnlyConfig"), 8),
    "int8 torchao weight-only, compiled": compiled(torchao(torchao_named("Int8WeightOnlyConfig"), 8)),
    "int8 torchao dynamic": torchao(torchao_named("Int8DynamicActivationInt8WeightConfig"), 8),
    "int8 torch.ao dynamic fbgemm": quantised_dynamic("fbgemm"),
    "int8 torch.ao dynamic onednn": quantised_dynamic("onednn"),
    "int8 onednn, x in 8 bits": onednn_int8,
    "int8 torch._int_mm": int_mm,
    "int8 bitsandbytes": bitsandbytes_int8,
    "int8 quanto": quanto("qint8", 8),
    "int8 onnxruntime": onnxruntime_bits(8),
    "int8 tardis g64": ours_low_bit(8, 64),
    "int4 _weight_int4pack_mm g32": int4_pack(32),
    "int4 _weight_int4pack_mm g64": int4_pack(64),
    "int4 torchao opaque g64": torchao(torchao_int4, 4),
    "int4 torchao opaque g64, compiled": compiled(torchao(torchao_int4, 4)),
    "int4 torchao dynamic intx": torchao(torchao_named("Int8DynamicActivationIntxWeightConfig"), 8),
    "int4 _dyn_quant_matmul_4bit": dynamic_4bit,
    "int4 bitsandbytes nf4": bitsandbytes_nf4,
    "int4 quanto": quanto("qint4", 4),
    "int4 hqq": hqq_int4,
    "int4 onnxruntime": onnxruntime_bits(4),
    "int4 tardis g32": ours_low_bit(4, 32),
    "int4 tardis g64": ours_low_bit(4, 64),
    "int4 tardis g128": ours_low_bit(4, 128),
}


@dataclass(frozen=True)
class Candidate:
    """A variant with as many copies of its weights as keep them out of the caches.

    Attributes:
        name: in `VARIANTS`.
        runs: one per copy.
        size: bytes of weights that one reads.
        error: of its output, relative.
    """

    name: str
    runs: list[Run]
    size: int
    error: float

    def seconds(self, x: Tensor) -> float:
        """Per product, over all copies."""
        start = time.perf_counter()
        for run in self.runs:
            run(x)
        return (time.perf_counter() - start) / len(self.runs)


def prepare(name: str, weight: Tensor, x: Tensor) -> Candidate | str:
    """A variant ready to run, or why it cannot."""
    try:
        run, size = VARIANTS[name](weight)
        output = run(x).float()
        exact = F.linear(x.float(), weight.float())
        error = float((output - exact).norm() / exact.norm())
        start = time.perf_counter()
        run(x)
        taken = time.perf_counter() - start
        start = time.perf_counter()
        F.linear(x, weight)
        if taken > _HOPELESS * (time.perf_counter() - start):
            return f"error {error:.4f}, {1e3 * taken:.1f} ms: more than {_HOPELESS:.0f} times F.linear"
        copies = max(1, -(-_COLD_BYTES // size))
        return Candidate(name, [run, *(VARIANTS[name](weight)[0] for _ in range(copies - 1))], size, error)
    except (ImportError, RuntimeError, AssertionError, TypeError, ValueError, TardisError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:110]}"


def measure(ready: list[Candidate], x: Tensor, rounds: int) -> Iterator[dict[str, Any]]:
    """A row per candidate; the first is what the others are compared with."""
    taken: dict[str, list[float]] = {candidate.name: [] for candidate in ready}
    for number in range(rounds + 1):
        for candidate in ready:
            seconds = candidate.seconds(x)
            if number:
                taken[candidate.name].append(seconds)
    for candidate in ready:
        median = statistics.median(taken[candidate.name])
        yield {
            "variant": candidate.name,
            "ms": 1e3 * median,
            "gb_per_s": candidate.size / median / 1e9,
            "megabytes": candidate.size / 1e6,
            "speed_up": vars(Ratio.of(taken[ready[0].name], taken[candidate.name])),
            "error": candidate.error,
        }


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    ratio = row["speed_up"]
    print(
        f"  {row['variant']:34s} {row['ms']:8.3f} ms {row['gb_per_s']:6.1f} GB/s  {ratio['value']:5.2f}x "
        f"[{ratio['low']:.2f}-{ratio['high']:.2f}]  error {row['error']:.4f}",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=_SHAPES, help="OUTxIN, a comma between")
    parser.add_argument("--batch", default="1,8", help="64 at most, a comma between")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", help="names or parts of names of variants, a comma between")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    args = arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    wanted = args.only.split(",") if args.only else [""]
    names = [name for name in VARIANTS if name == "F.linear bf16" or any(part in name for part in wanted)]
    machine = {"cpu": cpu_name(), "torch": torch.__version__, "read_gb_per_s": read_bandwidth() / 1e9}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = []
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        for shape in args.shapes.split(","):
            n, k = map(int, shape.split("x"))
            weight = torch.empty(n, k, dtype=torch.bfloat16).normal_(0, k**-0.5)
            x = torch.randn(64, k).bfloat16()
            print(f"{n} x {k} [out x in], threads {threads}", flush=True)
            found = {name: prepare(name, weight, x[:1]) for name in names}
            for name, reason in found.items():
                if isinstance(reason, str):
                    print(f"  {name:34s} {reason}", flush=True)
            ready = [each for each in found.values() if isinstance(each, Candidate)]
            for batch in map(int, args.batch.split(",")):
                print(f" batch {batch}", flush=True)
                for row in measure(ready, x[:batch], args.rounds):
                    show(row)
                    rows.append({"out": n, "in": k, "batch": batch, "threads": threads, **row})
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
