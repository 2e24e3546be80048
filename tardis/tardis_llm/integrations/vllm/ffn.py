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
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from ...allocator import contiguous_in_huge_pages
from ...errors import CheckpointError
from ...families.sites import set_module
from ...families.table import Family
from ...ffn.weights import DenseFFN, FoldedWeights, FoldFormat
from ...runtime.backend import dense_ffn, linear
from ...runtime.matrices import Fold
from ...runtime.operators import library
from ...runtime.state import FoldState
from .prefill import Choice

library.define("served_ffn(Tensor x, str name) -> Tensor")


def _served_ffn(x: Tensor, name: str) -> Tensor:
    """[tokens, d] for x [tokens, d], by the FFN of that name in the engine that is running."""
    ffn: ServedFFN = get_forward_context().no_compile_layers[name]
    return ffn(x)


library.impl("served_ffn", _served_ffn, "CompositeExplicitAutograd")


@torch.library.register_fake("tardis::served_ffn")
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


class ServedFFN(FoldState):
    """What a folded FFN stores beside the dense weights, or a rank's share of it.

    Args:
        form: the format.
        up, down: vLLM's projections, which say what share a rank has.
        choice: when to go through them.
        dtype: of the model.
    """

    def __init__(self, form: FoldFormat, up: LinearBase, down: LinearBase, choice: Choice, dtype: torch.dtype) -> None:
        d, neurons = up.input_size, up.weight.shape[0]
        ranks = up.output_size // neurons
        empty = FoldedWeights.empty(form, d, neurons, dtype, torch.get_default_device(), rows=d // ranks)
        super().__init__(empty)
        self._projections = up, down  # in a tuple, so that they are not registered twice
        self._choice = replace(choice, mode="folded") if self.stacked else choice
        self._whole, self.rank = ranks == 1, up.tp_rank if ranks > 1 else 0
        self._rows = slice(self.rank * (d // ranks), (self.rank + 1) * (d // ranks))

    def load(self, key: str, tensor: Tensor) -> None:
        """Fill a tensor from a whole one of the checkpoint, of which a rank takes its share.

        Raises:
            CheckpointError: there is no such tensor here, or it has another shape.
        """
        own = self.state_dict()
        if key not in own:
            raise CheckpointError(f"the weight files have a tensor tardis.{key} that config.json does not describe.")
        own[key].copy_(_share(tensor, own[key], self.rank, key))

    def prepare(self) -> None:
        """Lay out what is read whole for the kernels; when all is loaded, before any request."""
        dtype = self.fold.bias.dtype
        if self._whole or isinstance(self.fold, Fold):  # a share of a low-bit fold is multiplied in the stored order
            self.fold.lay_out(dtype)
        self.predictor.lay_out(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's term of the output, [tokens, d], for x [tokens, d]."""
        if self._choice.dense(len(x)):
            return dense_ffn(x, self._dense)
        y = self.prepared(x, self._dense)(x.contiguous())
        if not self._whole:
            y[:, self._rows] += linear(x, self.fold.current, self.fold.bias)
        return y

    def computed(self, weights: FoldedWeights) -> FoldedWeights:
        """All; without the fold where a rank has a share of it, whose outputs are others than those of fixing."""
        return weights if self._whole else replace(weights, fold=None, bias=None)

    @property
    def _dense(self) -> DenseFFN:
        """A rank's share of the dense weights; the bias behind the sum over ranks is with the first."""
        up, down = self._projections
        b2 = down.bias if self.rank == 0 else None
        return DenseFFN(up.weight, up.bias, down.weight.T, b2, self.activation)


class AsLoadedMethod(UnquantizedLinearMethod):
    """A linear layer whose weight stays as it was loaded, for our kernels; vLLM would pack it for its own."""

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Keep rows as they are."""
        layer.weight.data = contiguous_in_huge_pages(layer.weight.data)


class PassOnMethod(AsLoadedMethod):
    """The up projection of a folded FFN: passes its input on."""

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x itself."""
        return x


class FoldedDownMethod(UnquantizedLinearMethod):
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


def install_empty_fold(
    block: nn.Module, family: Family, form: FoldFormat, choice: Choice, config: VllmConfig, name: str
) -> ServedFFN:
    """Put an empty folded FFN into a block of a model that vLLM made.

    Args:
        block: with the parts that the table of families names.
        family: of the model.
        form: the format.
        choice: when FFNs are dense.
        config: of the engine.
        name: of the FFN in the checkpoint.
    """
    up: Any = block.get_submodule(family.up)
    down: Any = block.get_submodule(family.down)
    dtype = config.model_config.dtype
    ffn = ServedFFN(form, up, down, choice, dtype)
    for part in (up, down):
        part.skip_bias_add = False  # else Falcon adds the dense biases again
        if ffn.stacked:
            part.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    known = f"{name}.tardis"
    config.compilation_config.static_forward_context[known] = ffn
    up.quant_method, down.quant_method = PassOnMethod(), FoldedDownMethod(known, stacked=ffn.stacked)
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
