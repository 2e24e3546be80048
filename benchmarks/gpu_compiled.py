"""Compile the GPU kernels for processors that need not be there, and print what each takes of them.

    python benchmarks/gpu_compiled.py [--json [--targets sm_90,gfx942]] [--docs]

Every kernel of one token's step is compiled for each target, at the shapes of Falcon-7B in bf16 and of Llama-3-8B in
int4: registers of a thread, bytes that it spills, shared memory of a program. Weights that a program loads are counted
in the PTX. With `--docs` the tables in docs/gpus.md are made anew, the computed times among them.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tardis_llm.ffn.neuron import Neurons
from tardis_llm.runtime.triton.codes import Codes
from tardis_llm.runtime.triton.launch import OPTIONS, Fixing, GPUMatrix, Launch, multiply, streamed

META = torch.device("meta")
#: names of targets: compute capabilities of NVIDIA, an architecture of AMD
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942")
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
}
_PAGE = Path(__file__).parent.parent / "docs" / "gpus.md"


@dataclass(frozen=True)
class Shape:
    """An FFN's.

    Attributes:
        d, h: width and neurons.
        k: up-projections of a neuron.
        activation: its name.
    """

    d: int
    h: int
    k: int
    activation: str


FALCON, LLAMA = Shape(4544, 18176, 1, "gelu"), Shape(4096, 14336, 2, "silu")


@dataclass(frozen=True)
class Compiled:
    """A kernel for a target.

    Attributes:
        name: of the kernel.
        target: as in `TARGETS`.
        assembly: PTX, or the assembly of AMD.
        registers: of a thread.
        spilled: bytes of local memory of a thread.
        shared: bytes of shared memory of a program.
    """

    name: str
    target: str
    assembly: str
    registers: int
    spilled: int
    shared: int


def target(name: str) -> GPUTarget:
    """The target of a name such as sm_90 or gfx942."""
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def compile_launch(launch: Launch, name: str) -> Compiled:
    """A launch's kernel, compiled for the target of a name, and what it takes."""
    return _measured(launch.kernel.__name__, name, _compiled(launch, name))


def _compiled(launch: Launch, name: str) -> Any:
    """A launch's kernel as Triton compiles it."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for place, argument in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(argument)
        if argument in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[argument] = "constexpr"
            constants.setdefault(argument, value)
            continue
        signature[argument] = _type(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, **OPTIONS}
    return triton.compile(source, target=target(name), options=options)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "i32" if isinstance(value, int) else "fp32"


def _measured(name: str, target: str, compiled: Any) -> Compiled:
    """What was compiled, with what it takes."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        found = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "private_segment_fixed_size")}  # type: ignore[index]  # fmt: skip  # noqa: E501
        return Compiled(
            name, target, text, found["vgpr_count"], found["private_segment_fixed_size"], compiled.metadata.shared
        )
    usage = disassembled(compiled.asm["cubin"], "--dump-resource-usage")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    return Compiled(name, target, compiled.asm["ptx"], registers, stack, compiled.metadata.shared)


def disassembled(cubin: bytes, option: str) -> str:
    """What cuobjdump, which Triton brings along, says of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool.chmod(0o755)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def codes(rows: int, columns: int, bits: int, group_size: int = 128) -> Codes:
    """A matrix without content in few bits."""
    return Codes.empty(rows, columns, bits, group_size, META)


def fixing(shape: Shape, bits: int | None, predictor_bits: int = 2) -> Fixing:
    """What finds and fixes neurons of an FFN, W1 and W2 in so many bits, the predictor's included; None for bf16."""
    d, h, rows = shape.d, shape.h, shape.k * shape.h
    lines = (torch.empty(size, dtype=torch.float16, device=META) for size in (h, h, rows, h))
    up: GPUMatrix = torch.empty(rows, d, dtype=torch.bfloat16, device=META)
    down: GPUMatrix = torch.empty(h, d, dtype=torch.bfloat16, device=META)
    if bits is not None:
        up, down = codes(rows, d, bits - predictor_bits), codes(h, d, bits)
    predictor = codes(rows, d, predictor_bits, 256)
    return Fixing(predictor, up, down, None, Neurons(shape.activation, *lines), bits is not None)


