"""The folded FFN as a module: its tensors, the prepared fold that runs, and which of the two FFNs a call goes through.

`FoldState` holds what a folded FFN stores, for files and devices. What runs is a `PreparedFFN` of a backend, made from
those tensors once and kept: an immutable object behind one reference, which `swap` and every move of a tensor
exchange. So a call sees one fold as a whole, whatever other threads do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError
from ..ffn.neuron import Neurons
from ..ffn.packed import PackedMatrix
from ..ffn.weights import DenseFFN, FoldedWeights, Matrix, kind, stored
from .backend import REFERENCE, PreparedFFN, backend_for, dense_ffn, lay_out, prepare
from .operators import Numbered, library, numbered
from .slow import warn_of_order, warn_of_reference
from .stored import LAYOUT, LaidOut, Stored, changing_layout, reading_layout, refuse_training


class LowBit(LaidOut):
    """A matrix in few bits: `planes` [rows, bits, ceil(columns / 8)] uint8, `scale` [rows, groups] fp16."""

    format_tensors = matrix_tensors = frozenset({"planes", "scale"})
    planes: Tensor
    scale: Tensor

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.columns, self.group_size = matrix.columns, matrix.group_size
        self.register_buffer("planes", matrix.planes)
        self.register_buffer("scale", matrix.scale)

    def forward(self) -> Any:
        """The matrix in the order in which it is now; see `FoldState.fetched`."""
        return self.current

    def _get(self) -> PackedMatrix:
        return PackedMatrix(self.planes, self.scale, self.columns, self.group_size)

    def _set(self, matrix: PackedMatrix) -> None:
        self.planes, self.scale = matrix.planes, matrix.scale

    def _clear(self) -> None:
        self.planes, self.scale = self.planes.new_empty(0), self.scale.new_empty(0)


class Fold(LaidOut):
    """The affine part in the model's dtype: `weight` [d, d] and `bias` [d]."""

    matrix_tensors = frozenset({"weight"})

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self) -> tuple[Matrix, Tensor]:
        """The matrix in the order in which it is now, and the bias; see `FoldState.fetched`."""
        return self.current, self.bias

    def _get(self) -> Tensor:
        return self.weight.detach()

    def _set(self, matrix: Tensor) -> None:
        self.weight = nn.Parameter(matrix, requires_grad=False)

    def _clear(self) -> None:
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)


