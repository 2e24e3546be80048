"""The structures of interface.h, and how tensors become them.

The library says where its fields lie, and one that says otherwise than ctypes here is refused: see `description`.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

import torch
from torch import Tensor

from ...errors import TardisError
from ...ffn.activations import KINDS, kind, parameters
from ...ffn.packed import PackedMatrix, midpoint
from ...ffn.weights import kind as kind_of
from .code_rows import CodeRows
from .operands import check_matrix, check_tensor
from .panels import Panels

#: `TardisType` of interface.h
Type = IntEnum("Type", "NONE BF16 FP16 FP32 LOW_BIT BF16_PANELS FP16_PANELS LOW_BIT_PANELS CODE_ROWS", start=0)
_DENSE = {torch.bfloat16: Type.BF16, torch.float16: Type.FP16, torch.float32: Type.FP32}
_PANELS = {torch.bfloat16: Type.BF16_PANELS, torch.float16: Type.FP16_PANELS, torch.uint8: Type.LOW_BIT_PANELS}


class Matrix(ctypes.Structure):
    """`TardisMatrix` of interface.h: bf16, fp16, fp32 or low-bit, in panels, or as code rows."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("twice_zero", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )

    @classmethod
    def of(cls, matrix: Tensor | PackedMatrix | Panels | CodeRows | None) -> Matrix:
        """Points to a matrix, whose tensors must stay alive and contiguous; raises TardisError as `check_matrix`."""
        if matrix is None:
            return cls()
        check_matrix(matrix)
        found = cls.without_pointers(matrix)
        if isinstance(matrix, Tensor):
            found.data = matrix.data_ptr()
        else:
            found.data = (matrix.planes if isinstance(matrix, PackedMatrix) else matrix.data).data_ptr()
            found.scale = None if matrix.scale is None else matrix.scale.data_ptr()
        return found

    @classmethod
    def without_pointers(cls, matrix: Tensor | PackedMatrix | Panels | CodeRows) -> Matrix:
        """The sizes and the type of a matrix, whose tensors may lie in any way."""
        if isinstance(matrix, Tensor):
            rows, columns = matrix.shape
            return cls(None, None, rows, columns, columns, _DENSE.get(matrix.dtype, Type.NONE), 0)
        if isinstance(matrix, Panels):
            kind, zero = _PANELS[matrix.data.dtype], 2**matrix.bits - 1
            return cls(None, None, matrix.rows, matrix.columns, matrix.group_size, kind, matrix.bits, zero)
        (rows, columns), bits, size, has_zero = kind_of(matrix)
        lies = Type.LOW_BIT if isinstance(matrix, PackedMatrix) else Type.CODE_ROWS
        return cls(None, None, rows, columns, size, lies, bits, round(2 * midpoint(bits, has_zero)))


class Vector(ctypes.Structure):
    """`TardisVector` of interface.h: bf16, fp16 or fp32, or none."""

    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("unused", ctypes.c_int32))

    @classmethod
    def of(cls, vector: Tensor | None, size: int) -> Vector:
        """Points to a vector of so many numbers, which must stay alive; raises TardisError as `check_tensor`."""
        if vector is None:
            return cls()
        check_tensor("a vector", vector, _DENSE, (size,))
        return cls(vector.data_ptr(), _DENSE[vector.dtype], 0)


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
        return cls(x.data_ptr(), y.data_ptr(), len(x), _DENSE[x.dtype], activation_bits, threads, 0)


class Activation(ctypes.Structure):
    """`TardisActivation` of interface.h."""

    _fields_ = (("kind", ctypes.c_int32), *((name, ctypes.c_float) for name in ("alpha_p", "alpha_n", "beta", "eps")))

    @classmethod
    def of(cls, name: str) -> Activation:
        """The activation of a name; raises TardisError for one that the kernels do not have."""
        if kind(name) not in KINDS:
            raise TardisError(f"the activation {name!r} is none of {', '.join(KINDS)}.")
        return cls(KINDS.index(kind(name)), *parameters(name))