def step(shape: Shape, bits: int | None, tokens: int = 1) -> list[Launch]:
    """The launches of a folded FFN for so many tokens, all in bf16 or in so many bits."""
    x = torch.empty(tokens, shape.d, dtype=torch.bfloat16, device=META)
    launches, parts = fixing(shape, bits).launches(x)
    fold = (
        torch.empty(shape.d, shape.d, dtype=torch.bfloat16, device=META)
        if bits is None
        else codes(shape.d, shape.d, bits)
    )
    bias, y = torch.empty(shape.d, dtype=torch.bfloat16, device=META), torch.empty_like(x)
    return [*launches, multiply(x, fold, bias, y, parts)]


#: what is compiled: Falcon-7B in bf16, Llama-3-8B in int4
FFNS = {"Falcon-7B, bf16": (FALCON, None), "Llama-3-8B, int4": (LLAMA, 4)}


def weight_bytes(compiled: Compiled, warps: int) -> int:
    """Bytes of weights that a program loads, from its PTX, which has no loops: weights are marked to be evicted first."""  # noqa: E501
    loads = re.findall(r"ld\.global[.\w:]*L1::evict_first[.\w:]*?(?:\.v(\d))?\.[busf](\d+)\b", compiled.assembly)
    return sum(int(count or 1) * int(bits) // 8 for count, bits in loads) * 32 * warps


@dataclass(frozen=True)
class Loaded:
    """Weights that a product loads.

    Attributes:
        bits: of a weight.
        tokens: of the batch.
        loaded: bytes that all its programs load, by the PTX.
        counted: bytes that the matrix has, by the accounting.
    """

    bits: int
    tokens: int
    loaded: int
    counted: int


def loads() -> list[Loaded]:
    """What products of one step load, of matrices in every format."""
    found = []
    for bits in (16, 8, 4, 2, 1):
        for tokens in (1, 16):
            empty = torch.empty(256, 128, dtype=torch.bfloat16, device=META)
            tile = streamed(empty if bits == 16 else codes(256, 128, bits), tokens)
            columns = tile.step if bits == 16 else tile.step * 32 // bits
            dense = torch.empty(256, columns, dtype=torch.bfloat16, device=META)
            matrix: GPUMatrix = dense if bits == 16 else codes(256, columns, bits, 64)
            x, y = (torch.empty(tokens, size, dtype=torch.bfloat16, device=META) for size in (columns, 256))
            launch = multiply(x, matrix, None, y)
            each = weight_bytes(compile_launch(launch, "sm_90"), launch.warps)
            counted = matrix.nbytes if isinstance(matrix, Tensor) else matrix.data.nbytes
            found.append(Loaded(bits, tokens, each * launch.grid[0], counted))
    return found


def compiled_steps(targets: Sequence[str] = TARGETS) -> dict[str, list[Compiled]]:
    """The kernels of one token's step for each target, by the FFN's name."""
    return {
        name: [compile_launch(launch, each) for each in targets for launch in step(*ffn)] for name, ffn in FFNS.items()
    }


@dataclass(frozen=True)
class GPU:
    """A GPU by its data sheet.

    Attributes:
        name: of the product.
        bandwidth: of its memory, bytes a second.
        issue: instructions of threads a second: multiprocessors x 4 warps of 32 threads x boost clock.
    """

    name: str
    bandwidth: float
    issue: float


GPUS = (
    GPU("H100 SXM", 3.35e12, 132 * 128 * 1.98e9),
    GPU("H200", 4.8e12, 132 * 128 * 1.98e9),
    GPU("RTX 4090", 1.008e12, 128 * 128 * 2.52e9),
)
#: share of the data sheet's bandwidth that a copy is taken to reach; neurons that a token fixes; seconds between kernels  # noqa: E501
COPY, FIXED, GAP = 0.9, 0.05, 1e-6


def instructions(launch: Launch, target: str = "sm_90") -> int:
    """Instructions of a thread in the longest loop of a launch's kernel."""
    text = disassembled(_compiled(launch, target).asm["cubin"], "--dump-sass")
    places = [(int(place, 16), code) for place, code in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", text)]
    jumps = ((place, re.search(r"BRA.* 0x([0-9a-f]+)", code)) for place, code in places)
    return max(
        ((place - int(jump[1], 16)) // 16 + 1 for place, jump in jumps if jump and int(jump[1], 16) < place), default=0
    )


def issued_per_byte(bits: int) -> float:
    """Instructions of threads for a byte of a matrix in so many bits, 16 for bf16, that one token is multiplied with."""  # noqa: E501
    matrix: GPUMatrix = torch.empty(8192, 8192, dtype=torch.bfloat16, device=META)
    matrix = matrix if bits == 16 else codes(8192, 8192, bits)
    x, y = (torch.empty(1, 8192, dtype=torch.bfloat16, device=META) for _ in range(2))
    tile = streamed(matrix, 1)
    loaded = tile.rows * tile.step * (2 if bits == 16 else 4)
    return instructions(multiply(x, matrix, None, y)) * 32 * tile.warps / loaded


def computed(gpu: GPU, shape: Shape, bits: int | None) -> dict[str, float]:
    """Microseconds of one token's FFN, dense in bf16 and folded, by bytes alone, and by what a GPU issues, too."""
    fold, dense = fixing(shape, bits), (shape.k + 1) * shape.d * shape.h * 2
    square = codes(shape.d, shape.d, 4).nbytes if bits else shape.d * shape.d * 2
    rows = FIXED * sum(part.nbytes for part in (fold.up, fold.down) if part is not None)
    # of each part: bytes, and instructions for a byte
    width = bits or 16
    parts = [(fold.predictor.nbytes, 2), (rows, width), (square, 4 if bits else 16)]
    pace = COPY * gpu.bandwidth
    issued = [max(size / pace, size * issued_per_byte(each) / gpu.issue) for size, each in parts]
    return {
        "dense": dense / pace * 1e6,
        "bytes": (sum(size for size, _ in parts) / pace + 5 * GAP) * 1e6,
        "issue": (sum(issued) + 5 * GAP) * 1e6,
    }


def usage_table() -> str:
    """Registers and shared memory of every kernel, as Markdown."""
    rows = ["| FFN | kernel | " + " | ".join(TARGETS) + " |", "|---|---|" + "---|" * len(TARGETS)]
    for name, found in compiled_steps().items():
        for kernel in dict.fromkeys(each.name for each in found):
            cells = [f"{each.registers} / {each.shared}" for each in found if each.name == kernel]
            rows.append(f"| {name} | `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def roofline_table() -> str:
    """Computed times of one FFN on each GPU, as Markdown."""
    rows = [
        "| GPU | FFN | dense bf16, us | folded by bytes, us | with issue, us | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        for name, ffn in FFNS.items():
            time = computed(gpu, *ffn)
            ratio = time["dense"] / time["issue"]
            rows.append(
                f"| {gpu.name} | {name} | {time['dense']:.0f} | {time['bytes']:.0f} | {time['issue']:.0f} | {ratio:.1f} |"  # noqa: E501
            )
    return "\n".join(rows)


def issue_table() -> str:
    """Instructions for a byte of a matrix in each format, and what GPUs issue in the time that a byte takes."""
    widths = (16, 8, 4, 2, 1)
    rows = [
        "| | " + " | ".join("bf16" if bits == 16 else f"{bits} bits" for bits in widths) + " |",
        "|---|" + "---|" * 5,
    ]
    rows.append(
        "| instructions of threads for a byte | " + " | ".join(f"{issued_per_byte(bits):.1f}" for bits in widths) + " |"
    )
    limits = ", ".join(f"{gpu.name} {gpu.issue / gpu.bandwidth / COPY:.1f}" for gpu in GPUS)
    return "\n".join(rows) + f"\n\nIn the time in which a byte comes from memory, a GPU issues: {limits}."


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON, for tests.")] = False,
    targets: Annotated[str, typer.Option(help="Targets of the JSON, separated by commas.")] = ",".join(TARGETS),
    docs: Annotated[bool, typer.Option(help="Make the tables in docs/gpus.md anew.")] = False,
) -> None:
    """Compile the GPU kernels for every target."""
    if as_json:
        steps = compiled_steps(targets.split(","))
        found = {name: [{**asdict(each), "assembly": ""} for each in kernels] for name, kernels in steps.items()}
        print(json.dumps({"steps": found, "loads": [asdict(each) for each in loads()]}))
        return
    tables = {"usage": usage_table(), "roofline": roofline_table(), "issue": issue_table()}
    if docs:
        text = _PAGE.read_text(encoding="utf-8")
        for name, table in tables.items():
            begin, end = f"<!-- {name}: made by benchmarks/gpu_compiled.py -->", f"<!-- end of {name} -->"
            text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)
        _PAGE.write_text(text, encoding="utf-8")
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    typer.run(main)