class LowBitFold(LowBit):
    """The affine part in few bits: `planes`, `scale`, and `bias` [d] in the model's dtype."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor) -> None:
        super().__init__(matrix)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self) -> tuple[Matrix, Tensor]:
        """The matrix in the order in which it is now, and the bias; see `FoldState.fetched`."""
        return self.current, self.bias


class FoldState(Stored):
    """The tensors that a folded FFN stores beside the dense weights.

    State: `fold.weight` (or `fold.planes`, `fold.scale`), `fold.bias`, `predictor.planes`, `predictor.scale`, `low`,
    `high`, `slope`, `offset`; stacked, `remainder.*` and `down.*` as `predictor.*`, in place of the dense weights.

    Args:
        weights: what to store; dense weights beside it are left to the model.
    """

    format_tensors = frozenset({"low", "high", "slope", "offset"})
    low: Tensor
    high: Tensor
    slope: Tensor
    offset: Tensor

    def __init__(self, weights: FoldedWeights) -> None:
        super().__init__()
        fold, bias, predictor, up, down = weights.fold, weights.bias, weights.predictor, weights.up, weights.down
        assert isinstance(predictor, PackedMatrix), "a stored predictor is in few bits"
        assert isinstance(fold, Tensor | PackedMatrix), "a stored fold is not laid out"
        self.activation = weights.neurons.activation
        self.fold = LowBitFold(fold, _there(bias)) if isinstance(fold, PackedMatrix) else Fold(fold, _there(bias))
        self.predictor = LowBit(predictor)
        self.remainder = LowBit(up) if isinstance(up, PackedMatrix) else None
        self.down = LowBit(down) if isinstance(down, PackedMatrix) else None
        for name in ("low", "high", "slope", "offset"):
            self.register_buffer(name, getattr(weights.neurons, name))
        # where torch keeps the tensors, which is quicker to look up than names
        self._states = [state for module in self.modules() for state in (module._parameters, module._buffers)]
        self._ready = _Ready((), None)

    @property
    def neurons(self) -> Neurons:
        """Lines and hot ranges."""
        return Neurons(self.activation, self.low, self.high, self.slope, self.offset)

    @property
    def stacked(self) -> bool:
        """Whether low-bit weights stand for the dense ones."""
        return self.down is not None

    @property
    def weights(self) -> FoldedWeights:
        """What is stored, in the order of files; copies of what is laid out."""
        return self._weights(lambda part: part.matrix)

    @property
    def current(self) -> FoldedWeights:
        """What is stored, in the order of memory in which it is now."""
        return self._weights(lambda part: part.current)

    def _weights(self, matrix: Callable[[LaidOut], Any]) -> FoldedWeights:
        with reading_layout():
            parts = {name: matrix(part) for part, name in self._parts}
            return FoldedWeights(bias=self.fold.bias, neurons=self.neurons, **parts)

    def fetched(self) -> FoldedWeights:
        """The same as `current`, each part got by calling the module that holds it.

        What puts weights in their place when a module is called, as accelerate's offloading does, then sees each call.
        """
        with reading_layout():
            fold, bias = self.fold()
            parts = {name: part() for part, name in self._parts if part is not self.fold}
            return FoldedWeights(fold, bias, neurons=self.neurons, **parts)

    def lay_out(self, dtype: torch.dtype) -> None:
        """Put what is read whole, fold and predictor, in the fastest order for inputs of a dtype."""
        self.fold.lay_out(dtype)
        self.predictor.lay_out(dtype)

    def restore(self) -> None:
        """Put fold and predictor back into the order in which they are stored."""
        self.fold.restore()
        self.predictor.restore()

    def swap(self, new: FoldedWeights) -> FoldedWeights:
        """Exchange the fold for another one, at once: a call that runs ends with the old fold, the next has the new.

        Graphs that are compiled already run the new fold, too. Its tensors are held, not copied; where the old fold was
        laid out, so is the new one before any call waits for it.

        Args:
            new: stored in the same format, on the same device. What it has of dense weights is left out.

        Returns:
            The old fold, to go back to.

        Raises:
            InvalidInputError: the new fold has another format, shape, dtype or device.
        """
        old = self.current
        check_exchangeable(old, new)
        parts = [(part, getattr(old, name), getattr(new, name)) for part, name in self._parts]
        ready = [(part, _ordered_as(before, matrix, self.fold.bias.dtype)) for part, before, matrix in parts]
        with changing_layout():
            for part, matrix in ready:
                part.exchange(matrix)
            self.fold.bias = nn.Parameter(_there(new.bias), requires_grad=False)
            for name in ("low", "high", "slope", "offset"):
                setattr(self, name, getattr(new.neurons, name))
            self.forget()
        return old

    @property
    def _parts(self) -> list[tuple[LaidOut, str]]:
        """The modules that hold a matrix, with its name in `FoldedWeights`."""
        named = (self.fold, "fold"), (self.predictor, "predictor"), (self.remainder, "up"), (self.down, "down")
        return [(part, name) for part, name in named if part is not None]

    def computed(self, weights: FoldedWeights) -> FoldedWeights:
        """What of the weights a prepared FFN computes with: all."""
        return weights

    def prepared(self, x: Tensor, dense: DenseFFN) -> PreparedFFN:
        """The FFN ready for inputs like x [tokens, d]; it is made anew when one of its tensors has moved.

        Decoding reads weights that push all else out of the caches; looking up every tensor of an FFN takes long then.
        """
        if backend_for(x) is REFERENCE:
            warn_of_reference(x, self.fold.bias.dtype)
            return prepare(self.computed(self.fetched().beside(dense)), x)
        key = self._key(x, dense)
        ready = self._ready
        return ready.ffn if ready.ffn is not None and ready.key == key else self._prepare(x, dense)

    def _prepare(self, x: Tensor, dense: DenseFFN) -> PreparedFFN:
        """`prepared` anew, while no tensor changes."""
        warn_of_reference(x, self.fold.bias.dtype)
        with LAYOUT:
            if any(tensor.is_meta for tensor in self._own()):  # offloaded: they are there while a module is called
                return prepare(self.computed(self.fetched().beside(dense)), x)
            ffn = prepare(self.computed(self.current.beside(dense)), x)
            self._ready = _Ready(self._key(x, dense), ffn)
            return ffn

    def _key(self, x: Tensor, dense: DenseFFN) -> tuple[object, ...]:
        """What a prepared FFN was made from: the dtype of the inputs, and where each tensor is."""
        return x.dtype, *map(Tensor.data_ptr, (*self._own(), *dense.tensors))

    def _own(self) -> list[Tensor]:
        """All tensors that it holds, as they lie."""
        found = [tensor for state in self._states for tensor in state.values() if tensor is not None]
        return found + [part.layout.data for part in (self.fold, self.predictor) if part.layout is not None]

    def forget(self) -> None:
        """Let go of what is kept from call to call, which would keep alive the memory that tensors leave."""
        self._ready = _Ready((), None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldState:
        self.forget()
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what points to memory."""
        return {**super().__getstate__(), "_ready": _Ready((), None)}


