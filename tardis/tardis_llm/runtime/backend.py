"""The backends that compute linear layers and folded FFNs, and the only place that chooses among them.

A backend is an object of the class `Backend` below. `BACKENDS` lists them, the preferred first; the last one, the
reference, computes everything everywhere and is what all others are tested against. A new backend is a folder beside
this file and an entry in that list.

The environment variable `TARDIS_KERNELS` restricts the choice: with `off` only the reference is chosen, and the name of
an instruction set, such as `avx2`, is for the backend that knows it.
"""

from __future__ import annotations

import functools
import os
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidInputError
from ..ffn.neuron import value
from ..ffn.packed import PackedMatrix
from ..ffn.weights import DenseFFN, FoldedWeights, Layout, Matrix
from ..folding import columns
from .cpu.backend import CpuBackend
from .cpu.library import open_library
from .cpu.operands import HEAD_ROWS
from .cpu.structures import Rounding
from .reference import ReferenceBackend
from .triton.backend import TritonBackend

_VARIABLE = "TARDIS_KERNELS"


class PreparedFFN(Protocol):
    """A folded FFN that is ready to run. It changes as little as the weights that it was made from."""

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [tokens, d] for inputs x [tokens, d], contiguous, in the dtype of x."""

    def quick_exact(self, x: Tensor) -> bool:
        """Whether many tokens like x go through `exact` faster than through the fold."""

    def exact(self, x: Tensor, b2: Tensor | None) -> Tensor:
        """Outputs [tokens, d] with every neuron computed by the weights that fixing reads, and b2 [d] added."""

    def fixed(self, x: Tensor) -> Tensor:
        """[tokens, h] bool: the neurons that are fixed for inputs x [tokens, d], contiguous."""


class Backend(Protocol):
    """What a backend can do.

    Attributes:
        name: for people and tests.
        dtypes: of the inputs that it is made for.
        instruction_sets: values of `TARDIS_KERNELS` that it knows.
        reads_stored: whether it computes with matrices in few bits as they are stored; else they are laid out first.
    """

    reads_stored: bool
    name: str
    dtypes: tuple[torch.dtype, ...]
    instruction_sets: tuple[str, ...]

    def use(self, instruction_set: str) -> None:
        """Use one of its instruction sets, and no other, from now on; see the errors of the backend."""

    def accepts(self, x: Tensor) -> bool:
        """Whether it is there and computes with inputs like x [..., d]: on their device, in their dtype."""

    def lay_out(self, matrix: Tensor | PackedMatrix, dtype: torch.dtype, by_rows: bool = False) -> Layout | None:
        """A copy of a matrix [out, in] in the order of memory in which products with inputs of a dtype are fastest.

        None where it has no other order than the stored one for this matrix, or for one that is read `by_rows`, some
        here and there, as by fixing.
        """

    def prepare(self, weights: FoldedWeights, dtype: torch.dtype) -> PreparedFFN | None:
        """A folded FFN made ready for inputs of a dtype.

        None where it cannot read the weights as they lie, or has no kernel for neurons that are kept.
        """

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor | None:
        """x W^T + bias, [..., out] in the dtype of x [..., in]; None where it cannot multiply with this matrix."""

    def head(self, x: Tensor, predictor: Matrix, remainder: Matrix, bias: Tensor | None, top: int) -> Tensor | None:
        """Logits [..., out] as `predicted_head` has them; None where it has no kernel for them."""


REFERENCE = ReferenceBackend()
BACKENDS: tuple[Backend, ...] = (CpuBackend(), TritonBackend(), REFERENCE)


@torch.compiler.assume_constant_result
def _kernels_wanted() -> bool:
    """Whether any backend but the reference may run. It does not change while the program runs."""
    return _setting() != "off"


@functools.cache
def _setting() -> str:
    """`TARDIS_KERNELS`, passed on to the backend that it is for.

    Raises:
        InvalidInputError: `TARDIS_KERNELS` is not what it can be here.
    """
    wanted = os.environ.get(_VARIABLE, "").lower()
    known = [name for backend in BACKENDS for name in backend.instruction_sets]
    if wanted and wanted not in ("off", *known):
        raise InvalidInputError(f"{_VARIABLE}={wanted}: give off, {', '.join(known)}, or leave it unset.")
    for backend in BACKENDS:
        if wanted in backend.instruction_sets:
            backend.use(wanted)
    return wanted


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether gradients flow through one of these tensors: kernels have none, so the reference computes then."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def backend_for(x: Tensor, *weights: Tensor | None) -> Backend:
    """The backend that computes with inputs x [..., d] and these weights.

    Raises:
        InvalidInputError: `TARDIS_KERNELS` is not what it can be here.
    """
    if _kernels_wanted() and not differentiated(x, *weights):
        for backend in BACKENDS:
            if backend.accepts(x):
                return backend
    return REFERENCE


def prepare(weights: FoldedWeights, x: Tensor) -> PreparedFFN:
    """A folded FFN made ready for inputs like x [tokens, d], by the backend for x where it reads the weights."""
    prepared = backend_for(x).prepare(weights, x.dtype)
    return REFERENCE.prepare(weights, x.dtype) if prepared is None else prepared


def lay_out(matrix: Tensor | PackedMatrix, dtype: torch.dtype, by_rows: bool = False) -> Layout | None:
    """A copy of a matrix in the order of memory that its backend reads fastest; see `Backend.lay_out`."""
    for backend in BACKENDS if _kernels_wanted() else ():
        layout = backend.lay_out(matrix, dtype, by_rows)
        if layout is not None:
            return layout
    return None


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """x W^T + bias, [..., out] in the dtype of x.

    Args:
        x: [..., in].
        matrix: W [out, in]: dense (also as the transpose of a contiguous tensor), in few bits, or laid out.
        bias: [out] or None.
    """
    weight = matrix if isinstance(matrix, Tensor) else None
    y = backend_for(x, weight, bias).linear(x, matrix, bias)
    return REFERENCE.linear(x, matrix, bias) if y is None else y


def predicted_head(x: Tensor, predictor: Matrix, remainder: Matrix, bias: Tensor | None, top: int) -> Tensor:
    """Logits [..., out] in the dtype of x, of which the greatest are computed with the remainder, too.

    Args:
        x: [..., in].
        predictor: [out, in], by which all are computed.
        remainder: what it leaves of the weight.
        bias: [out] or None.
        top: the logits that are computed with both are no less than the `top`-th of the greatest of `HEAD_ROWS`
            consecutive ones.
    """
    y = backend_for(x, bias).head(x, predictor, remainder, bias, top)
    if y is not None:
        return y
    predicted = linear(x, predictor, bias)
    filled = F.pad(predicted, (0, -predicted.shape[-1] % HEAD_ROWS), value=-torch.inf)
    greatest = filled.unflatten(-1, (-1, HEAD_ROWS)).amax(-1)
    least = greatest.topk(min(top, greatest.shape[-1])).values[..., -1:]
    return torch.where(predicted >= least, predicted + linear(x, remainder, None), predicted)


def dense_ffn(x: Tensor, dense: DenseFFN) -> Tensor:
    """Outputs [..., d] of an FFN that is not folded, for inputs x [..., d] in the dtype of x."""
    return linear(value(linear(x, dense.w1, dense.b1), dense.act, dense.k), dense.w2, dense.b2)


def _round_columns(
    target: Tensor, base: Tensor | None, scale: Tensor, factor: Tensor, top: int, zero: float
) -> columns.Rounded:
    """`folding.columns.round_columns` in main memory: by the kernels where there are some."""
    library = open_library() if _kernels_wanted() else None
    if library is None:
        return columns.by_torch(target, base, scale, factor, top, zero)
    levels = target.clone(memory_format=torch.contiguous_format)
    change = torch.empty_like(levels)
    own = None if base is None else base.contiguous()
    operands = levels, own, scale.contiguous(), factor.contiguous(), change
    library.round_columns(Rounding.of(*operands, top, zero))
    return columns.Rounded(levels, change)


columns.library.impl("round_columns", _round_columns, "CPU")
