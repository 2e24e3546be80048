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

import torch
from torch import Tensor

from ...errors import InvalidInputError, TardisError
from ...ffn.packed import PackedMatrix
from .operands import check_matrix, check_vector
from .panels import Panels

#: what the kernels are written for, by the numbers that the library has for them
ISAS = ("portable", "avx2", "avx512")
#: tokens of the largest batch
MAX_TOKENS = 64
_ABI = 6
_SUFFIXES = {"win32": ".dll", "darwin": ".so"}
_TYPES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_LOW_BIT, _LOW_BIT_PANELS = 4, 6
_PANELS = {torch.bfloat16: 5, torch.float16: 7}
_ERRORS = {1: "no memory for its working arrays", 2: "arguments that do not fit together"}


class Matrix(ctypes.Structure):
    """`TardisMatrix` of interface.h: bf16, fp16, fp32 or low-bit, or in panels."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("bits", ctypes.c_int32),
    )

    @classmethod
    def of(cls, matrix: Tensor | PackedMatrix | Panels | None) -> Matrix:
        """Points to a matrix, whose tensors must stay alive and contiguous; raises TardisError as `check_matrix`."""
        if matrix is None:
            return cls()
        check_matrix(matrix)
        if isinstance(matrix, Panels):
            scale_at = None if matrix.scale is None else matrix.scale.data_ptr()
            shape = matrix.rows, matrix.columns, matrix.group_size
            kind = _PANELS[matrix.data.dtype] if matrix.scale is None else _LOW_BIT_PANELS
            return cls(matrix.data.data_ptr(), scale_at, *shape, kind, matrix.bits)
        if isinstance(matrix, Tensor):
            rows, columns = matrix.shape
            return cls(matrix.data_ptr(), None, rows, columns, columns, _TYPES[matrix.dtype], 0)
        planes, scale = matrix.planes, matrix.scale
        rows, bits = planes.shape[:2]
        pointers = planes.data_ptr(), scale.data_ptr()
        return cls(*pointers, rows, matrix.columns, matrix.group_size, _LOW_BIT, bits)


class Vector(ctypes.Structure):
    """`TardisVector` of interface.h: bf16, fp16 or fp32, or none."""

    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("unused", ctypes.c_int32))

    @classmethod
    def of(cls, vector: Tensor | None) -> Vector:
        """Points to a vector, which must stay alive and contiguous; raises TardisError as `check_vector`."""
        if vector is None:
            return cls()
        check_vector(vector)
        return cls(vector.data_ptr(), _TYPES[vector.dtype], 0)


class Batch(ctypes.Structure):
    """`TardisBatch` of interface.h: inputs and outputs."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("activation_bits", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )

    @classmethod
    def of(cls, x: Tensor, y: Tensor, activation_bits: int) -> Batch:
        """Points to inputs x [tokens, d] and outputs y, which must stay alive and contiguous."""
        threads = torch.get_num_threads()
        return cls(x.data_ptr(), y.data_ptr(), len(x), _TYPES[x.dtype], activation_bits, threads, 0)


class FFN(ctypes.Structure):
    """`TardisFFN` of interface.h."""

    _fields_ = (
        *((name, Matrix) for name in ("fold", "predictor", "up", "down")),
        *((name, Vector) for name in ("bias", "b1", "low", "high", "slope", "offset")),
        ("activation", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class Kernels:
    """The opened library.

    Args:
        path: of the library.

    Raises:
        OSError: it cannot be opened, or is of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.tardis_read.restype = ctypes.c_uint64
        self._library.tardis_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
        if self._library.tardis_abi() != _ABI:
            raise OSError(f"{path} was built for another version of TARDIS")
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

    @property
    def has_gemm(self) -> bool:
        """Whether the instruction set in use has what `gemm` needs."""
        return bool(self._library.tardis_has_gemm())

    @property
    def has_panels(self) -> bool:
        """Whether the instruction set in use takes matrices in panels."""
        return bool(self._library.tardis_has_panels())

    def gemm(self, weight: Matrix, transposed: bool, bias: Vector, batch: Batch) -> None:
        """y = x W^T + bias, or x W + bias if W is `transposed`, in bf16 or fp16 for any number of tokens."""
        _done(self._library.tardis_gemm(byref(weight), transposed, byref(bias), byref(batch)), "gemm")

    def fixed(self, ffn: FFN, batch: Batch) -> None:
        """y: a byte per token and neuron, 1 where the prediction leaves the neuron's range."""
        _done(self._library.tardis_fixed(byref(ffn), byref(batch)), "fixed")

    def folded_ffn(self, ffn: FFN, batch: Batch) -> None:
        """y: the output of the folded FFN."""
        _done(self._library.tardis_folded_ffn(byref(ffn), byref(batch)), "folded_ffn")

    def read(self, data: Tensor) -> int:
        """Read a contiguous tensor with all of torch's threads and add up its 64-bit words."""
        return int(self._library.tardis_read(data.data_ptr(), data.nbytes // 8, torch.get_num_threads()))


def _done(status: int, kernel: str) -> None:
    if status:
        raise TardisError(
            f"the kernel {kernel} got {_ERRORS.get(status, 'an error')}; set TARDIS_KERNELS=off to go on."
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


@torch.compiler.assume_constant_result
def has_panels() -> bool:
    """Whether the kernels take matrices in panels."""
    library = kernels()
    return library is not None and library.has_panels


@functools.cache
def open_library() -> Kernels | None:
    """The library; None where it is not built or cannot be opened."""
    for path in _candidates(sys.modules[__package__].__path__):
        if path.is_file():
            try:
                return Kernels(path)
            except OSError:
                continue
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
