"""The folded FFN in plain torch: the specification that every kernel is tested against.

Where the kernels of `ops` can, they do the same for up to 64 tokens, as in decoding; everything else runs here.

    y = x C^T + c + sum over i in S(x) of r_i(z_i) W2[:, i]
    S(x) = neurons whose predicted pre-activation zhat is not within [low_i, high_i]
    r_i(z) = act(z) - slope_i z - offset_i

In a model, a folded FFN sits in the places of the three parts that it stands for: the up projection keeps its weights
and passes its input on, the activation does nothing, and the down projection, which keeps its weights too, returns y.
So each family's residuals, dropout and return types stay its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..allocator import contiguous_in_huge_pages
from ..ffn.activations import ACTIVATIONS
from ..ffn.packed import PackedMatrix
from ..ffn.weights import Fallback, FFNWeights, FoldedWeights
from .cpu import ops
from .fixing import Fixing
from .numbered import Numbered, numbered
from .reference import dense_ffn, fixed_neurons, folded_ffn
from .stored import LAYOUT, InPanels, Stored, changing_layout, refuse_training


class LowBit(InPanels):
    """A `PackedMatrix` in a model: `planes` [rows, bits, ceil(columns / 8)] uint8, `scale` [rows, groups] fp16."""

    format_tensors = relaid = frozenset({"planes", "scale"})
    planes: Tensor
    scale: Tensor

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.columns, self.group_size = matrix.columns, matrix.group_size
        self.register_buffer("planes", matrix.planes)
        self.register_buffer("scale", matrix.scale)

    def forward(self) -> PackedMatrix:
        """The matrix as it is stored; see `FoldedFFN.fetched`."""
        return self.matrix

    @property
    def matrix(self) -> PackedMatrix:
        """The matrix as it is stored."""
        stored = self.stored
        assert isinstance(stored, PackedMatrix)
        return stored

    def _get(self) -> PackedMatrix:
        return PackedMatrix(self.planes, self.scale, self.columns, self.group_size)

    def _set(self, matrix: PackedMatrix) -> None:
        self.planes, self.scale = matrix.planes, matrix.scale

    def _clear(self) -> None:
        self.planes, self.scale = self.planes.new_empty(0), self.scale.new_empty(0)


class Fold(InPanels):
    """The affine part in the model's dtype: `weight` [d, d] and `bias` [d]."""

    relaid = frozenset({"weight"})

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self) -> tuple[Tensor | PackedMatrix, Tensor]:
        """The matrix as it is stored, and the bias; see `FoldedFFN.fetched`."""
        return self.stored, self.bias

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

    def forward(self) -> tuple[PackedMatrix, Tensor]:  # type: ignore[override]  # what a fold returns
        """The matrix as it is stored, and the bias; see `FoldedFFN.fetched`."""
        return self.matrix, self.bias


