"""The GPU backend: folded FFNs and layers in few bits by Triton kernels, for bf16, fp16 and fp32.

Sums and predictions are in fp32. A few tokens go through five kernels, none of which waits for the host or for values;
what a neuron's line leaves is rounded to the dtype of x where it meets W2, as by the reference. More tokens find their
neurons by the same kernel, and are multiplied with all weights by torch.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import KernelsError
from ...ffn.packed import PackedMatrix
from ...ffn.weights import FoldedWeights, Layout, Matrix
from .codes import Codes

if TYPE_CHECKING:
    from .launch import Fixing, GPUMatrix

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _require() -> None:
    """Raise KernelsError without Triton."""
    if not available():
        raise KernelsError(
            "folded FFNs and layers in few bits need Triton on a GPU, and it is not installed. Install it with "
            "`pip install triton`, on Windows `pip install triton-windows`, or set TARDIS_KERNELS=off for the "
            "reference, which is slow."
        )


class TritonFFN:
    """A folded FFN by the kernels.

    Args:
        weights: whose tensors must neither move nor change, every matrix dense in the dtype of the inputs or `Codes`.
    """

    def __init__(self, weights: FoldedWeights) -> None:
        from .launch import Fixing

        assert weights.down is not None, "the dense weights are put beside first"
        self._weights, self._fold = weights, readable(weights.fold)
        predictor, up, down = map(readable, (weights.predictor, weights.up, weights.down))
        assert isinstance(predictor, Codes) and down is not None, "the predictor is in few bits"
        self._fixing: Fixing = Fixing(predictor, up, down, weights.b1, weights.neurons, weights.stacked)

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [tokens, d] for inputs x [tokens, d], contiguous."""
        from .launch import MAX_TOKENS, multiply

        if not 0 < len(x) <= MAX_TOKENS:
            return self._many(x)
        launches, parts = self._fixing.launches(x)
        y = x.new_empty(len(x), parts.shape[2])
        for launch in (*launches, multiply(x, self._fold, self._weights.bias, y, parts)):
            launch.run()
        return y

    def quick_exact(self, x: Tensor) -> bool:
        """Whether many tokens like x go through `exact` faster: yes, the fold would be one product more."""
        return True

    def exact(self, x: Tensor, b2: Tensor | None) -> Tensor:
        """Outputs [tokens, d] with every neuron computed, and b2 [d] added, for inputs x [tokens, d]."""
        hidden = self._weights.neurons.value(self._pre_activations(x).float())
        return F.linear(hidden.to(x.dtype), self._down(x).T, b2)

    def fixed(self, x: Tensor) -> Tensor:
        """[tokens, h] bool: the neurons that are fixed for inputs x [tokens, d], contiguous."""
        found = torch.empty(len(x), self._weights.neurons.count, dtype=torch.int8, device=x.device)
        self._fixing.predict(x, found, None, None).run()
        return found.bool()

    def _many(self, x: Tensor) -> Tensor:
        """Outputs [tokens, d] for more inputs than the kernels take: every neuron is computed, and only some count."""
        residual = self._weights.neurons.residual(self._pre_activations(x).float())
        residual = torch.where(self.fixed(x), residual, 0.0).to(x.dtype)
        correction = F.linear(residual, self._down(x).T)
        if self._fold is None:
            return correction
        return correction + product(x, self._fold, self._weights.bias)

    def _pre_activations(self, x: Tensor) -> Tensor:
        """[tokens, k h] by what fixing reads of W1."""
        if not self._weights.stacked:
            return product(x, self._fixing.up, self._weights.b1)
        v = product(x, self._fixing.predictor, self._weights.b1)
        return v if self._fixing.up is None else v + product(x, self._fixing.up, None)

    def _down(self, x: Tensor) -> Tensor:
        """[h, d] what fixing reads of W2, as numbers in the dtype of x."""
        return numbers(self._fixing.down, x.dtype)


def readable(matrix: Matrix | None) -> GPUMatrix | None:
    """A matrix as the kernels read it: codes in their order of memory, which are made where they are not there yet."""
    return Codes.of(matrix) if isinstance(matrix, PackedMatrix) else matrix  # type: ignore[return-value]


def numbers(matrix: GPUMatrix, dtype: torch.dtype) -> Tensor:
    """[rows, columns] the numbers of a matrix."""
    from .launch import write_out

    if isinstance(matrix, Tensor):
        return matrix
    written = torch.empty(len(matrix.data), matrix.columns, dtype=dtype, device=matrix.data.device)
    write_out(matrix, written).run()
    return written


def product(x: Tensor, matrix: GPUMatrix | None, bias: Tensor | None) -> Tensor:
    """x W^T + bias, [tokens, out] for x [tokens, in]: by the kernel for few tokens, and else by torch."""
    from .launch import MAX_TOKENS, multiply, rows_of

    assert matrix is not None, "there is a matrix to multiply with"
    if isinstance(matrix, Tensor) or len(x) > MAX_TOKENS:
        return F.linear(x, numbers(matrix, x.dtype), bias)
    y = x.new_empty(len(x), rows_of(matrix))
    multiply(x, matrix, bias, y).run()
    return y


class TritonBackend:
    """The kernels, for tensors on GPUs."""

    name = "triton"
    reads_stored = False
    dtypes: tuple[torch.dtype, ...] = DTYPES
    instruction_sets: tuple[str, ...] = ()

    def use(self, instruction_set: str) -> None:
        """There is nothing to choose."""

    def accepts(self, x: Tensor) -> bool:
        """Whether x has some numbers in bf16, fp16 or fp32 on a GPU.

        Raises:
            KernelsError: it has, and Triton is not installed.
        """
        if not (x.is_cuda and x.dtype in DTYPES and x.numel() > 0):
            return False
        _require()
        return True

    def lay_out(self, matrix: Tensor | PackedMatrix, dtype: torch.dtype, by_rows: bool = False) -> Layout | None:
        """A copy of a matrix in few bits as `Codes`, if it is on a GPU."""
        return Codes.of(matrix) if isinstance(matrix, PackedMatrix) and matrix.planes.is_cuda else None

    def prepare(self, weights: FoldedWeights, dtype: torch.dtype) -> TritonFFN | None:
        """A folded FFN for the kernels, if it keeps no neurons and dense matrices are contiguous in this dtype."""
        if weights.kept:
            return None
        dense = [part for part in (weights.fold, weights.up, weights.down) if isinstance(part, Tensor)]
        if not all(part.is_contiguous() and part.dtype == dtype for part in dense):
            return None
        down = readable(weights.down)
        if isinstance(down, Codes) and down.bits not in (1, 2, 4, 8):  # a row's codes of a column lie in one byte
            return None
        return TritonFFN(replace(weights, down=down))

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor | None:
        """x W^T + bias, by torch for a dense matrix."""
        if isinstance(matrix, Tensor):
            return F.linear(x, matrix, bias)
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        return product(tokens, readable(matrix), bias).view(*x.shape[:-1], -1)

    def head(self, x: Tensor, predictor: Matrix, remainder: Matrix, bias: Tensor | None, top: int) -> None:
        """Logits by two products: there is no kernel of its own for them."""
