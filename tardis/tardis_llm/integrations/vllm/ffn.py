"""A folded FFN in a model of vLLM: the whole FFN, or one rank's share of it under tensor parallelism.

It replaces the three parts of the dense FFN, as in transformers: the up projection passes its input on, the activation
does nothing, and the down projection returns the output of the folded FFN. So the residuals, biases and all-reduce of
each family stay those of vLLM. Of a gated FFN, whose parts do not always follow one another, `GatedFFN` takes the place
of the module around them; vLLM has gate and up projection in one layer, whose rows are in the order of `DenseFFN`. A
rank has some of the neurons and some rows of the fold; vLLM's sum over ranks behind every down projection adds up both.

For `torch.compile` an FFN is one operator, `tardis::served_ffn`, which finds its layer by name as vLLM's attention
does. It computes

    y = dense FFN of x              for calls that `Choice` sends through the dense weights, or what stands for them
    y = fold(x) + fixing(x)         for all others. Where a rank has the whole fold, one call of our kernels computes
                                    both terms, 1.03 to 1.2 times as fast as two
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, UnquantizedLinearMethod

from ...allocator import contiguous_in_huge_pages
from ...errors import CheckpointError, UnsupportedModelError
from ...families.sites import set_module
from ...families.table import Family
from ...ffn.weights import DenseFFN, FoldedWeights, FoldFormat
from ...runtime.backend import linear
from ...runtime.matrices import Fold
from ...runtime.operators import library
from ...runtime.state import BY_ROWS, FoldState
from .names import up_projection
from .prefill import Choice

#: tensors with a row, or a number, for each up-projection of a neuron: those of all gates, and then those of all ups
_PER_PROJECTION = ("predictor.", "remainder.", "slope")

library.define("served_ffn(Tensor x, str name) -> Tensor")


def _served_ffn(x: Tensor, name: str) -> Tensor:
    """Output [tokens, d] for x [tokens, d] of the FFN with a name in the engine that is running."""
    ffn: ServedFFN = get_forward_context().no_compile_layers[name]
    return ffn(x)


library.impl("served_ffn", _served_ffn, "CompositeExplicitAutograd")


@torch.library.register_fake("tardis::served_ffn")
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


class ServedFFN(FoldState):
    """A folded FFN, or a rank's share of one: what it stores beside the dense weights, and its forward.

    Args:
        form: how it is stored.
        up, down: the dense projections of vLLM, whose shapes tell the rank's share. Of a gated FFN, `up` is gate and
            up in one.
        choice: which calls go through the dense weights.
        dtype: of the model.

    Raises:
        UnsupportedModelError: the fold keeps neurons, and ranks would share it.
    """

    def __init__(self, form: FoldFormat, up: LinearBase, down: LinearBase, choice: Choice, dtype: torch.dtype) -> None:
        d, rows = up.input_size, up.weight.shape[0]
        neurons, ranks = rows // form.k, up.output_size // rows
        if form.kept and ranks > 1:
            raise UnsupportedModelError(
                "a fold that keeps neurons is not shared among processes; serve it with --tensor-parallel-size 1, or "
                "fold with --select dynamic."
            )
        empty = FoldedWeights.empty(form, d, neurons, dtype, torch.get_default_device(), rows=d // ranks)
        super().__init__(empty)
        self._projections = up, down  # in a tuple, so that they are not registered twice
        self._choice = choice
        self.k = form.k
        self._whole, self.rank = ranks == 1, up.tp_rank if ranks > 1 else 0
        self._rows = slice(self.rank * (d // ranks), (self.rank + 1) * (d // ranks))

    def load(self, key: str, tensor: Tensor) -> None:
        """Fill a tensor of this FFN, or the rank's share of it, from the tensor of the checkpoint.

        Args:
            key: name of the tensor behind `<ffn>.tardis.`.
            tensor: the whole tensor.

        Raises:
            CheckpointError: this FFN has no such tensor, or one of another shape.
        """
        own = self.state_dict()
        if key not in own:
            raise CheckpointError(f"the weight files have a tensor tardis.{key} that config.json does not describe.")
        parts = self.k if key.startswith(_PER_PROJECTION) else 1
        for part, whole in zip(own[key].chunk(parts), tensor.chunk(parts), strict=True):
            part.copy_(_share(whole, part, self.rank, key))

    def prepare(self) -> None:
        """Bring every matrix into the layout of the kernels. Call it when all tensors are loaded."""
        dtype = self.fold.bias.dtype
        for part, name in self._parts:
            # a rank's rows of a low-bit fold are multiplied as they are stored
            if part is not self.fold or self._whole or isinstance(part, Fold):
                part.lay_out(dtype, by_rows=name in BY_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's term of the output, [tokens, d], for x [tokens, d]; vLLM sums over ranks."""
        exact = self.exactly(x, self._dense, self._choice.if_quick) if self._choice.dense(len(x)) else None
        if exact is not None:
            return exact
        y = self.prepared(x, self._dense)(x.contiguous())
        if not self._whole:
            y[:, self._rows] += linear(x, self.fold.current, self.fold.bias)
        return y

    def computed(self, weights: FoldedWeights) -> FoldedWeights:
        """What the kernels compute: everything, or without the fold where a rank has only some rows of it.

        Those rows give some of the outputs, while fixing gives all, so the two terms are computed apart.
        """
        return weights if self._whole else replace(weights, fold=None, bias=None)

    @property
    def _dense(self) -> DenseFFN:
        """The rank's share of the dense weights. The first rank alone has b2, as outputs are summed over ranks."""
        up, down = self._projections
        b2 = down.bias if self.rank == 0 else None
        return DenseFFN(up.weight, up.bias, down.weight.t(), b2, self.activation)


