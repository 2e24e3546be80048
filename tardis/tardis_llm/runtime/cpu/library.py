"""The compiled CPU kernels: found, opened with ctypes, and told which instruction set to use.

Nothing here needs a compiler or fails without the library: `kernels()` is then None.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidInputError, KernelsError, TardisError
from ...ffn.activations import KINDS
from ...ffn.packed import BLOCK_COLUMNS, PackedMatrix
from ...folding.columns import BLOCK
from .description import check, declare, described, layout_of, sources_of
from .operands import HEAD_ROWS, MAX_BITS
from .panels import LINE_BYTES, ROWS, TOGETHER
from .structures import FFN, OPERATIONS, STRUCTURES, Batch, Head, Matrix, Rounding, Type, Vector

#: tokens of the largest batch
MAX_TOKENS = 64
#: instruction sets that the kernels are written for, in the order of `TardisIsa` of interface.h
ISAS = ("portable", "avx2", "avxvnni", "avx512bw", "avx512vnni", "avx512", "amx", "neon", "i8mm")
#: what a `TardisStatus` means
_STATUSES = {
    "ok": "",
    "no_memory": "no memory for its working arrays",
    "bad_argument": "arguments that do not fit together",
}
_SUFFIXES = {"win32": ".dll", "darwin": ".so"}


class Kernels:
    """The opened library.

    Args:
        path: of the library.

    Raises:
        OSError: it cannot be opened.
        KernelsError: it was built for another version of the package.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        description = described(self._library)
        check(path, description, _stated())
        declare(self._library, description, STRUCTURES)
        self._library.tardis_use_openmp(_openmp())

    @property
    def isa(self) -> str:
        """The instruction set in use, one of `ISAS`."""
        return ISAS[self._library.tardis_isa()]

    @property
    def isas(self) -> list[str]:
        """The instruction sets that processor and build have."""
        return [name for number, name in enumerate(ISAS) if self._library.tardis_supports(number)]

    def use(self, isa: str) -> None:
        """Use an instruction set from now on, in every thread.

        Raises:
            InvalidInputError: processor or build lack it.
        """
        if isa not in self.isas:
            raise InvalidInputError(f"kernels for {isa!r} cannot run here; choose off, {', '.join(self.isas)}.")
        self._library.tardis_use(ISAS.index(isa))

    @contextmanager
    def using(self, isa: str) -> Iterator[None]:
        """Within the context, use an instruction set; see `use`."""
        before = self.isa
        self.use(isa)
        try:
            yield
        finally:
            self.use(before)

    def linear(self, weight: Matrix, bias: Vector, batch: Batch) -> None:
        """y = x W^T + bias."""
        _done(self._library.tardis_linear(byref(weight), byref(bias), byref(batch)), "linear")

    def head(self, head: Head, batch: Batch) -> None:
        """y: the logits, of which the greatest have all bits of their rows."""
        _done(self._library.tardis_head(byref(head), byref(batch)), "head")

    @property
    def has_gemm(self) -> bool:
        """Whether the instruction set in use has what `gemm` needs."""
        return bool(self._library.tardis_has_gemm())

    @property
    def has_low_bit_gemm(self) -> bool:
        """Whether the instruction set in use multiplies codes in panels by any number of tokens in bf16."""
        return bool(self._library.tardis_has_low_bit_gemm())

    def can_be_in_panels(self, matrix: Tensor | PackedMatrix) -> bool:
        """Whether the instruction set in use multiplies such a matrix, once it is in panels."""
        return bool(self._library.tardis_can_be_in_panels(byref(Matrix.without_pointers(matrix))))

    def can_be_code_rows(self, matrix: PackedMatrix) -> bool:
        """Whether the instruction set in use adds rows of such a matrix faster, once it is code rows."""
        return bool(self._library.tardis_can_be_code_rows(byref(Matrix.without_pointers(matrix))))

    def gemm(self, weight: Matrix, transposed: bool, bias: Vector, batch: Batch) -> None:
        """y = x W^T + bias, or x W + bias if W is `transposed`, in bf16 or fp16 for any number of tokens."""
        _done(self._library.tardis_gemm(byref(weight), transposed, byref(bias), byref(batch)), "gemm")

    def fixed(self, ffn: FFN, batch: Batch) -> None:
        """y: a byte per token and neuron, 1 where the prediction leaves the neuron's range."""
        _done(self._library.tardis_fixed(byref(ffn), byref(batch)), "fixed")

    def folded_ffn(self, ffn: FFN, batch: Batch) -> None:
        """y: the output of the folded FFN."""
        _done(self._library.tardis_folded_ffn(byref(ffn), byref(batch)), "folded_ffn")

    def has_exact_ffn(self, ffn: FFN) -> bool:
        """Whether the instruction set in use has `exact_ffn` for these weights."""
        return bool(self._library.tardis_has_exact_ffn(byref(ffn)))

    def exact_ffn(self, ffn: FFN, b2: Vector, batch: Batch) -> None:
        """y: the output with every neuron computed by the weights that fixing reads, for tokens in bf16."""
        _done(self._library.tardis_exact_ffn(byref(ffn), byref(b2), byref(batch)), "exact_ffn")

    def step(self, operations: Any, batch: Batch, position: int) -> None:
        """The operations of an array one after the other, for one token more of each sequence at this position."""
        _done(self._library.tardis_step(operations, len(operations), byref(batch), position), "step")

    def round_columns(self, rounding: Rounding) -> None:
        """Round columns one after the other, while those behind make up for each."""
        _done(self._library.tardis_round_columns(byref(rounding), torch.get_num_threads()), "round_columns")

    def read(self, data: Tensor) -> int:
        """Read a contiguous tensor with all of torch's threads and add up its 64-bit words."""
        return int(self._library.tardis_read(data.data_ptr(), data.nbytes // 8, torch.get_num_threads()))


def _stated() -> dict[str, str]:
    """What Python says of interface.h, as the library's description has it, and of the sources if they lie here."""
    constants = {
        "kMaxTokens": MAX_TOKENS,
        "kMaxBits": MAX_BITS,
        "kBlockColumns": BLOCK_COLUMNS,
        "kPanelRows": ROWS,
        "kBf16Together": TOGETHER[torch.bfloat16],
        "kFp16Together": TOGETHER[torch.float16],
        "kLineBytes": LINE_BYTES,
        "kHeadRows": HEAD_ROWS,
        "kRoundedColumns": BLOCK,
    }
    for names in (Type.__members__, _STATUSES, ISAS, KINDS, OPERATIONS):
        constants |= {f"TARDIS_{name.upper()}": number for number, name in enumerate(names)}
    numbers = {name: str(number) for name, number in constants.items()}
    return numbers | layout_of(STRUCTURES) | sources_of(Path(__file__).parent)


def _done(status: int, kernel: str) -> None:
    if status:
        raise TardisError(
            f"the kernel {kernel} got {list(_STATUSES.values())[status]}; set TARDIS_KERNELS=off to go on."
        )


@functools.cache
def kernels() -> Kernels | None:
    """The library; None where it is not built, which is said once."""
    library = open_library()
    if library is None:
        message = "the CPU kernels of TARDIS are not built: folded FFNs run through the slower reference. Install a "
        warnings.warn(message + "C++ compiler and reinstall tardis-llm to have them.", RuntimeWarning, stacklevel=3)
    return library


def loaded() -> Kernels:
    """The library.

    Raises:
        TardisError: it is not built.
    """
    library = open_library()
    if library is None:
        raise TardisError("the CPU kernels are not built; install a C++ compiler and reinstall tardis-llm.")
    return library


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether there are `kernels` to use; they may not come or go while the program runs."""
    return kernels() is not None


@torch.compiler.assume_constant_result
def has_gemm() -> bool:
    """Whether there is `Kernels.gemm`."""
    library = kernels()
    return library is not None and library.has_gemm


def has_low_bit_gemm() -> bool:
    """Whether the kernels multiply codes in panels by any number of tokens in bf16."""
    library = kernels()
    return library is not None and library.has_low_bit_gemm


def can_be_in_panels(matrix: Tensor | PackedMatrix) -> bool:
    """Whether the kernels multiply such a matrix, once it is in panels."""
    library = kernels()
    return library is not None and library.can_be_in_panels(matrix)


def can_be_code_rows(matrix: PackedMatrix) -> bool:
    """Whether the kernels add rows of such a matrix faster, once it is code rows."""
    library = kernels()
    return library is not None and library.can_be_code_rows(matrix)


@functools.cache
def open_library() -> Kernels | None:
    """The library; None where it is not built. Says why if one there is not used."""
    for path in _candidates(sys.modules[__package__].__path__):
        if path.is_file():
            try:
                return Kernels(path)
            except (OSError, KernelsError) as error:
                warnings.warn(f"the CPU kernels of TARDIS are not used: {error}", RuntimeWarning, stacklevel=2)
    return None


def _openmp() -> ctypes.c_void_p | None:
    """`GOMP_parallel` of the OpenMP that torch runs on, found among what its library is linked with; None without."""
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).GOMP_parallel
    except (OSError, AttributeError):
        warnings.warn("torch has no OpenMP here: the CPU kernels of TARDIS use one thread.", RuntimeWarning, 4)
        return None
    return ctypes.cast(parallel, ctypes.c_void_p)


def _candidates(folders: Sequence[str]) -> list[Path]:
    """Where the library may lie: an editable installation has it in another folder than the sources."""
    name = "_kernels" + _SUFFIXES.get(sys.platform, ".so")
    return [Path(folder) / name for folder in folders]