class FFN(ctypes.Structure):
    """`TardisFFN` of interface.h."""

    _fields_ = (
        *((name, Matrix) for name in ("fold", "predictor", "up", "down", "kept_up", "kept_down")),
        *((name, Vector) for name in ("bias", "b1", "low", "high", "slope", "offset", "kept_bias")),
        ("activation", Activation),
        ("k", ctypes.c_int32),
        ("activation_bits", ctypes.c_int32),
    )


class Head(ctypes.Structure):
    """`TardisHead` of interface.h: the linear layer that gives logits, by predictor and remainder."""

    _fields_ = (("predictor", Matrix), ("remainder", Matrix), ("bias", Vector), ("top", ctypes.c_int64))

    @classmethod
    def of(cls, predictor: PackedMatrix | Panels, remainder: PackedMatrix, bias: Tensor | None, top: int) -> Head:
        """Points to both matrices and the bias, which must stay alive; raises TardisError as `check_matrix`."""
        return cls(Matrix.of(predictor), Matrix.of(remainder), Vector.of(bias, len(remainder.planes)), top)


class Rounding(ctypes.Structure):
    """`TardisRounding` of interface.h: columns that are rounded one after the other."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("target", "base", "scale", "factor", "change")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_float) for name in ("top", "zero")),
    )

    @classmethod
    def of(
        cls, target: Tensor, base: Tensor | None, scale: Tensor, factor: Tensor, change: Tensor, top: int, zero: float
    ) -> Rounding:
        """Points to tensors [columns, rows], and the factor, which must stay alive; TardisError as `check_tensor`."""
        columns, rows = target.shape
        for name, tensor in (("target", target), ("base", base), ("scale", scale), ("change", change)):
            if tensor is not None:
                check_tensor(name, tensor, (torch.float32,), (columns, rows))
        check_tensor("factor", factor, (torch.float32,), (columns, columns))
        places = (None if tensor is None else tensor.data_ptr() for tensor in (target, base, scale, factor, change))
        return cls(*places, rows, columns, top, zero)


class Rows(ctypes.Structure):
    """`TardisRows` of interface.h: a row for each token."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64))

    @classmethod
    def of(cls, rows: Tensor) -> Rows:
        """Points to rows [tokens, width], which must stay alive; the numbers of each are consecutive."""
        if rows.dim() != 2 or rows.stride(1) != 1 or rows.dtype not in _DENSE:
            raise TardisError(
                f"rows are {rows.dtype} {list(rows.shape)}; wanted are consecutive numbers of each token."
            )
        return cls(rows.data_ptr(), rows.stride(0))


class Norm(ctypes.Structure):
    """`TardisNorm` of interface.h."""

    _fields_ = (
        ("factor", Vector),
        ("bias", Vector),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("centred", "rounded_first", "vectors")),
    )


class Product(ctypes.Structure):
    """`TardisProduct` of interface.h."""

    _fields_ = (("weight", Matrix), ("bias", Vector), ("y", ctypes.c_void_p))


class Turn(ctypes.Structure):
    """`TardisTurn` of interface.h."""

    _fields_ = (
        ("cosine", Vector),
        ("sine", Vector),
        *((name, ctypes.c_int64) for name in ("heads", "size", "turned")),
    )


class Attention(ctypes.Structure):
    """`TardisAttention` of interface.h."""

    _fields_ = (
        ("key", Rows),
        ("value", Rows),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("capacity", "heads", "groups", "size", "window")),
        ("scale", ctypes.c_float),
        ("unused", ctypes.c_int32),
    )


class Operation(ctypes.Structure):
    """`TardisOperation` of interface.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("of", ctypes.c_void_p),
        *((name, Rows) for name in ("x", "other", "y")),
        ("width", ctypes.c_int64),
    )


#: what `TardisOperationKind` of interface.h counts
OPERATIONS = ("norm", "products", "turn", "attend", "add", "gate", "folded", "head")
STRUCTURES = (Matrix, Vector, Batch, Activation, FFN, Head, Rounding, Rows, Norm, Product, Turn, Attention, Operation)
