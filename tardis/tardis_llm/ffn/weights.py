"""What an FFN is: its dense weights, and what a folded one reads in their place.

dense     y = value(x W1^T + b1) W2^T + b2
folded    y = x C^T + c + sum over fixed neurons i of residual_i W2[:, i]
                        + sum over kept neurons i of value_i W2[:, i]

A fold is *dynamic*, and fixes the neurons that a predictor finds for each token; *static*, and keeps some neurons: it
computes them for every token, and predicts none; or *mixed*: it keeps some, and predicts all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activation
from .neuron import Neurons
from .packed import PackedMatrix

#: tells matrices that can stand for each other: shape and dtype, or shape, bits and group size
Kind = tuple[Any, ...]


class Layout(Protocol):
    """A matrix in an order of memory that a backend reads fastest."""

    @property
    def data(self) -> Tensor:
        """What holds its numbers."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

    @property
    def kind(self) -> Kind:
        """The kind of the matrix in the order in which it is stored."""

    def matrix(self) -> Tensor | PackedMatrix:
        """A copy of the matrix in the order in which it is stored."""


#: a matrix as it is stored, dense or in few bits, or in a backend's order of memory
Matrix = Tensor | PackedMatrix | Layout


def stored(matrix: Matrix) -> Tensor | PackedMatrix:
    """The matrix in the order in which it is stored."""
    return matrix if isinstance(matrix, Tensor | PackedMatrix) else matrix.matrix()


def kind(matrix: Matrix) -> Kind:
    """The kind of a matrix: (rows, columns) and dtype of a dense one, (rows, columns), bits, group size, zero else."""
    if isinstance(matrix, Tensor):
        return tuple(matrix.shape), matrix.dtype
    if isinstance(matrix, PackedMatrix):
        return (len(matrix.planes), matrix.columns), matrix.bits, matrix.group_size, matrix.has_zero
    return matrix.kind


def written_out(matrix: Matrix) -> Tensor:
    """The matrix as numbers: a dense one as it is, one in few bits in fp32."""
    matrix = stored(matrix)
    return matrix.dequantise() if isinstance(matrix, PackedMatrix) else matrix


class Sized(Protocol):
    """What takes bytes."""

    @property
    def nbytes(self) -> int:
        """How many."""


