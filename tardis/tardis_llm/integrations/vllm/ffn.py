"""A folded FFN among vLLM's layers, whole or one rank's share of it.

It sits in the places of the three parts that it stands for, as in transformers: up passes its input on, the activation
does nothing, and down returns the output. So each family's residuals, biases and all-reduce stay vLLM's own. With
tensor parallelism a rank has some of the neurons and some rows of the fold; the sum over ranks behind every down
projection puts both together.

To `torch.compile` an FFN is one operator, `tardis::served_ffn`, which finds its layer by name as vLLM's attention does:

    y = dense FFN of x              where `Choice` says so; the dense weights are there to be fixed with
    y = fold(x) + fixing(x)         else; the fold is a linear layer of vLLM, whose product on a CPU is in the same call
                                    of our kernels where a rank has it whole: measured, 1.03 to 1.2 times as fast
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, UnquantizedLinearMethod

from ...allocator import contiguous_in_huge_pages
from ...checkpoint.format import LayerFormat
from ...errors import CheckpointError
from ...families.sites import set_module
from ...families.table import Family
from ...ffn.activations import ACTIVATIONS
from ...ffn.packed import PackedMatrix
from ...ffn.weights import FFNWeights
from ...runtime.cpu import ops
from ...runtime.cpu.panels import Panels
from ...runtime.fixing import Fixing, packed_linear
from ...runtime.modules import LowBit
from ...runtime.reference import dense_ffn
from .linears import PanelsMethod
from .prefill import Choice

ops.library.define("served_ffn(Tensor x, str name) -> Tensor")


def _served_ffn(x: Tensor, name: str) -> Tensor:
    """[tokens, d] for x [tokens, d], by the FFN of that name in the engine that is running."""
    ffn: ServedFFN = get_forward_context().no_compile_layers[name]
    return ffn(x)


ops.library.impl("served_ffn", _served_ffn, "CompositeExplicitAutograd")


@torch.library.register_fake("tardis::served_ffn")
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


class ServedFFN(nn.Module):
    """What a folded FFN stores beside the dense weights, or a rank's share; its tensors are named as in `FoldedFFN`.

    Args:
        layer: the format.
        up, down: vLLM's projections, which say what share a rank has.
        choice: when to go through them.
        dtype: of the model.
        name: of the FFN in the checkpoint.
    """

    low: Tensor
    high: Tensor
    slope: Tensor
    offset: Tensor
    _fold: Panels | None = None

    def __init__(
        self, layer: LayerFormat, up: LinearBase, down: LinearBase, choice: Choice, dtype: torch.dtype, name: str
    ) -> None:
        super().__init__()
        self.layer, d, neurons = layer, up.input_size, up.weight.shape[0]
        self._dtype = dtype
        self._projections = up, down  # in a tuple, so that they are not registered twice
        self._choice = replace(choice, mode="folded") if layer.fallback_bits else choice
        ranks = up.output_size // neurons
        self.rank = up.tp_rank if ranks > 1 else 0
        stored = layer.empty(d, neurons, dtype, torch.device("meta"))
        self.predictor, self.remainder, self.down = stored.predictor, stored.remainder, stored.down
        for key in ("low", "high", "slope", "offset"):
            self.register_buffer(key, getattr(stored, key))
        self.to_empty(device=torch.get_default_device())
        if layer.fold_bits:
            self.fold = PackedFold(layer, d // ranks, d, dtype)
        else:
            settings = {"disable_tp": ranks == 1, "return_bias": False, "prefix": f"{name}.tardis.fold"}
            self.fold = ColumnParallelLinear(d, d, params_dtype=dtype, **settings)
        self.rows = slice(self.rank * (d // ranks), (self.rank + 1) * (d // ranks))
        self._at_once = ranks == 1 and self.low.device.type == "cpu"  # the kernels add whole folds in the same call
        if not layer.fold_bits:
            self.fold.quant_method = AsLoaded() if self._at_once else PanelsMethod()

    def load(self, key: str, tensor: Tensor) -> None:
        """Fill a tensor from a whole one of the checkpoint, of which a rank takes its share.

        Raises:
            CheckpointError: there is no such tensor here, or it has another shape.
        """
        own = self.state_dict()
        if key not in own:
            raise CheckpointError(f"the weight files have a tensor tardis.{key} that config.json does not describe.")
        own[key].copy_(_share(tensor, own[key], self.rank, key))

    def pack(self) -> None:
        """Put predictor and fold in panels, where the kernels take them so; when all is loaded, before any request."""
        self.predictor.pack(self._dtype)
        if not self._at_once:
            return
        if isinstance(self.fold, PackedFold):
            self.fold.pack(self._dtype)
        else:
            self._fold = ops.panels_of(self.fold.weight.data, self._dtype)
            if self._fold:
                self.fold.weight.data = self.fold.weight.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's term of the output, [tokens, d], for x [tokens, d]."""
        if self._choice.dense(len(x)):
            return dense_ffn(x, self._dense, ACTIVATIONS[self.layer.activation])
        y = self._fixing(x)
        if not self._at_once:
            y[:, self.rows] += self.fold(x)
        return y

    @property
    def _dense(self) -> FFNWeights:
        """A rank's share of the dense weights; the bias behind the sum over ranks is with the first."""
        up, down = self._projections
        return FFNWeights(up.weight, up.bias, down.weight.T, down.bias if self.rank == 0 else None)

    @cached_property
    def _fixing(self) -> Fixing:
        up, down = self._projections
        ranges = self.low, self.high, self.slope, self.offset
        w1: Tensor | PackedMatrix | None = up.weight.data
        w2: Tensor | PackedMatrix = down.weight.data
        if self.down is not None:
            w1, w2 = self.remainder.matrix if self.remainder else None, self.down.matrix
        fixing = Fixing(self.layer.activation, self.predictor.laid, ranges, up.bias, w1, w2)
        if not self._at_once:
            return fixing
        fold = self.fold.laid if isinstance(self.fold, PackedFold) else self._fold or self.fold.weight.data
        return replace(fixing, fold=fold, bias=self.fold.bias)


