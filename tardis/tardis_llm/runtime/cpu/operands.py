"""What the kernels are handed is what they will read: types, sizes and alignment, checked where a pointer is taken.

The kernels get pointers and sizes that someone else states, and read, and write, beyond what a wrong one points to.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ...errors import TardisError
from ...ffn.packed import PackedMatrix
from .code_rows import CodeRows
from .panels import ROWS, TOGETHER, Panels, data_shape

#: of a code
MAX_BITS = 8
#: of a head whose greatest logit is looked at first
HEAD_ROWS = 32
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_matrix(matrix: Tensor | PackedMatrix | Panels | CodeRows) -> None:
    """Raise TardisError for a matrix whose tensors are not as its kind says."""
    if isinstance(matrix, Tensor):
        check_tensor("a matrix", matrix, _FLOATS)
        if matrix.dim() != 2:
            raise TardisError(f"a matrix has two dimensions, and one of shape {list(matrix.shape)} was given.")
    elif isinstance(matrix, Panels):
        _check_panels(matrix)
    elif isinstance(matrix, CodeRows):
        _check_code_rows(matrix)
    else:
        _check_packed(matrix)


def check_tensor(what: str, tensor: Tensor, dtypes: Collection[torch.dtype], shape: tuple[int, ...] = ()) -> None:
    """Raise TardisError unless a tensor is as `check_kind` wants it, in main memory, dense and aligned."""
    check_kind(what, tensor, dtypes, shape)
    if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.data_ptr() % tensor.element_size():
        raise TardisError(f"{what} is not contiguous and aligned in main memory, as the CPU kernels read it; clone it.")


def check_kind(what: str, tensor: Tensor, dtypes: Collection[torch.dtype], shape: tuple[int, ...] = ()) -> None:
    """Raise TardisError unless a tensor has one of these dtypes and this shape.

    Args:
        what: it is, for the message.
        tensor: to check.
        dtypes: that it may have.
        shape: that it must have; () for any.
    """
    if tensor.dtype not in dtypes or (shape and tuple(tensor.shape) != shape):
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TardisError(
            f"{what} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, and {wanted} "
            f"{list(shape) or 'of any shape'} is wanted; load the model anew from a sound checkpoint."
        )


def _check_packed(matrix: PackedMatrix) -> None:
    rows, columns, size = len(matrix.planes), matrix.columns, matrix.group_size
    bits = matrix.bits if matrix.planes.dim() == 3 else 0
    if not 1 <= bits <= MAX_BITS or columns < 1 or size < 1:
        planes, scales = list(matrix.planes.shape), list(matrix.scale.shape)
        raise TardisError(f"planes {planes} and scales {scales} do not fit {columns} columns in groups of {size}.")
    check_tensor("planes", matrix.planes, (torch.uint8,), (rows, bits, -(-columns // 8)))
    check_tensor("scales", matrix.scale, (torch.float16,), (rows, -(-columns // size)))


def _check_code_rows(matrix: CodeRows) -> None:
    rows, columns, bits, size = len(matrix.data), matrix.columns, matrix.bits, matrix.group_size
    if bits not in (4, 8) or columns % 64 or size < 1:
        raise TardisError(f"code rows cannot have {columns} columns of {bits} bits in groups of {size}.")
    check_tensor("code rows", matrix.data, (torch.int16,), (rows, columns * bits // 16))
    check_tensor("scales", matrix.scale, (torch.float16,), (rows, -(-columns // size)))


def _check_panels(matrix: Panels) -> None:
    dense, size, bits = matrix.scale is None, matrix.group_size, matrix.bits
    if not dense and not (1 <= bits <= MAX_BITS and size >= 1):
        raise TardisError(f"panels cannot have {bits} bits in groups of {size}.")
    dtypes = TOGETHER if dense else (torch.uint8,)
    shape = data_shape(matrix.rows, matrix.columns, bits, matrix.data.dtype)
    check_tensor("panels", matrix.data, dtypes, shape)
    if matrix.scale is not None:
        check_tensor("scales", matrix.scale, (torch.float16,), (len(matrix.data), -(-matrix.columns // size), ROWS))
