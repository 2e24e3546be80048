"""Compile the GPU kernels for processors that need not be there, and print what each takes of them.

Every kernel of one token's step is compiled for each target at the shapes of Falcon-7B (plain) and Llama-3-8B (gated):
registers of a thread, bytes that are spilled, shared memory of a program. With `--docs` the table in docs/gpus.md is
made anew.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tardis_llm.ffn.neuron import Neurons
from tardis_llm.runtime.triton.codes import Codes
from tardis_llm.runtime.triton.launch import OPTIONS, Fixing, GPUMatrix, Launch, multiply

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
        assembly: PTX, or the assembly of AMD.
        registers: of a thread.
        spilled: bytes of local memory of a thread.
        shared: bytes of shared memory of a program.
    """

    name: str
    assembly: str
    registers: int
    spilled: int
    shared: int


def target(name: str) -> GPUTarget:
    """The target of a name such as sm_90 or gfx942."""
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def compile_launch(launch: Launch, name: str) -> Compiled:
    """A launch's kernel, compiled for the target of a name."""
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
    return _measured(launch.kernel.__name__, triton.compile(source, target=target(name), options=options))


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "i32" if isinstance(value, int) else "fp32"


def _measured(name: str, compiled: Any) -> Compiled:
    """What was compiled, with what it takes."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        found = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "private_segment_fixed_size")}  # type: ignore[index]  # fmt: skip
        return Compiled(name, text, found["vgpr_count"], found["private_segment_fixed_size"], compiled.metadata.shared)
    usage = disassembled(compiled.asm["cubin"], "--dump-resource-usage")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    return Compiled(name, compiled.asm["ptx"], registers, stack, compiled.metadata.shared)


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
    fold = torch.empty(shape.d, shape.d, dtype=torch.bfloat16, device=META) if bits is None else codes(shape.d, shape.d, bits)
    bias, y = torch.empty(shape.d, dtype=torch.bfloat16, device=META), torch.empty_like(x)
    return [*launches, multiply(x, fold, bias, y, parts)]
