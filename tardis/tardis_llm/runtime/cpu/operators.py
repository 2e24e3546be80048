"""The kernels' linear layers as torch operators, with shapes for tracing, so that `torch.compile` can use them.

    tardis::linear          y = x W^T + b for up to 64 tokens in bf16, fp16 or fp32, all in one dtype
    tardis::gemm            for any number of tokens in bf16 or fp16, where W may lie as its transpose
    tardis::panels_linear   for any number of tokens in bf16 or fp16, where W is in panels
    tardis::lowbit_linear   for up to 64 tokens, where W is in few bits

All take contiguous inputs x [tokens, in].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import TardisError
from ...ffn.packed import PackedMatrix
from ...ffn.weights import Matrix as AnyMatrix
from ..operators import library
from .library import MAX_TOKENS, has_gemm, loaded
from .operands import check_matrix
from .panels import ROWS, TOGETHER, Panels
from .structures import Batch, Matrix, Vector

#: dtypes of the inputs, and so of the models
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: of inputs where they meet low-bit weights: the rounding is far below that of the weights
ACTIVATION_BITS = 8

library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
library.define("gemm(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor")
library.define("panels_linear(Tensor x, Tensor panels, Tensor? bias, int outputs) -> Tensor")
library.define(
    "lowbit_linear(Tensor x, Tensor planes, Tensor scale, int group_size, Tensor? bias, "
    f"int activation_bits={ACTIVATION_BITS}) -> Tensor"
)


def by_row(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` multiplies inputs x [..., in], which are in main memory, with a weight [out, in]."""
    few = x.numel() // x.shape[-1] <= MAX_TOKENS
    return few and x.dtype == weight.dtype and weight.is_cpu and weight.is_contiguous()


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether `gemm` multiplies inputs x [..., in] with a weight [out, in], or with the transpose that it is."""
    alike = x.dtype == weight.dtype and x.is_cpu and weight.is_cpu
    lies = weight.dim() == 2 and (weight.is_contiguous() or weight.T.is_contiguous())
    return alike and lies and _in_halves(x.dtype, weight.shape[-1]) and x.numel() > 0 and has_gemm()


def _in_halves(dtype: torch.dtype, inputs: int) -> bool:
    """Whether products of any number of tokens exist for a dtype and so many inputs: in bf16 these come in pairs."""
    return dtype in TOGETHER and inputs % TOGETHER[dtype] == 0


def readable(matrix: AnyMatrix | None, dtype: torch.dtype) -> bool:
    """Whether the kernels read a matrix as it lies, for inputs of a dtype."""
    if matrix is None:
        return True
    if isinstance(matrix, Panels):
        return matrix.scale is not None or matrix.data.dtype == dtype
    if isinstance(matrix, Tensor):
        return matrix.dtype == dtype and matrix.is_contiguous() and matrix.is_cpu
    assert isinstance(matrix, PackedMatrix), "there is no other order of memory on a CPU"
    return all(part.is_contiguous() and part.is_cpu for part in (matrix.planes, matrix.scale))


def vector(values: Tensor | None, size: int) -> Vector:
    """A vector for the kernels, which cannot tell how long it is.

    Raises:
        TardisError: it has another size, or the kernels cannot read it.
    """
    if values is not None and values.shape != (size,):
        raise TardisError(f"a vector of {size} numbers is wanted, and one of shape {list(values.shape)} was given.")
    _check_alike(values)
    return Vector.of(values)


def check_inputs(x: Tensor, width: int) -> None:
    """Raise TardisError unless inputs x are [tokens, width], contiguous in main memory, in a dtype of the kernels."""
    _check_alike(x)
    if x.dtype not in DTYPES or x.dim() != 2 or x.shape[1] != width:
        raise TardisError(
            f"x is {x.dtype} {list(x.shape)}, and the CPU kernels want [tokens, {width}] in bf16, fp16 or fp32."
        )


def _check_few(x: Tensor, width: int) -> None:
    check_inputs(x, width)
    if len(x) > MAX_TOKENS:
        raise TardisError(f"x has {len(x)} tokens, and this kernel takes {MAX_TOKENS} at most.")


def _check_alike(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.is_contiguous()):
            raise TardisError("the CPU kernels take contiguous tensors in main memory; call .contiguous() first.")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[tokens, out] in the dtype of x [tokens, in], for a weight [out, in] in the same dtype."""
    _check_alike(weight)
    check_matrix(weight)
    _check_few(x, weight.shape[1])
    y = x.new_empty(len(x), len(weight))
    if len(x):
        loaded().linear(Matrix.of(weight), vector(bias, len(weight)), Batch.of(x, y, 16))
    return y


def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x [tokens, in], weight [out, in], or [in, out] if it is `transposed`: [tokens, out], all in bf16 or fp16."""
    _check_alike(x, weight)
    check_matrix(weight)
    inputs, outputs = weight.shape if transposed else weight.T.shape
    if x.dim() != 2 or x.shape[1] != inputs or x.dtype != weight.dtype or not _in_halves(x.dtype, inputs):
        raise TardisError(f"x is {x.dtype} {list(x.shape)}; [tokens, {inputs}] in bf16 (if even) or fp16 is wanted.")
    y = x.new_empty(len(x), outputs)
    if len(x):
        loaded().gemm(Matrix.of(weight), transposed, vector(bias, outputs), Batch.of(x, y, 16))
    return y


def _panels_linear(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x [tokens, in] and the `data` of `Panels` [outputs, in]: [tokens, outputs], all in bf16 or fp16."""
    _check_alike(x, panels)
    together = TOGETHER.get(panels.dtype, 1)
    shape = (-(-outputs // ROWS), x.shape[-1] // together, ROWS, together)
    if x.dim() != 2 or panels.shape != shape or x.dtype != panels.dtype or not _in_halves(x.dtype, x.shape[1]):
        raise TardisError(
            f"x {list(x.shape)} in {x.dtype} does not fit panels {list(panels.shape)} of {outputs} outputs in "
            f"{panels.dtype}."
        )
    y = x.new_empty(len(x), outputs)
    if len(x):
        matrix = Matrix.of(Panels(panels, None, outputs, x.shape[1], 16, x.shape[1]))
        loaded().gemm(matrix, False, vector(bias, outputs), Batch.of(x, y, 16))
    return y


def _lowbit_linear(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    activation_bits: int = ACTIVATION_BITS,
) -> Tensor:
    """x [tokens, in] and a `PackedMatrix` [out, in]: [tokens, out] in the dtype of x."""
    _check_alike(planes, scale)
    _check_few(x, x.shape[-1])
    y = x.new_empty(len(x), len(planes))
    if len(x):
        matrix = Matrix.of(PackedMatrix(planes, scale, x.shape[1], group_size))
        loaded().linear(matrix, vector(bias, len(planes)), Batch.of(x, y, activation_bits))
    return y


library.impl("linear", _linear, "CPU")
library.impl("gemm", _gemm, "CPU")
library.impl("panels_linear", _panels_linear, "CPU")
library.impl("lowbit_linear", _lowbit_linear, "CPU")


@torch.library.register_fake("tardis::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("tardis::gemm")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 0])


@torch.library.register_fake("tardis::panels_linear")
def _(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


@torch.library.register_fake("tardis::lowbit_linear")
def _(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    group_size: int,
    bias: Tensor | None,
    activation_bits: int = ACTIVATION_BITS,
) -> Tensor:
    return x.new_empty(x.shape[0], planes.shape[0])