class PackedFold(LowBit):
    """A fold in few bits, or a rank's rows of it: `planes`, `scale`, and `bias` in the model's dtype.

    Args:
        layer: the format.
        rows: of the share.
        d: width.
        dtype: of the model.
    """

    def __init__(self, layer: LayerFormat, rows: int, d: int, dtype: torch.dtype) -> None:
        # such a matrix is shaped as the predictor of an FFN of so many neurons
        like = replace(layer, bits=layer.fold_bits or 0, fold_bits=None, fallback_bits=None)
        super().__init__(like.empty(d, rows, dtype, torch.device("meta")).predictor.matrix)
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device="meta"), requires_grad=False)
        self.to_empty(device=torch.get_default_device())

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # vLLM calls it with inputs
        """[tokens, rows] for x [tokens, d]."""
        return packed_linear(x, self.matrix, self.bias)


class AsLoaded(UnquantizedLinearMethod):
    """A linear layer whose weight stays as it was loaded, for our kernels; vLLM would pack it for its own."""

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Keep rows as they are."""
        layer.weight.data = contiguous_in_huge_pages(layer.weight.data)


class PassOn(AsLoaded):
    """The up projection of a folded FFN: passes its input on."""

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x itself."""
        return x


class Folded(UnquantizedLinearMethod):
    """The down projection of a folded FFN: gets the FFN's input x and returns its output.

    Args:
        ffn: the name by which the engine knows the FFN.
        stacked: whether low-bit weights stand for the dense ones.
    """

    def __init__(self, ffn: str, stacked: bool) -> None:
        super().__init__()
        self._ffn, self._stacked = ffn, stacked

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Lay the weight out neuron by neuron, [neurons, d], as fixing reads it."""
        if not self._stacked:
            layer.weight.data = contiguous_in_huge_pages(layer.weight.data.T)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., d] for x [..., d], biases included."""
        y: Tensor = torch.ops.tardis.served_ffn(x.reshape(-1, x.shape[-1]), self._ffn)
        return y.view(x.shape)


def install(
    block: nn.Module, family: Family, layer: LayerFormat, choice: Choice, config: VllmConfig, name: str
) -> ServedFFN:
    """Put an empty folded FFN into a block of a model that vLLM made.

    Args:
        block: with the parts that the table of families names.
        family: of the model.
        layer: the format.
        choice: when FFNs are dense.
        config: of the engine.
        name: of the FFN in the checkpoint.
    """
    up: Any = block.get_submodule(family.up)
    down: Any = block.get_submodule(family.down)
    dtype = config.model_config.dtype
    ffn = ServedFFN(layer, up, down, choice, dtype, name)
    for part in (up, down):
        part.skip_bias_add = False  # else Falcon adds the dense biases again
        if layer.fallback_bits:
            part.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    known = f"{name}.tardis"
    config.compilation_config.static_forward_context[known] = ffn
    up.quant_method, down.quant_method = PassOn(), Folded(known, stacked=bool(layer.fallback_bits))
    set_module(block, family.activation, nn.Identity())
    block.get_submodule(family.ffn).add_module("tardis", ffn)
    return ffn


def _share(whole: Tensor, part: Tensor, rank: int, key: str) -> Tensor:
    """A rank's share of a tensor: what of its rows, be they neurons or outputs, is shaped as `part`."""
    share = whole
    if whole.dim() == part.dim():
        for dimension, size in enumerate(part.shape):
            if whole.shape[dimension] > size:
                share = share.narrow(dimension, rank * size, size)
    if share.shape != part.shape:
        raise CheckpointError(
            f"tardis.{key} is {list(whole.shape)} in the weight files, and {list(part.shape)} is wanted. Copy "
            "config.json and weights from the same checkpoint."
        )
    return share
