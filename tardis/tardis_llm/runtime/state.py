"""What a folded FFN stores, as a module, and the prepared fold that runs.

`FoldState` has the tensors, for files and devices. What runs is a `PreparedFFN` of a backend, made from those tensors
once and kept: an immutable object behind one reference, which `swap` and every move of a tensor exchange. So a call
sees one fold as a whole, whatever other threads do.
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
from .backend import REFERENCE, PreparedFFN, backend_for, dense_ffn, lay_out
from .kept import prepare
from .matrices import Fold, LowBit, LowBitFold
from .slow import warn_of_reference
from .stored import LAYOUT, LaidOut, Stored, changing_layout, reading_layout

#: what fixing reads, in rows here and there
BY_ROWS = frozenset({"up", "down"})


@dataclass(frozen=True)
class _Ready:
    """A prepared FFN, and what it was made from."""

    key: tuple[object, ...]
    ffn: PreparedFFN


class FoldState(Stored):
    """The tensors that a folded FFN stores beside the dense weights.

    State: `fold.weight` (or `fold.planes`, `fold.scale`), `fold.bias`, `predictor.planes`, `predictor.scale`, `low`,
    `high`, `slope`, `offset`; stacked, `remainder.*` and `down.*` as `predictor.*`, in place of the dense weights. A
    fold that keeps neurons has `kept_up.*` and `kept_down.*` beside, and if there are up biases `kept_bias` and, of the
    neurons that are predicted, `predicted_bias`. Of a static fold, only these and the fold have rows.

    Args:
        weights: what to store; dense weights beside it are left to the model.
    """

    format_tensors = frozenset({"low", "high", "slope", "offset"})
    low: Tensor
    high: Tensor
    slope: Tensor
    offset: Tensor
    kept_bias: Tensor | None
    predicted_bias: Tensor | None

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
        self.kept_up = LowBit(weights.kept_up) if isinstance(weights.kept_up, PackedMatrix) else None
        self.kept_down = LowBit(weights.kept_down) if isinstance(weights.kept_down, PackedMatrix) else None
        self.register_buffer("kept_bias", weights.kept_bias)
        self.register_buffer("predicted_bias", weights.b1 if weights.kept else None)
        for name in ("low", "high", "slope", "offset"):
            self.register_buffer(name, getattr(weights.neurons, name))
        # where torch keeps the tensors, which is quicker to look up than names
        self._states = [state for module in self.modules() for state in (module._parameters, module._buffers)]
        self._ready: _Ready | None = None

    @property
    def neurons(self) -> Neurons:
        """Lines and hot ranges."""
        return Neurons(self.activation, self.low, self.high, self.slope, self.offset)

    @property
    def stacked(self) -> bool:
        """Whether low-bit weights stand for the dense ones."""
        return self.down is not None

    @property
    def static(self) -> bool:
        """Whether the same neurons are computed for every token, and none is predicted."""
        return self.kept_down is not None and not len(self.offset)

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
            return FoldedWeights(bias=self.fold.bias, **self._vectors, **parts)

    def fetched(self) -> FoldedWeights:
        """The same as `current`, each part got by calling the module that holds it.

        What puts weights in their place when a module is called, as accelerate's offloading does, then sees each call.
        """
        with reading_layout():
            fold, bias = self.fold()
            parts = {name: part() for part, name in self._parts if part is not self.fold}
            return FoldedWeights(fold, bias, **self._vectors, **parts)

    @property
    def _vectors(self) -> dict[str, Any]:
        """What it holds beside matrices and the fold's bias, by the names of `FoldedWeights`."""
        return {"neurons": self.neurons, "b1": self.predicted_bias, "kept_bias": self.kept_bias}

    def lay_out(self, dtype: torch.dtype) -> None:
        """Put every matrix in the fastest order for inputs of a dtype."""
        for part, name in self._parts:
            part.lay_out(dtype, by_rows=name in BY_ROWS)

    def restore(self) -> None:
        """Put every matrix back into the order in which it is stored."""
        for part, _ in self._parts:
            part.restore()

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
        _check_exchangeable(self.current, new)
        dtype = self.fold.bias.dtype
        ready = [(part, _ordered_as(part.current, new, name, dtype)) for part, name in self._parts]
        with changing_layout():
            old = self.current
            for part, matrix in ready:
                part.exchange(matrix)
            self.fold.bias = nn.Parameter(_there(new.bias), requires_grad=False)
            self.kept_bias, self.predicted_bias = new.kept_bias, new.b1 if new.kept else None
            for name in ("low", "high", "slope", "offset"):
                setattr(self, name, getattr(new.neurons, name))
            self.forget()
        return old

    @property
    def _parts(self) -> list[tuple[LaidOut, str]]:
        """The modules that hold a matrix, with its name in `FoldedWeights`."""
        named = (
            (self.fold, "fold"),
            (self.predictor, "predictor"),
            (self.remainder, "up"),
            (self.down, "down"),
            (self.kept_up, "kept_up"),
            (self.kept_down, "kept_down"),
        )
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
        return ready.ffn if ready is not None and ready.key == key else self._prepare(x, dense)

    def exactly(self, x: Tensor, dense: DenseFFN, if_quick: bool = False) -> Tensor | None:
        """Outputs [tokens, d] with every neuron computed: by the dense weights, or what stands for them in few bits.

        Args:
            x: [tokens, d].
            dense: the dense weights, empty where there are others for them.
            if_quick: return None where that would take longer than the fold does; dense weights are always quick.
        """
        if not self.stacked:
            return dense_ffn(x, dense)
        ffn = self.prepared(x, dense)
        return None if if_quick and not ffn.quick_exact(x) else ffn.exact(x.contiguous(), dense.b2)

    def _prepare(self, x: Tensor, dense: DenseFFN) -> PreparedFFN:
        """`prepared` anew, while no tensor changes."""
        warn_of_reference(x, self.fold.bias.dtype)
        with LAYOUT:
            if any(tensor.is_meta for tensor in self._own()):  # offloaded: they are there while a module is called
                return prepare(self.computed(self.fetched().beside(dense)), x)
            if not backend_for(x).reads_stored:
                self.lay_out(x.dtype)
            ffn = prepare(self.computed(self.current.beside(dense)), x)
            self._ready = _Ready(self._key(x, dense), ffn)
            return ffn

    def _key(self, x: Tensor, dense: DenseFFN) -> tuple[object, ...]:
        """What a prepared FFN was made from: the dtype of the inputs, and where each tensor is."""
        return x.dtype, *map(Tensor.data_ptr, (*self._own(), *dense.tensors))

    def _own(self) -> list[Tensor]:
        """All tensors that it holds, as they lie."""
        found = [tensor for state in self._states for tensor in state.values() if tensor is not None]
        layouts = [part.layout for part, _ in self._parts]  # each read once: another thread may put it back
        return found + [layout.data for layout in layouts if layout is not None]

    def forget(self) -> None:
        """Let go of what is kept from call to call, which would keep alive the memory that tensors leave."""
        self._ready = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldState:
        self.forget()
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what points to memory."""
        return {**super().__getstate__(), "_ready": None}


def _there(bias: Tensor | None) -> Tensor:
    assert bias is not None, "a stored fold has a bias"
    return bias


def _ordered_as(old: Matrix, weights: FoldedWeights, name: str, dtype: torch.dtype) -> Matrix:
    """The new matrix of a name in an order of memory if the old one is, for inputs of a dtype; else as stored."""
    new: Matrix = getattr(weights, name)
    if isinstance(old, Tensor | PackedMatrix):
        return stored(new)
    return (lay_out(new, dtype, name in BY_ROWS) or new) if isinstance(new, Tensor | PackedMatrix) else new


def _check_exchangeable(old: FoldedWeights, new: FoldedWeights) -> None:
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
        low_bit = weights.up, weights.down, weights.kept_up, weights.kept_down
        matrices += [matrix for matrix in low_bit if matrix is not None]
    biases = weights.bias, weights.kept_bias, weights.b1 if weights.kept else None
    vectors = [vector for vector in (*biases, *weights.neurons.tensors) if vector is not None]
    shapes = [kind(matrix) for matrix in matrices], [(tuple(vector.shape), vector.dtype) for vector in vectors]
    return weights.format, shapes, weights.neurons.low.device
