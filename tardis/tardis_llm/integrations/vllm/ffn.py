"""A folded FFN among vLLM's layers, whole or one rank's share of it.

It sits in the places of the three parts that it stands for, as in transformers: up passes its input on, the activation
does nothing, and down returns the output. So each family's residuals, biases and all-reduce stay vLLM's own. With
tensor parallelism a rank has some of the neurons and some rows of the fold; the sum over ranks behind every down
projection puts both together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, UnquantizedLinearMethod

from ...architectures import Family, set_module
from ...checkpoint import LayerFormat
from ...errors import CheckpointError
from ...runtime import fixing  # noqa: F401 - defines tardis::fix
from ...runtime.ffn import LowBit


class ServedFFN(nn.Module):
    """What a folded FFN stores beside the dense weights, or a rank's share; its tensors are named as in `FoldedFFN`.

    Args:
        layer: the format.
        up: vLLM's up projection, which says what share a rank has.
        dtype: of the model.
        name: of the FFN in the checkpoint.
    """

    low: Tensor
    high: Tensor
    slope: Tensor
    offset: Tensor

    def __init__(self, layer: LayerFormat, up: LinearBase, dtype: torch.dtype, name: str) -> None:
        super().__init__()
        self.layer, d, neurons = layer, up.input_size, up.weight.shape[0]
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

    def load(self, key: str, tensor: Tensor) -> None:
        """Fill a tensor from a whole one of the checkpoint, of which a rank takes its share.

        Raises:
            CheckpointError: there is no such tensor here, or it has another shape.
        """
        own = self.state_dict()
        if key not in own:
            raise CheckpointError(f"the weight files have a tensor tardis.{key} that config.json does not describe.")
        own[key].copy_(_share(tensor, own[key], self.rank, key))

    def forward(self, x: Tensor, b1: Tensor | None, up: Tensor | None, down: Tensor | None) -> Tensor:
        """This rank's term of the output, [tokens, d], for x [tokens, d].

        Args:
            x: inputs.
            b1: [neurons].
            up, down: W1 and W2 transposed, [neurons, d] each; None where low-bit weights stand for them.
        """
        affine, y = self.fold(x), self.fix(x, b1, up, down)
        if affine.shape == y.shape:
            return affine + y
        y[:, self.rows] += affine
        return y

    def fix(self, x: Tensor, b1: Tensor | None, up: Tensor | None, down: Tensor | None) -> Tensor:
        """What fixing this rank's neurons adds to the output, [tokens, d]."""
        matrices = ([up], [down]) if self.down is None else (_tensors(self.remainder), _tensors(self.down))
        ranges, sizes = [self.low, self.high, self.slope, self.offset], [self.layer.group_size] * 3
        predictor, activation = _tensors(self.predictor), self.layer.activation
        y: Tensor = torch.ops.tardis.fix(x, activation, predictor, ranges, b1, *matrices, sizes)
        return y


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

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, rows] for x [tokens, d]."""
        y: Tensor = torch.ops.tardis.packed_linear(x, self.planes, self.scale, self.group_size, self.bias)
        return y


class PassOn(UnquantizedLinearMethod):
    """The up projection of a folded FFN: keeps its weight as it was loaded and passes its input on."""

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Nothing: fixing reads rows of the weight, which vLLM would pack for products."""

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x itself."""
        return x


class Folded(UnquantizedLinearMethod):
    """The down projection of a folded FFN: gets the FFN's input x and returns its output.

    Args:
        up: the up projection.
        ffn: the rest.
    """

    def __init__(self, up: LinearBase, ffn: ServedFFN) -> None:
        super().__init__()
        self._up, self._ffn = up, ffn

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Lay the weight out neuron by neuron, [neurons, d], as fixing reads it."""
        if self._ffn.down is None:
            layer.weight.data = layer.weight.data.T.contiguous()

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., d] for x [..., d]; the bias of the dense layer is in the fold's."""
        dense = (self._up.weight, layer.weight) if self._ffn.down is None else (None, None)
        y: Tensor = self._ffn(x.reshape(-1, x.shape[-1]), self._up.bias, *dense)
        return y.view(x.shape)


def install(block: nn.Module, family: Family, layer: LayerFormat, dtype: torch.dtype, name: str) -> ServedFFN:
    """Put an empty folded FFN into a block of a model that vLLM made.

    Args:
        block: with the parts that the table of families names.
        family: of the model.
        layer: the format.
        dtype: of the model.
        name: of the FFN in the checkpoint.
    """
    up: Any = block.get_submodule(family.up)
    down: Any = block.get_submodule(family.down)
    ffn = ServedFFN(layer, up, dtype, name)
    for part in (up, down):
        part.skip_bias_add = False  # else Falcon adds the dense biases, which are in the fold's
        if layer.fallback_bits:
            part.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    up.quant_method, down.quant_method = PassOn(), Folded(up, ffn)
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


def _tensors(matrix: LowBit | None) -> list[Tensor]:
    return [] if matrix is None else [matrix.planes, matrix.scale]
