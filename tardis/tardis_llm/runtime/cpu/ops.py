"""The CPU kernels as torch operators, with shapes for tracing, so that `torch.compile` and others can use them.

    tardis::bf16_linear     y = x W^T + b
    tardis::gemm            the same for any number of tokens, all in bf16 or fp16, where W may lie as its transpose
    tardis::panels_linear   the same for any number of tokens, all in bf16 or fp16, where W is in panels
    tardis::lowbit_linear   the same with W in few bits
    tardis::fixed_neurons   which neurons the predictor finds out of their range
    tardis::folded_ffn      a whole folded FFN

The others take up to 64 tokens x [tokens, d] in bf16, fp16 or fp32, contiguous. `ffn.folded_ffn` specifies what they
compute; sums are in fp32 throughout, and where x meets a low-bit matrix it is rounded to 8 bits (or 16, where asked
for), with one scale per token and group of columns, 512 at most. So what a predictor finds differs from the reference
for few neurons that are next to a bound. One that only selects, beside dense fallback weights, never gets more than 8
bits. Residuals that meet a low-bit W2 may be rounded to 16 bits, with one scale for up to eight of them. What a token
gets does not depend on the others in its batch; in its last bits it may depend on the number of threads.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import TardisError
from ...ffn.activations import ACTIVATIONS
from ...ffn.packed import PackedMatrix
from ...ffn.weights import Fallback, FFNWeights, FoldedWeights
from .library import MAX_TOKENS, Kernels, available, can_be_in_panels, has_gemm, open_library
from .operands import check_matrix
from .panels import ROWS as PANEL_ROWS
from .panels import TOGETHER, Panels
from .structures import FFN, Batch, Matrix, Vector

#: dtypes of the inputs, and so of the models
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: of inputs where they meet low-bit weights: the rounding is far below that of the weights
ACTIVATION_BITS = 8
_ACTIVATIONS = list(ACTIVATIONS)

#: a matrix as the kernels take it, or none
Operand = Tensor | PackedMatrix | Panels | None

#: where the operators are defined
library = torch.library.Library("tardis", "DEF")
library.define("bf16_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
library.define("gemm(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor")
library.define("panels_linear(Tensor x, Tensor panels, Tensor? bias, int outputs) -> Tensor")
library.define(
    "lowbit_linear(Tensor x, Tensor planes, Tensor scale, int group_size, Tensor? bias, "
    f"int activation_bits={ACTIVATION_BITS}) -> Tensor"
)
library.define(
    "fixed_neurons(Tensor x, Tensor planes, Tensor scale, int group_size, Tensor? b1, Tensor low, Tensor high, "
    f"int activation_bits={ACTIVATION_BITS}) -> Tensor"
)
library.define(
    "folded_ffn(Tensor x, str activation, Tensor[] fold, Tensor? bias, Tensor[] predictor, Tensor[] ranges, "
    "Tensor? b1, Tensor[] up, Tensor[] down, int[] group_sizes, "
    f"int activation_bits={ACTIVATION_BITS}) -> Tensor"
)


def takes(x: Tensor) -> bool:
    """Whether the kernels are there and take inputs like x [..., d], `MAX_TOKENS` of them at a time."""
    return x.is_cpu and x.dtype in DTYPES and x.numel() > 0 and available()


def warn_of_dtype(x: Tensor, weights: torch.dtype) -> None:
    """Say once that folded FFNs are slow where the kernels do not take inputs x, on a CPU, for weights of a dtype."""
    if x.is_cpu and (x.dtype not in DTYPES or (x.dtype != weights and available())):
        _warn_while_traced(x.dtype, weights)


@torch.compiler.assume_constant_result
def _warn_while_traced(inputs: torch.dtype, weights: torch.dtype) -> None:
    _warn_once(inputs, weights)


@functools.cache
def _warn_once(inputs: torch.dtype, weights: torch.dtype) -> None:
    found = f"in {_name(inputs)}" if inputs == weights else f"in {_name(weights)} with inputs in {_name(inputs)}"
    remedy = "" if inputs == weights else ", and leave out torch.autocast"
    warnings.warn(
        f"folded FFNs {found} run through the reference, which is slow: the CPU kernels take weights and inputs of one "
        f'dtype, {", ".join(map(_name, DTYPES[:-1]))} or {_name(DTYPES[-1])}. Load the model with dtype="bfloat16", '
        f"or convert it by model.to(torch.bfloat16){remedy}.",
        RuntimeWarning,
        stacklevel=2,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether `gemm` takes inputs like x [..., in] and a weight [out, in] or its transpose as it lies in memory."""
    alike = x.dtype == weight.dtype and x.device.type == weight.device.type == "cpu"
    lies = weight.dim() == 2 and (weight.is_contiguous() or weight.T.is_contiguous())
    return alike and lies and _in_halves(x.dtype, weight.shape[-1]) and x.numel() > 0 and has_gemm()