def _there(bias: Tensor | None) -> Tensor:
    assert bias is not None, "a stored fold has a bias"
    return bias


def _ordered_as(old: Matrix, new: Matrix, dtype: torch.dtype) -> Matrix:
    """The new matrix in an order of memory if the old one is, for inputs of a dtype; else in the stored order."""
    if isinstance(old, Tensor | PackedMatrix):
        return stored(new)
    return (lay_out(new, dtype) or new) if isinstance(new, Tensor | PackedMatrix) else new


def check_exchangeable(old: FoldedWeights, new: FoldedWeights) -> None:
    """Raise InvalidInputError unless one fold can take the place of the other."""
    for name, before, after in zip(("format", "shapes", "device"), _identity(old), _identity(new), strict=True):
        if before != after:
            raise InvalidInputError(
                f"the new fold has another {name}: {after}, where the old one has {before}. Refit the same layer with "
                "the same settings, and move it to the same device."
            )


def _identity(weights: FoldedWeights) -> tuple[object, ...]:
    """Format, shapes and dtypes, and device of what is stored of a fold."""
    matrices = [matrix for matrix in (weights.fold, weights.predictor) if matrix is not None]
    if weights.stacked:
        matrices += [matrix for matrix in (weights.up, weights.down) if matrix is not None]
    vectors = [vector for vector in (weights.bias, *weights.neurons.tensors) if vector is not None]
    shapes = [kind(matrix) for matrix in matrices], [(tuple(vector.shape), vector.dtype) for vector in vectors]
    return weights.format, shapes, weights.neurons.low.device


@dataclass(frozen=True)
class _Ready:
    """A prepared FFN, and what it was made from."""

    key: tuple[object, ...]
    ffn: PreparedFFN | None


class FoldedFFN(Numbered, FoldState):
    """A folded FFN of a transformers model; the child `tardis` of an FFN.

    Args:
        weights: what to store.

    Attributes:
        exact: run the dense FFN instead, whatever the inputs.
        goes_dense: whether inputs [..., d] go through the dense FFN; None folds all. `prefill.set_prefill` sees to it.
    """

    def __init__(self, weights: FoldedWeights) -> None:
        super().__init__(weights)
        self.exact = False
        self.goes_dense: Callable[[Tensor], bool] | None = None

    def forward(self, x: Tensor, dense: DenseFFN) -> Tensor:
        """Outputs [..., d] for inputs x [..., d], in the dtype of x.

        Args:
            x: inputs.
            dense: its w1 and w2 are not read where low-bit weights stand for them.

        Raises:
            InvalidInputError: a weight is set to train.
        """
        if torch.is_grad_enabled():
            refuse_training([*self._own(), *dense.tensors], "weights of a folded FFN are")
        if self.exact or (self.goes_dense is not None and self.goes_dense(x)):
            return dense_ffn(x, dense)
        tokens = x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling() or type(tokens) is not Tensor:
            return self._traced(tokens, dense).view(x.shape)
        return self.prepared(tokens, dense)(tokens.contiguous()).view(x.shape)

    def fixed(self, x: Tensor, dense: DenseFFN) -> Tensor:
        """[tokens, h] bool: the neurons that it fixes for inputs x [tokens, d]; arguments as `forward`."""
        return self.prepared(x, dense).fixed(x)

    def _traced(self, x: Tensor, dense: DenseFFN) -> Tensor:
        """One operator of a graph where a backend has kernels for x, else the reference with constant shapes."""
        if backend_for(x) is not REFERENCE:
            y: Tensor = torch.ops.tardis.numbered_ffn(x, self.number, dense.w1, dense.b1, dense.w2)
            return y
        warn_of_reference(x, self.fold.bias.dtype)
        return prepare(self.weights.beside(dense), x)(x)


@torch.no_grad()
def _numbered_ffn(x: Tensor, number: int, w1: Tensor, b1: Tensor | None, w2: Tensor) -> Tensor:
    """[tokens, d] for x [tokens, d], by the `FoldedFFN` of that number; dense weights as in its `forward`."""
    ffn: FoldedFFN = numbered(number)
    prepared = ffn.prepared(x, DenseFFN(w1, b1, w2, None, ffn.activation))
    if not ffn.stacked and not w2.T.is_contiguous():
        warn_of_order()
    return prepared(x.contiguous())


library.define("numbered_ffn(Tensor x, int number, Tensor w1, Tensor? b1, Tensor w2) -> Tensor")
library.impl("numbered_ffn", _numbered_ffn, "CompositeExplicitAutograd")


@torch.library.register_fake("tardis::numbered_ffn")
def _(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x)