class AsLoadedMethod(UnquantizedLinearMethod):
    """A linear layer whose weight keeps its layout for our kernels; vLLM would change it for its own."""

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Copy the weight into huge pages, in the layout that it has."""
        layer.weight.data = contiguous_in_huge_pages(layer.weight.data)


class PassOnMethod(AsLoadedMethod):
    """The up projection of a folded FFN: keeps the dense weight, and returns its input."""

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x."""
        return x


class FoldedDownMethod(UnquantizedLinearMethod):
    """The down projection of a folded FFN: keeps the dense weight, gets the FFN's input and returns its output.

    Args:
        ffn: the FFN's name in the engine.
        stacked: whether low-bit weights replace the dense ones.
    """

    def __init__(self, ffn: str, stacked: bool) -> None:
        super().__init__()
        self._ffn, self._stacked = ffn, stacked

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Transpose the weight to [neurons, d], as fixing reads it neuron by neuron."""
        if not self._stacked:
            layer.weight.data = contiguous_in_huge_pages(layer.weight.data.T)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Output [..., d] of the folded FFN for x [..., d], biases included."""
        y: Tensor = torch.ops.tardis.served_ffn(x.reshape(-1, x.shape[-1]), self._ffn)
        return y.view(x.shape)


class GatedFFN(nn.Module):
    """A folded FFN in the place of vLLM's module around a gated one; its projections keep their names in it.

    Args:
        family: of the model; it names the projections.
        up: gate and up projection, which keeps the dense weight and is not called.
        down: down projection, which returns the output of the folded FFN.
    """

    def __init__(self, family: Family, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        above = f"{family.ffn}."
        self._down = family.down.removeprefix(above)
        self.add_module(up_projection(family).removeprefix(above), up)
        self.add_module(self._down, down)

    def forward(self, x: Tensor) -> Tensor:
        """Output [..., d] of the folded FFN for x [..., d]."""
        y = self.get_submodule(self._down)(x)
        return y[0] if isinstance(y, tuple) else y  # beside a bias that is to be added later, which is None here


def install_empty_fold(
    block: nn.Module, family: Family, form: FoldFormat, choice: Choice, config: VllmConfig, name: str
) -> ServedFFN:
    """Replace the FFN in a block of a vLLM model by an empty folded one, which is returned.

    Args:
        block: the transformer block.
        family: of the model; it names the parts of the FFN.
        form: how the folded FFN is stored.
        choice: which calls go through the dense weights.
        config: of the engine.
        name: of the FFN in the checkpoint.
    """
    up, down = _projections(block, family, name)
    dtype = config.model_config.dtype
    ffn = ServedFFN(form, up, down, choice, dtype)
    for part in (up, down):
        part.skip_bias_add = False  # otherwise Falcon adds the dense biases again
        if ffn.stacked:
            part.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    known = f"{name}.tardis"
    config.compilation_config.static_forward_context[known] = ffn
    up.quant_method, down.quant_method = PassOnMethod(), FoldedDownMethod(known, stacked=ffn.stacked)
    if family.gated:
        set_module(block, family.ffn, GatedFFN(family, up, down))
    else:
        set_module(block, family.activation, nn.Identity())
    block.get_submodule(family.ffn).add_module("tardis", ffn)
    return ffn


def _projections(block: nn.Module, family: Family, name: str) -> tuple[Any, Any]:
    """Up and down projection of the FFN in a block of a vLLM model; of a gated FFN, `up` is gate and up in one.

    Raises:
        UnsupportedModelError: vLLM has gate and up apart, or gives a rank other rows than its share of each.
    """
    path = up_projection(family)
    if family.gated and not hasattr(block.get_submodule(family.ffn), path.removeprefix(f"{family.ffn}.")):
        raise UnsupportedModelError(
            f"vLLM has no {path} in the block of {name}, and a folded FFN needs gate and up projection in one layer. "
            "Use transformers (`tardis generate`)."
        )
    up: Any = block.get_submodule(path)
    if family.gated and up.weight.shape[0] < up.output_size and not isinstance(up, MergedColumnParallelLinear):
        raise UnsupportedModelError(
            f"vLLM shares {family.model_type} models among processes in a way that parts the gates of {name} from its "
            "ups. Serve it with --tensor-parallel-size 1."
        )
    return up, block.get_submodule(family.down)


def _share(whole: Tensor, part: Tensor, rank: int, key: str) -> Tensor:
    """A rank's share of a tensor: its slice in each dimension in which the whole is larger than `part`.

    Args:
        whole: the tensor of the checkpoint.
        part: the rank's own, whose shape counts.
        rank: of this process among those that share the FFN.
        key: name of the tensor, for the message.

    Raises:
        CheckpointError: no slice has the shape of `part`.
    """
    share = whole
    if whole.dim() == part.dim():
        for dimension, size in enumerate(part.shape):
            if whole.shape[dimension] > size:
                share = share.narrow(dimension, rank * size, size)
    if share.shape != part.shape:
        raise CheckpointError(
            f"tardis.{key} is {list(whole.shape)} in the weight files, and {list(part.shape)} in config.json. Copy "
            "config.json and weights from the same checkpoint."
        )
    return share