def _in_halves(dtype: torch.dtype, inputs: int) -> bool:
    """Whether products of any number of tokens take numbers of 16 bits: in bf16, inputs come in pairs."""
    return dtype in TOGETHER and inputs % TOGETHER[dtype] == 0


def panels_of(matrix: Tensor | PackedMatrix, dtype: torch.dtype) -> Panels | None:
    """A matrix in panels, which is a copy; None where the kernels do not take it so.

    Args:
        matrix: [out, in].
        dtype: of the inputs that it meets.
    """
    device = (matrix if isinstance(matrix, Tensor) else matrix.planes).device
    return Panels.of(matrix) if device.type == "cpu" and dtype in DTYPES and can_be_in_panels(matrix) else None


def runs(x: Tensor, folded: FoldedWeights, dense: FFNWeights) -> bool:
    """Whether `folded_ffn` can stand for the reference: x is as they take it, and nothing needs gradients.

    Dense fallback weights must lie neuron by neuron: w1 contiguous, and w2 as the transpose of a contiguous tensor.
    """
    if not takes(x) or (torch.is_grad_enabled() and (x.requires_grad or dense.w1.requires_grad)):
        return False
    return _run_on(x, _matrices(folded.weight, folded.predictor, folded.fallback, dense))


def _run_on(x: Tensor, matrices: Sequence[Operand]) -> bool:
    """Whether the kernels take matrices for inputs like x, which they take."""
    if any(_dtype(matrix) not in (None, x.dtype) for matrix in matrices):
        return False
    parts = [tensor for matrix in matrices for tensor in _parts(matrix)]
    return all(tensor.is_contiguous() and tensor.device == x.device for tensor in parts)