def nbytes(*parts: Sized | None) -> int:
    """Bytes of the parts that there are."""
    return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class DenseFFN:
    """The weights of one FFN.

    Attributes:
        w1: [k h, d] up-projections; k is 1 in a plain FFN and 2 in a gated one, whose gates' rows come first.
        b1: [k h], or None.
        w2: [d, h] down-projection; one column per neuron.
        b2: [d], or None.
        activation: a name that `activation` takes.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: str

    @property
    def d(self) -> int:
        """Width of input and output."""
        return self.w1.shape[1]

    @property
    def h(self) -> int:
        """Number of neurons."""
        return self.w2.shape[1]

    @property
    def k(self) -> int:
        """Up-projections per neuron: 2 in a gated FFN, 1 in a plain one."""
        return len(self.w1) // self.h

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """The activation function."""
        return activation(self.activation)

    @property
    def gain(self) -> Tensor:
        """[h] fp64, |W2[:, i]|^2: how much of a neuron's squared error reaches the output."""
        return self.w2.square().sum(0, dtype=torch.float64)

    @property
    def tensors(self) -> list[Tensor]:
        """Those of w1, b1, w2, b2 that there are."""
        return [tensor for tensor in (self.w1, self.b1, self.w2, self.b2) if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and biases."""
        return nbytes(*self.tensors)

    @property
    def biases(self) -> tuple[Tensor, Tensor]:
        """b1 and b2, zeros where there are none."""
        b1, b2 = (torch.zeros(size, device=self.w1.device) for size in (len(self.w1), self.d))
        return b1 if self.b1 is None else self.b1, b2 if self.b2 is None else self.b2

    def to(self, device: torch.device) -> DenseFFN:
        """The weights on a device."""
        b1, b2 = (None if bias is None else bias.to(device) for bias in (self.b1, self.b2))
        return DenseFFN(self.w1.to(device), b1, self.w2.to(device), b2, self.activation)

    def rows(self, neurons: Tensor) -> Tensor:
        """[k m] the rows of W1 of some neurons [m], given by their numbers."""
        return (neurons + self.h * torch.arange(self.k, device=neurons.device)[:, None]).flatten()

    def at(self, neurons: Tensor) -> DenseFFN:
        """The FFN of some neurons [m], given by their numbers, without b2."""
        rows = self.rows(neurons)
        b1 = None if self.b1 is None else self.b1[rows]
        return DenseFFN(self.w1[rows], b1, self.w2[:, neurons], None, self.activation)

    def in_fp32(self) -> DenseFFN:
        """The weights in fp32, contiguous, with biases of zeros where there are none: what folding computes with."""
        b1, b2 = (bias.float() for bias in self.biases)
        return DenseFFN(self.w1.float().contiguous(), b1, self.w2.float().contiguous(), b2, self.activation)


@dataclass(frozen=True)
class FoldFormat:
    """How one folded FFN is stored.

    Attributes:
        activation: a name that `activation` takes.
        bits: of the predictor.
        group_size: input weights per scale, in every low-bit matrix.
        range_dtype: "float16" or "float32", of ranges and lines.
        fold_bits: bits per weight of the fold; None for the model's dtype.
        fallback_bits: bits per weight of W1 and W2 as fixing reads them, the predictor's included; None where fixing
            reads the dense weights.
        remainder_bits: bits per weight that W1 has beside the predictor's; None for what `fallback_bits` leaves.
        gated: whether neurons have two up-projections.
        down_zero: whether a level of W2, stacked, is 0; it is in what is folded since format version 3.
        kept: number of neurons that a static or mixed fold keeps, whose weights have `fallback_bits`; 0 of a dynamic
            one.
        kept_bias: whether these have an up bias; in a mixed fold, those that are predicted have one of their own, too.
        mixed: whether the neurons that are not kept are predicted.
    """

    activation: str
    bits: int
    group_size: int
    range_dtype: str
    fold_bits: int | None = None
    fallback_bits: int | None = None
    remainder_bits: int | None = None
    gated: bool = False
    down_zero: bool = False
    kept: int = 0
    kept_bias: bool = False
    mixed: bool = False

    @property
    def k(self) -> int:
        """Up-projections per neuron."""
        return 2 if self.gated else 1

    def predicted(self, h: int) -> int:
        """How many of the h neurons of an FFN are predicted."""
        return h - self.kept if self.mixed or not self.kept else 0

    @property
    def left(self) -> int:
        """Bits per weight of what the predictor leaves of W1, stacked; 0 where that is nothing, or dense."""
        if self.fallback_bits is None or self.remainder_bits is not None:
            return self.remainder_bits or 0
        return self.fallback_bits - self.bits


@dataclass(frozen=True)
class Storage:
    """How the parts of a folded FFN are stored.

    Attributes:
        group_size: input weights that share one scale, in every low-bit matrix.
        fold_bits: bits per weight of the fold; None for the model's dtype.
        fallback_bits: bits per weight of W1 and W2 as fixing reads them; None for the dense weights. Those of W1
            include the predictor's, which serve both.
        remainder_bits: bits per weight that W1 has beside the predictor's; None for what `left` says.
    """

    group_size: int = 256
    fold_bits: int | None = None
    fallback_bits: int | None = None
    remainder_bits: int | None = None

    def left(self, bits: int) -> int:
        """Bits per weight of what a predictor of so many bits leaves of W1, stacked; 0 where that is nothing, or dense.

        By default, predictor and remainder together have the fallback's bits. In 4 bits they have one more where the
        predictor has 2 or 3: W1 rounded in two steps, 2 bits and 2, is far from W1 rounded to 4.
        """
        if self.fallback_bits is None or self.remainder_bits is not None:
            return self.remainder_bits or 0
        return self.fallback_bits - bits + (self.fallback_bits == 4 and bits in (2, 3))

    def format(self, activation: str, bits: int, gated: bool = False) -> FoldFormat:
        """The format of a folded FFN with this activation and a predictor of so many bits."""
        left = self.left(bits)
        usual = self.fallback_bits is None or left == self.fallback_bits - bits
        stored = self.group_size, "float16", self.fold_bits, self.fallback_bits
        return FoldFormat(activation, bits, *stored, None if usual else left, gated, self.fallback_bits is not None)

    def static_format(self, ffn: DenseFFN, kept: int) -> FoldFormat:
        """The format of a static fold of this FFN that keeps so many neurons. It needs `fallback_bits`.

        No group is longer than a row of W1, and those of W2 are as long.
        """
        assert self.fallback_bits is not None, "kept neurons are in few bits"
        size = min(self.group_size, ffn.d)
        form = replace(self, group_size=size, remainder_bits=None).format(
            ffn.activation, self.fallback_bits, gated=ffn.k == 2
        )
        return replace(form, kept=kept, kept_bias=ffn.b1 is not None)

    def mixed_format(self, ffn: DenseFFN, bits: int, kept: int) -> FoldFormat:
        """The format of a mixed fold of this FFN that keeps so many neurons, some and not all, in `fallback_bits`.

        Its predictor, of the others, has so many bits. Groups are as those of `static_format`.
        """
        form = replace(self, group_size=min(self.group_size, ffn.d)).format(ffn.activation, bits, gated=ffn.k == 2)
        return replace(form, kept=kept, kept_bias=ffn.b1 is not None, mixed=True)


def _bits(matrix: Matrix | None) -> int | None:
    """Bits per weight of a matrix in few bits; None for others."""
    _, *how = (None,) if matrix is None else kind(matrix)
    return how[0] if len(how) == 3 else None


@dataclass(frozen=True)
class FoldedWeights:
    """All that a folded FFN reads. Nothing in it changes: a new fold is a new object.

    Attributes:
        fold: [d, d] C, in the model's dtype or in few bits; None where something else adds it.
        bias: [d] c, in the model's dtype; None with `fold`.
        predictor: [k h, d] low-bit copy of W1.
        neurons: lines and hot ranges, fp16 where their values fit it and fp32 where not.
        down: [h, d] W2 transposed, one row per neuron: a view of the dense weight, or in few bits ("stacked"). None
            where the dense weights are still to be put beside: see `beside`.
        up: [k h, d] W1; stacked, what the predictor leaves of it, None where that is nothing.
        b1: [k h] up bias, or None.
        kept_up: [k m, d] W1 of the m neurons that a fold keeps, in few bits; None in a dynamic one. Predictor, neurons,
            `up`, `down` and b1 are of the others, in their order: h is their number, and 0 in a static fold.
        kept_down: [d, m] W2 of these, in few bits.
        kept_bias: [k m] their up bias, or None.
    """

    fold: Matrix | None
    bias: Tensor | None
    predictor: Matrix
    neurons: Neurons
    down: Matrix | None = None
    up: Matrix | None = None
    b1: Tensor | None = None
    kept_up: Matrix | None = None
    kept_down: Matrix | None = None
    kept_bias: Tensor | None = None

    @classmethod
    def empty(
        cls, form: FoldFormat, d: int, h: int, dtype: torch.dtype, device: torch.device, rows: int | None = None
    ) -> FoldedWeights:
        """Weights of this format without content.

        Args:
            form: the format.
            d, h: width and neurons, those that are kept included.
            dtype: of the model.
            device: such as meta.
            rows: of the fold, where it is a share of it; d without.
        """
        rows = d if rows is None else rows
        h = form.predicted(h)

        def packed(rows: int, bits: int, has_zero: bool = False, columns: int = d) -> PackedMatrix:
            return PackedMatrix.empty(rows, columns, bits, min(form.group_size, columns), device, has_zero)

        def values(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        fold = packed(rows, form.fold_bits) if form.fold_bits else values(rows, d)
        lines = [values(size * h, dtype=getattr(torch, form.range_dtype)) for size in (1, 1, form.k, 1)]
        down = packed(h, form.fallback_bits, form.down_zero) if form.fallback_bits else None
        up = packed(form.k * h, form.left) if form.left else None
        neurons = Neurons(form.activation, *lines)
        dynamic = cls(fold, values(rows), packed(form.k * h, form.bits), neurons, down, up)
        if not form.kept:
            return dynamic
        assert form.fallback_bits is not None, "kept neurons are in few bits"
        kept_up = packed(form.k * form.kept, form.fallback_bits)
        kept_down = packed(d, form.fallback_bits, columns=form.kept)
        kept_bias = values(form.k * form.kept) if form.kept_bias else None
        b1 = values(form.k * h) if form.kept_bias and form.mixed else None
        return replace(dynamic, b1=b1, kept_up=kept_up, kept_down=kept_down, kept_bias=kept_bias)

    @property
    def format(self) -> FoldFormat:
        """How these weights are stored."""
        _, bits, group_size, _ = kind(self.predictor)
        storage = Storage(group_size, _bits(self.fold), _bits(self.down), _bits(self.up) or 0)
        found = storage.format(self.neurons.activation, bits, gated=self.k == 2)
        has_zero = self.down is not None and self.stacked and bool(kind(self.down)[-1])
        dtype = str(self.neurons.low.dtype).removeprefix("torch.")
        kept_bias = self.kept_bias is not None
        found = replace(found, kept=self.kept, kept_bias=kept_bias, mixed=self.mixed)
        return replace(found, range_dtype=dtype, down_zero=has_zero)

    @property
    def kept(self) -> int:
        """Number of neurons that are computed for every token; 0 of a dynamic fold."""
        return 0 if self.kept_down is None else kind(self.kept_down)[0][1]

    @property
    def static(self) -> bool:
        """Whether some neurons are kept, and none is predicted."""
        return self.kept > 0 and not self.neurons.count

    @property
    def mixed(self) -> bool:
        """Whether some neurons are kept, and the others predicted."""
        return self.kept > 0 and self.neurons.count > 0

    @property
    def without_kept(self) -> FoldedWeights:
        """The fold and the neurons that are predicted, as a dynamic fold of these."""
        return replace(self, kept_up=None, kept_down=None, kept_bias=None)

    @property
    def k(self) -> int:
        """Up-projections per neuron: 2 in a gated FFN, 1 in a plain one."""
        return self.neurons.k if self.kept_up is None else kind(self.kept_up)[0][0] // self.kept

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the FFN computes, the model's."""
        assert self.bias is not None, "a fold that something else adds does not say what it is added in"
        return self.bias.dtype

    @property
    def stacked(self) -> bool:
        """Whether fixing reads weights in few bits in place of the dense ones."""
        return not isinstance(self.down, Tensor | None)

    def beside(self, dense: DenseFFN) -> FoldedWeights:
        """The weights with what fixing reads of the dense FFN: the up bias, and W1 and W2 unless they are stacked.

        A fold that keeps neurons reads nothing of it.
        """
        if self.kept:
            return self
        if self.stacked:
            return replace(self, b1=dense.b1)
        return replace(self, b1=dense.b1, up=dense.w1, down=dense.w2.T)

    def fallback(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W1 [k h, d] and W2 [d, h] as fixing reads them, written out in `dtype` where they are in few bits."""
        assert self.down is not None, "the dense weights are put beside first"
        if not self.stacked:
            assert isinstance(self.up, Tensor), "beside dense W2, W1 is dense"
            return self.up.to(dtype), written_out(self.down).T.to(dtype)
        w1 = written_out(self.predictor)
        if self.up is not None:
            w1 = w1 + written_out(self.up)
        return w1.to(dtype), written_out(self.down).T.to(dtype)

    def exact(self, x: Tensor, b2: Tensor | None) -> Tensor:
        """Outputs [tokens, d] for inputs x [tokens, d], every neuron computed by what fixing reads; b2 [d] is added."""
        w1, w2 = self.fallback(x.dtype)
        hidden = self.neurons.value(F.linear(x, w1, self.b1))
        return F.linear(hidden.to(x.dtype), w2, b2)

    def kept_ffn(self, dtype: torch.dtype) -> DenseFFN:
        """The neurons that are kept as an FFN of their own, written out in `dtype`, without a down bias."""
        assert self.kept_up is not None and self.kept_down is not None, "a dynamic fold keeps no neuron"
        w1, w2 = (written_out(matrix).to(dtype) for matrix in (self.kept_up, self.kept_down))
        b1 = None if self.kept_bias is None else self.kept_bias.to(dtype)
        return DenseFFN(w1, b1, w2, None, self.neurons.activation)

    def predicted_ffn(self, dtype: torch.dtype) -> DenseFFN:
        """The neurons that are predicted as an FFN of their own, as fixing reads them, written out in `dtype`."""
        w1, w2 = self.fallback(dtype)
        return DenseFFN(w1, None if self.b1 is None else self.b1.to(dtype), w2, None, self.neurons.activation)

    @property
    def keeps(self) -> int:
        """Bytes of the kept neurons."""
        return nbytes(self.kept_up, self.kept_down, self.kept_bias)

    @property
    def always(self) -> int:
        """Bytes that every token reads: fold, kept neurons, predictor, ranges and lines, biases."""
        return nbytes(self.fold, self.bias, self.predictor, self.neurons, self.b1) + self.keeps

    @property
    def fixing(self) -> int:
        """Bytes that a token reads beside, if it fixes every neuron."""
        return nbytes(self.up, self.down)

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.always + self.fixing

    def touched(self, fix_rate: float) -> float:
        """Bytes that a token reads on average at batch 1, where it fixes this share of the neurons."""
        return self.always + fix_rate * self.fixing
