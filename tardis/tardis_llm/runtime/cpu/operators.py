"""The kernels' linear layers as one torch operator, with shapes for tracing, so that `torch.compile` can use them.

`tardis::linear` is y = x W^T + bias for contiguous inputs x [tokens, in] and W in the order of memory that its tensors
have:

    dense       data [out, in] in the dtype of x; more than 64 tokens in bf16 or fp16 only
    transposed  data [in, out] in bf16 or fp16
    few bits    data the planes of a `PackedMatrix`, with its scales and group size
    panels      data of `Panels`, with scales if it is of codes, and its group size, outputs and bits
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import TardisError
from ...ffn.packed import PackedMatrix
from ...ffn.weights import Matrix as AnyMatrix
from ..operators import library
from .code_rows import CodeRows
from .library import MAX_TOKENS, has_gemm, has_low_bit_gemm, loaded
from .panels import TOGETHER, Panels
from .structures import Batch, Matrix, Vector

#: dtypes of the inputs, and so of the models
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: of inputs where they meet low-bit weights: with 16 a model in int4 lost 0.0012 to 0.0021 nats less, and took longer
ACTIVATION_BITS = 8

#: tokens up to which codes in panels are met by integers: more are faster in bf16, by which all codes are written out
_FEW = 16

library.define(
    "linear(Tensor x, Tensor data, Tensor? bias, Tensor? scale=None, int group_size=0, *, int outputs=0, int bits=0, "
    f"bool transposed=False, int activation_bits={ACTIVATION_BITS}) -> Tensor"
)


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether the operator multiplies inputs x [..., in], in main memory, with a dense weight [out, in] as it lies."""
    if x.dtype != weight.dtype or not weight.is_cpu:
        return False
    if weight.is_contiguous() and x.numel() // x.shape[-1] <= MAX_TOKENS:
        return True
    lies = weight.dim() == 2 and (weight.is_contiguous() or weight.T.is_contiguous())
    return lies and x.dtype in TOGETHER and x.shape[-1] % TOGETHER[x.dtype] == 0 and has_gemm()


def readable(matrix: AnyMatrix | None, dtype: torch.dtype) -> bool:
    """Whether the kernels read a matrix as it lies, for inputs of a dtype."""
    if matrix is None:
        return True
    if isinstance(matrix, CodeRows):
        return True
    if isinstance(matrix, Panels):
        return matrix.scale is not None or matrix.data.dtype == dtype
    if isinstance(matrix, Tensor):
        return matrix.dtype == dtype and matrix.is_contiguous() and matrix.is_cpu
    assert isinstance(matrix, PackedMatrix), "there is no other order of memory on a CPU"
    return all(part.is_contiguous() and part.is_cpu for part in (matrix.planes, matrix.scale))


def check_inputs(x: Tensor, width: int) -> None:
    """Raise TardisError unless inputs x are [tokens, width], contiguous in main memory, in a dtype of the kernels."""
    if not (x.is_cpu and x.is_contiguous()):
        raise TardisError("the CPU kernels take contiguous tensors in main memory; call .contiguous() first.")
    if x.dtype not in DTYPES or x.dim() != 2 or x.shape[1] != width:
        raise TardisError(
            f"x is {x.dtype} {list(x.shape)}, and the CPU kernels want [tokens, {width}] in bf16, fp16 or fp32."
        )


def batches(x: Tensor, y: Tensor, activation_bits: int) -> Iterator[Batch]:
    """Inputs x [tokens, d] and outputs y in parts of as many tokens as the kernels take at once."""
    few = len(x) <= MAX_TOKENS
    for some, out in [(x, y)] if few else zip(x.split(MAX_TOKENS), y.split(MAX_TOKENS), strict=True):
        if len(some):
            yield Batch.of(some, out, activation_bits)


def _linear(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    scale: Tensor | None = None,
    group_size: int = 0,
    *,
    outputs: int = 0,
    bits: int = 0,
    transposed: bool = False,
    activation_bits: int = ACTIVATION_BITS,
) -> Tensor:
    """[tokens, out] in the dtype of x; raises TardisError for tensors that do not fit together, or lie otherwise."""
    matrix: Tensor | PackedMatrix | Panels = data
    if data.dim() == 4:
        matrix = Panels(data, scale, outputs, x.shape[-1], bits, group_size)
    elif scale is not None:
        matrix = PackedMatrix(data, scale, x.shape[-1], group_size)
    weight = Matrix.of(matrix)
    width, rows = (weight.rows, weight.columns) if transposed else (weight.columns, weight.rows)
    check_inputs(x, width)
    vector, y = Vector.of(bias, rows), x.new_empty(len(x), rows)
    if scale is not None:
        at_once = data.dim() == 4 and len(x) > _FEW and x.dtype == torch.bfloat16 and has_low_bit_gemm()
    else:
        at_once = data.dim() == 4 or transposed or len(x) > MAX_TOKENS
    if not at_once:
        for batch in batches(x, y, activation_bits):
            loaded().linear(weight, vector, batch)
    elif len(x):
        loaded().gemm(weight, transposed, vector, Batch.of(x, y, activation_bits))
    return y


library.impl("linear", _linear, "CPU")


@torch.library.register_fake("tardis::linear")
def _(x: Tensor, data: Tensor, *_: Any, outputs: int = 0, transposed: bool = False, **__: Any) -> Tensor:
    return x.new_empty(x.shape[0], outputs or data.shape[1 if transposed else 0])