def folded_ffn(
    x: Tensor,
    folded: FoldedWeights,
    dense: FFNWeights,
    activation: str,
    activation_bits: int = ACTIVATION_BITS,
) -> Tensor:
    """`ffn.folded_ffn` by the kernels, where it `runs`, for any number of tokens.

    Args:
        x: [tokens, d].
        folded: as stored.
        dense: as for the reference; w1 and w2 are not read where `folded` has low-bit weights in their place.
        activation: a name in `ACTIVATIONS`.
        activation_bits: 8 or 16.
    """
    matrices = _matrices(folded.weight, folded.predictor, folded.fallback, dense)
    fold, predictor, up, down = map(_parts, matrices)
    sizes = [matrix.group_size if isinstance(matrix, PackedMatrix) else 0 for matrix in matrices]
    ranges = [folded.low, folded.high, folded.slope, folded.offset]
    weights = fold, folded.bias, predictor, ranges, dense.b1, up, down, sizes
    parts = [
        torch.ops.tardis.folded_ffn(some.contiguous(), activation, *weights, activation_bits)
        for some in x.split(MAX_TOKENS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Laid(NamedTuple):
    """`FoldedWeights` as they lie, fold and predictor in panels or not; the ranges are low, high, slope, offset."""

    weight: Tensor | PackedMatrix | Panels
    bias: Tensor
    predictor: Tensor | PackedMatrix | Panels
    ranges: tuple[Tensor, Tensor, Tensor, Tensor]
    fallback: Fallback | None


class PreparedFFN:
    """A folded FFN for the kernels, its arguments put together once: for what calls it again and again.

    Args:
        activation: a name in `ACTIVATIONS`.
        matrices: fold (None where something else adds it) and predictor, in panels or not, and what fixing reads of W1
            and of W2 transposed, all of which must neither move nor change.
        bias: of the fold.
        b1, ranges: vectors of numbers per neuron; the ranges are low, high, slope, offset.
    """

    def __init__(
        self,
        activation: str,
        matrices: Sequence[Operand],
        bias: Tensor | None,
        b1: Tensor | None,
        ranges: Sequence[Tensor],
    ) -> None:
        self._kernels = _loaded()
        parts = [tensor for matrix in matrices for tensor in _parts(matrix)]
        self._tensors = [*parts, bias, b1, *ranges]  # which must stay alive
        _check_alike(*self._tensors)
        predictor = matrices[1]
        assert isinstance(predictor, PackedMatrix | Panels), "the predictor is in few bits"
        self._d = predictor.columns
        self._ffn = _ffn(activation, [Matrix.of(matrix) for matrix in matrices], self._d, bias, b1, ranges)

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, d] for x [tokens, d], which is contiguous."""
        if len(x) > MAX_TOKENS:
            return torch.cat([self(some) for some in x.split(MAX_TOKENS)])
        self._check(x)
        y = torch.empty_like(x)
        if len(x):
            self._kernels.folded_ffn(self._ffn, Batch.of(x, y, ACTIVATION_BITS))
        return y

    def fixed(self, x: Tensor) -> Tensor:
        """[tokens, h] bool: the neurons that are fixed for x [tokens, d], which is contiguous."""
        if len(x) > MAX_TOKENS:
            return torch.cat([self.fixed(some) for some in x.split(MAX_TOKENS)])
        self._check(x)
        y = torch.empty(len(x), self._ffn.predictor.rows, dtype=torch.bool)
        if len(x):
            self._kernels.fixed(self._ffn, Batch.of(x, y, ACTIVATION_BITS))
        return y

    def _check(self, x: Tensor) -> None:
        if not (_fits(x) and x.shape[1] == self._d):
            _check(x)
            raise TardisError(f"x {list(x.shape)} does not fit an FFN of width {self._d}.")


def prepared(x: Tensor, folded: Laid, dense: FFNWeights, activation: str) -> PreparedFFN | None:
    """A folded FFN with its arguments put together for inputs like x; None where the kernels do not take it.

    Args:
        x: [tokens, d].
        folded: as it lies.
        dense, activation: as for `folded_ffn`.
    """
    matrices = _matrices(folded.weight, folded.predictor, folded.fallback, dense)
    if not _run_on(x, matrices):
        return None
    return PreparedFFN(activation, matrices, folded.bias, dense.b1, folded.ranges)


def _matrices(
    fold: Tensor | PackedMatrix | Panels,
    predictor: Tensor | PackedMatrix | Panels,
    fallback: Fallback | None,
    dense: FFNWeights,
) -> list[Operand]:
    """The fold, the predictor, and what fixing reads of W1 and of W2 transposed."""
    fixing = (dense.w1, dense.w2.T) if fallback is None else (fallback.remainder, fallback.down)
    return [fold, predictor, *fixing]


def _dtype(matrix: Operand) -> torch.dtype | None:
    """The dtype that inputs of a matrix need to have; None where they may have any."""
    if isinstance(matrix, Panels):
        return matrix.data.dtype if matrix.scale is None else None
    return matrix.dtype if isinstance(matrix, Tensor) else None


def _parts(matrix: Operand) -> list[Tensor]:
    """The tensors of a matrix, as the operators take one that is not in panels."""
    if matrix is None:
        return []
    if isinstance(matrix, Panels):
        return [matrix.data] if matrix.scale is None else [matrix.data, matrix.scale]
    return [matrix] if isinstance(matrix, Tensor) else [matrix.planes, matrix.scale]


def _matrix(parts: Sequence[Tensor], columns: int, group_size: int) -> Matrix:
    """The inverse of `_parts`, for the kernels."""
    if len(parts) != 2:
        return Matrix.of(parts[0] if parts else None)
    planes, scale = parts
    return Matrix.of(PackedMatrix(planes, scale, columns, group_size))


def _vector(vector: Tensor | None, size: int) -> Vector:
    """For the kernels, which cannot tell how long it is."""
    if vector is not None and vector.shape != (size,):
        raise TardisError(f"a vector of {size} numbers is wanted, and one of shape {list(vector.shape)} was given.")
    return Vector.of(vector)


def _loaded() -> Kernels:
    library = open_library()
    if library is None:
        raise TardisError("the CPU kernels are not built; install a C++ compiler and reinstall tardis-llm.")
    return library


def _ffn(
    activation: str,
    matrices: Sequence[Matrix],
    d: int,
    bias: Tensor | None,
    b1: Tensor | None,
    ranges: Sequence[Tensor],
) -> FFN:
    """For the kernels: four matrices."""
    if activation not in _ACTIVATIONS:
        raise TardisError(f"the activation {activation!r} is none of {', '.join(_ACTIVATIONS)}.")
    vectors = [_vector(each, matrices[1].rows) for each in (b1, *ranges)]
    return FFN(*matrices, _vector(bias, d), *vectors, _ACTIVATIONS.index(activation))


def _fits(x: Tensor) -> bool:
    """Whether the kernels take x."""
    return x.dtype in DTYPES and x.dim() == 2 and len(x) <= MAX_TOKENS and x.is_cpu and x.is_contiguous()


def _check(x: Tensor, *tensors: Tensor | None) -> None:
    """Refuse what the kernels would misread."""
    _check_alike(x, *tensors)
    if not _fits(x):
        wanted = f"[tokens, d] in bf16, fp16 or fp32 with at most {MAX_TOKENS} tokens"
        raise TardisError(f"x is {x.dtype} {list(x.shape)}, and the CPU kernels take {wanted}.")


def _check_alike(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.is_contiguous()):
            raise TardisError("the CPU kernels take contiguous tensors in main memory; call .contiguous() first.")


def _bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, in], weight [out, in] in its dtype (bf16, fp16 or fp32): [tokens, out] in the dtype of x."""
    _check(x, weight, bias)
    check_matrix(weight)
    if x.shape[1] != weight.shape[1]:
        raise TardisError(f"x {list(x.shape)} does not fit a weight {list(weight.shape)}.")
    y = x.new_empty(len(x), len(weight))
    if len(x):
        _loaded().linear(Matrix.of(weight), _vector(bias, len(weight)), Batch.of(x, y, 16))
    return y


def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x [tokens, in], weight [out, in], or [in, out] if it is `transposed`: [tokens, out], all in bf16 or fp16."""
    _check_alike(x, weight, bias)
    check_matrix(weight)
    inputs, outputs = weight.shape if transposed else weight.T.shape
    if x.dim() != 2 or x.shape[1] != inputs or x.dtype != weight.dtype or not _in_halves(x.dtype, inputs):
        raise TardisError(f"x is {x.dtype} {list(x.shape)}; [tokens, {inputs}] in bf16 (if even) or fp16 is wanted.")
    y = x.new_empty(len(x), outputs)
    if len(x):
        _loaded().gemm(Matrix.of(weight), transposed, _vector(bias, outputs), Batch.of(x, y, 16))
    return y


def _panels_linear(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x [tokens, in] and the `data` of `Panels` [outputs, in]: [tokens, outputs], all in bf16 or fp16."""
    _check_alike(x, panels, bias)
    together = TOGETHER.get(panels.dtype, 1)
    shape = (-(-outputs // PANEL_ROWS), x.shape[-1] // together, PANEL_ROWS, together)
    if x.dim() != 2 or panels.shape != shape or x.dtype != panels.dtype or not _in_halves(x.dtype, x.shape[1]):
        raise TardisError(
            f"x {list(x.shape)} in {x.dtype} does not fit panels {list(panels.shape)} of {outputs} outputs in "
            f"{panels.dtype}."
        )
    y = x.new_empty(len(x), outputs)
    if len(x):
        matrix = Matrix.of(Panels(panels, None, outputs, x.shape[1], 16, x.shape[1]))
        _loaded().gemm(matrix, False, _vector(bias, outputs), Batch.of(x, y, 16))
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
    _check(x, planes, scale, bias)
    y = x.new_empty(len(x), len(planes))
    if len(x):
        matrix = _matrix((planes, scale), x.shape[1], group_size)
        _loaded().linear(matrix, _vector(bias, len(planes)), Batch.of(x, y, activation_bits))
    return y


def _fixed_neurons(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    group_size: int,
    b1: Tensor | None,
    low: Tensor,
    high: Tensor,
    activation_bits: int = ACTIVATION_BITS,
) -> Tensor:
    """[tokens, h] bool; see `ffn.fixed_neurons`."""
    _check(x, planes, scale, b1, low, high)
    y = torch.empty(len(x), len(planes), dtype=torch.bool)
    if len(x):
        ffn = FFN(predictor=_matrix((planes, scale), x.shape[1], group_size))
        ffn.b1, ffn.low, ffn.high = (_vector(each, y.shape[1]) for each in (b1, low, high))
        _loaded().fixed(ffn, Batch.of(x, y, activation_bits))
    return y


def _folded_ffn(
    x: Tensor,
    activation: str,
    fold: Sequence[Tensor],
    bias: Tensor | None,
    predictor: Sequence[Tensor],
    ranges: Sequence[Tensor],
    b1: Tensor | None,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    group_sizes: Sequence[int],
    activation_bits: int = ACTIVATION_BITS,
) -> Tensor:
    """[tokens, d].

    Args:
        fold, predictor, up, down: [weight], or [planes, scale] of a low-bit one. `fold` is [] where something else
            adds it. `up` is W1, or what the predictor leaves of it, [] where that is nothing; `down` is W2 transposed.
        ranges: low, high, slope, offset.
        group_sizes: of the four matrices; those of dense ones are not read.
    """
    _check(x, *fold, bias, *predictor, *ranges, b1, *up, *down)
    y = torch.empty_like(x)
    if len(x):
        parts = (fold, predictor, up, down)
        matrices = [_matrix(each, x.shape[1], size) for each, size in zip(parts, group_sizes, strict=True)]
        ffn = _ffn(activation, matrices, x.shape[1], bias, b1, ranges)
        _loaded().folded_ffn(ffn, Batch.of(x, y, activation_bits))
    return y


library.impl("bf16_linear", _bf16_linear, "CPU")
library.impl("gemm", _gemm, "CPU")
library.impl("panels_linear", _panels_linear, "CPU")
library.impl("lowbit_linear", _lowbit_linear, "CPU")
library.impl("fixed_neurons", _fixed_neurons, "CPU")
library.impl("folded_ffn", _folded_ffn, "CPU")


@torch.library.register_fake("tardis::bf16_linear")
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


@torch.library.register_fake("tardis::fixed_neurons")
def _(x: Tensor, planes: Tensor, *others: object, **settings: object) -> Tensor:
    return x.new_empty(x.shape[0], planes.shape[0], dtype=torch.bool)


@torch.library.register_fake("tardis::folded_ffn")
def _(x: Tensor, *others: object, **settings: object) -> Tensor:
    return torch.empty_like(x)