class FoldedFFN(Numbered, Stored):
    """Holds what a folded FFN stores beside the dense weights; the child `tardis` of an FFN.

    State: `fold.weight` (or `fold.planes`, `fold.scale`), `fold.bias`, `predictor.planes`, `predictor.scale`, `low`,
    `high`, `slope`, `offset`; stacked, `remainder.*` and `down.*` as `predictor.*`, in place of the dense weights.

    Args:
        weights: what to store.
        activation: a name in `ACTIVATIONS`.

    Attributes:
        exact: run the dense FFN instead, whatever the inputs.
        goes_dense: whether inputs [..., d] go through the dense FFN; None folds all. `prefill.set_prefill` sees to it.
    """

    format_tensors = frozenset({"low", "high", "slope", "offset"})
    low: Tensor
    high: Tensor
    slope: Tensor
    offset: Tensor

    def __init__(self, weights: FoldedWeights, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.exact = False
        self.goes_dense: Callable[[Tensor], bool] | None = None
        fold = weights.weight
        self.fold = LowBitFold(fold, weights.bias) if isinstance(fold, PackedMatrix) else Fold(fold, weights.bias)
        self.predictor = LowBit(weights.predictor)
        fallback = weights.fallback
        self.remainder = LowBit(fallback.remainder) if fallback and fallback.remainder else None
        self.down = LowBit(fallback.down) if fallback else None
        for name in ("low", "high", "slope", "offset"):
            self.register_buffer(name, getattr(weights, name))
        self._states = [state for module in self.modules() for state in (module._parameters, module._buffers)]
        self._whole = self.fold, self.predictor  # what is read whole, and may be in panels
        #: what the tensors were when the FFN was put together for the kernels, and the outcome
        self._ready: tuple[tuple[object, ...], ops.PreparedFFN | None] = (), None

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds, as it lies, without fallback weights."""
        parts = [self.fold.laid, self.fold.bias, self.predictor.laid, self.low, self.high, self.slope, self.offset]
        return sum(part.nbytes for part in parts)

    @property
    def weights(self) -> FoldedWeights:
        """The stored tensors; copies of those that are in panels."""
        ranges = self.low, self.high, self.slope, self.offset
        return FoldedWeights(self.fold.stored, self.fold.bias, self.predictor.matrix, *ranges, self.fallback)

    def fetched(self) -> FoldedWeights:
        """The same, each part got by calling the module that holds it.

        What puts weights in their place when a module is called, as accelerate's offloading does, then sees each call.
        """
        fold, bias = self.fold()
        remainder = self.remainder() if self.remainder else None
        fallback = Fallback(remainder, self.down()) if self.down else None
        return FoldedWeights(fold, bias, self.predictor(), self.low, self.high, self.slope, self.offset, fallback)

    @property
    def _laid(self) -> ops.Laid:
        """The same as they lie."""
        ranges = self.low, self.high, self.slope, self.offset
        return ops.Laid(self.fold.laid, self.fold.bias, self.predictor.laid, ranges, self.fallback)

    @property
    def fallback(self) -> Fallback | None:
        """The low-bit weights that fixing reads; None where it reads the dense ones."""
        if self.down is None:
            return None
        return Fallback(self.remainder.matrix if self.remainder else None, self.down.matrix)

    def forward(self, x: Tensor, dense: FFNWeights) -> Tensor:
        """Output [..., d] for inputs x [..., d]; see `folded_ffn`.

        Args:
            x: inputs.
            dense: its w1 and w2 are not read where low-bit weights stand for them.
        """
        if torch.is_grad_enabled():
            refuse_training([*self._own(), *dense], "weights of a folded FFN are")
        if self.exact or (self.goes_dense is not None and self.goes_dense(x)):
            return dense_ffn(x, dense, ACTIVATIONS[self.activation])
        run = self._traced if torch.compiler.is_compiling() else self._run
        return run(x.reshape(-1, x.shape[-1]), dense).view(x.shape)

    def _run(self, x: Tensor, dense: FFNWeights) -> Tensor:
        """`folded_ffn` for x [tokens, d], by the kernels where they take it."""
        ready = self._prepared(x, dense)
        if ready is not None:
            return ready(x.contiguous())
        weights = self.fetched()
        if ops.runs(x, weights, dense):
            return ops.folded_ffn(x, weights, dense, self.activation)
        ops.warn_of_dtype(x, weights.bias.dtype)
        return folded_ffn(x, weights, _written_out(x, weights, dense), ACTIVATIONS[self.activation])

    def _traced(self, x: Tensor, dense: FFNWeights) -> Tensor:
        """The same in a graph: one operator where the kernels take x, else with shapes that depend on no values."""
        if ops.takes(x) and not (torch.is_grad_enabled() and x.requires_grad):
            y: Tensor = torch.ops.tardis.numbered_ffn(x, self.number, dense.w1, dense.b1, dense.w2)
            return y
        ops.warn_of_dtype(x, self.fold.bias.dtype)
        weights = self.weights
        w1, b1, w2, _ = _written_out(x, weights, dense)
        ranges = weights.low, weights.high, weights.slope, weights.offset
        fold = weights.weight, weights.bias
        return Fixing(self.activation, weights.predictor, ranges, b1, w1, w2.T, *fold).masked(x)

    def fixed(self, x: Tensor, dense: FFNWeights) -> Tensor:
        """[tokens, h] bool: the neurons that it fixes for inputs x [tokens, d]; arguments as `forward`."""
        ready = self._prepared(x, dense)
        return fixed_neurons(x, self.weights, dense.b1) if ready is None else ready.fixed(x)

    def pack(self, dtype: torch.dtype) -> None:
        """Put fold and predictor in panels for decoding on a CPU; see `InPanels`."""
        self.fold.pack(dtype)
        self.predictor.pack(dtype)

    def unpack(self) -> None:
        """Put fold and predictor back into the order in which they are stored."""
        self.fold.unpack()
        self.predictor.unpack()

    def _prepared(self, x: Tensor, dense: FFNWeights) -> ops.PreparedFFN | None:
        """The FFN for the kernels where they take x [tokens, d], put together again when a tensor has moved.

        Decoding reads weights that push all else out of the caches; looking up every tensor of an FFN takes long then.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor or not ops.takes(x):
            return None
        tensors = [tensor for tensor in (*self._own(), dense.w1, dense.b1, dense.w2) if tensor is not None]
        made_from = (x.dtype, *map(Tensor.data_ptr, tensors))
        key, ready = self._ready
        if key != made_from:
            ready = self._put_together(x, dense)
        return ready

    def _put_together(self, x: Tensor, dense: FFNWeights) -> ops.PreparedFFN | None:
        """`_prepared` anew, while no tensor changes."""
        with LAYOUT:
            own = self._own()
            if any(tensor.is_meta for tensor in own):  # offloaded: they are there only while a module is called
                return None
            ready = ops.prepared(x, self._laid, dense, self.activation)
            tensors = [tensor for tensor in (*own, dense.w1, dense.b1, dense.w2) if tensor is not None]
            self._ready = (x.dtype, *map(Tensor.data_ptr, tensors)), ready
            return ready

    def _own(self) -> list[Tensor]:
        """All tensors that it holds, as they lie; looked up where torch keeps them, which is quicker than by name."""
        stored = [tensor for state in self._states for tensor in state.values() if tensor is not None]
        return stored + [part._panels.data for part in self._whole if part._panels is not None]

    def forget(self) -> None:
        """Let go of what is kept from call to call, which would keep alive the memory that tensors leave."""
        self._ready = (), None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedFFN:
        self.forget()
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what points to memory."""
        return {**super().__getstate__(), "_ready": ((), None)}


def _written_out(x: Tensor, folded: FoldedWeights, dense: FFNWeights) -> FFNWeights:
    """Dense weights in the dtype of x; low-bit ones that stand for them are written out."""
    if folded.fallback is None:
        return dense
    w1, w2 = folded.fallback.matrices(folded.predictor, x.dtype)
    return dense._replace(w1=w1, w2=w2)


class KeptLinear(Stored):
    """The up projection of a folded FFN: keeps weights under their own names and passes its input on.

    Its parameters are the dense layer's own, and frozen while they are here.

    Args:
        linear: whose weights to keep.
        transposed: whether it stores its weight as [in, out].
        stacked: whether low-bit weights stand for the weight. It is then empty, but there: a loader that does not know
            TARDIS stops at its shape, where it would draw a missing one at random.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Module, transposed: bool, stacked: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self._trained = [name for name, part in linear.named_parameters(recurse=False) if part.requires_grad]
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(linear, name))
        if stacked:
            self.weight = nn.Parameter(self.weight.new_empty(0))
        self.freeze()

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]; empty where low-bit weights stand for it."""
        return self.weight.T if self.transposed and self.weight.dim() == 2 else self.weight

    def lay_out(self, neurons: int) -> None:
        """Lay the weight out anew in memory so that each neuron's numbers are consecutive; values and shape stay.

        Args:
            neurons: the dimension of `matrix` that counts them.
        """
        if self._lies_by(neurons):
            return
        with changing_layout():
            if not self._lies_by(neurons):  # no other thread was quicker
                matrix = contiguous_in_huge_pages(self.matrix.transpose(0, neurons)).transpose(0, neurons)
                self.weight.data = matrix.T if self.transposed else matrix

    def _lies_by(self, neurons: int) -> bool:
        return self.matrix.transpose(0, neurons).is_contiguous()

    def release(self, linear: nn.Module) -> None:
        """Give the parameters back to the dense layer as they were: set to train or not, and contiguous."""
        for name in self._trained:
            linear.get_parameter(name).requires_grad_()
        weight = linear.get_parameter("weight")
        if not weight.is_contiguous():  # strides choose the kernel, and so bits
            weight.data = contiguous_in_huge_pages(weight.data)

    def forward(self, x: Tensor | None = None) -> Any:
        """x itself; without x, weight [out, in] and bias: see `FoldedFFN.fetched`."""
        return (self.matrix, self.bias) if x is None else x


class FoldedDown(KeptLinear):
    """The down projection of a folded FFN: gets the FFN's input x and returns its output."""

    def __init__(self, linear: nn.Module, transposed: bool, up: KeptLinear, ffn: FoldedFFN) -> None:
        super().__init__(linear, transposed, stacked=ffn.fallback is not None)
        self._others = (up, ffn)  # in a tuple, so that they are not registered, and saved, twice

    def lay_out_both(self) -> None:
        """Lay out what fixing reads of the dense weights, unless they are offloaded; see `lay_out`."""
        up, ffn = self._others
        if ffn.down is None and not up.weight.is_meta:
            up.lay_out(neurons=0)
            self.lay_out(neurons=1)

    def forward(self, x: Tensor | None = None) -> Any:
        """Output [..., d] of the folded FFN for x [..., d]; without x, weight [out, in] and bias."""
        if x is None:
            return super().forward()
        up, ffn = self._others
        if not torch.compiler.is_compiling() and ops.takes(x):
            self.lay_out_both()
        w1, b1 = up() if up.weight.is_meta else (up.matrix, up.bias)  # a call takes longer, and matters when offloaded
        return ffn(x, FFNWeights(w1, b1, self.matrix, self.bias))


@torch.no_grad()
def _numbered_ffn(x: Tensor, number: int, w1: Tensor, b1: Tensor | None, w2: Tensor) -> Tensor:
    """[tokens, d] for x [tokens, d], by the `FoldedFFN` of that number; dense weights as in its `forward`."""
    ffn: FoldedFFN = numbered(number)
    dense = FFNWeights(w1, b1, w2, None)
    ready = ffn._prepared(x, dense)
    if ready is not None:
        return ready(x.contiguous())
    warnings.warn(
        "a compiled model has folded FFNs whose weights do not lie as the CPU kernels read them, which makes it slow; "
        "call tardis_llm.decoding.prepare_decoding(model) before it is compiled.",
        RuntimeWarning,
        stacklevel=2,
    )
    return ffn._run(x, dense)


ops.library.define("numbered_ffn(Tensor x, int number, Tensor w1, Tensor? b1, Tensor w2) -> Tensor")
ops.library.impl("numbered_ffn", _numbered_ffn, "CPU")


@torch.library.register_fake("tardis::numbered_ffn")
def _(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x)
