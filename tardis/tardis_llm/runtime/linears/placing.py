"""Find the linear layers of a model outside its FFNs, lm_head included, and put others in their places.

The others store their weights in few bits, or multiply by our kernels. Dense FFNs are included where a caller says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from ...errors import InvalidInputError
from ...families.linear import bias_of, is_linear, weight_of
from ...families.sites import ffn_linear_names, set_module
from ..cpu.library import available
from ..stored import Stored
from .dense import ThroughKernels, kernel_linear
from .head import PredictedHead
from .lowbit import LowBitLinear


def put_linears(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put layers in the places of a model that they are named by; returns those that were there, to be put back."""
    before = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        set_module(model, name, layer)
    return before


def through_kernels(model: PreTrainedModel, *, ffn: bool = False) -> dict[str, nn.Module]:
    """Dense linear layers by name that share a model's weights and multiply by our kernels; `put_linears` puts them in.

    Empty where the kernels are not built. Weights that are stored transposed are copied; layers that multiply by the
    kernels already are left out.
    """
    layers = linear_layers(model, ffn=ffn) if available() else {}
    return {name: kernel_linear(layer) for name, layer in layers.items() if not isinstance(layer, ThroughKernels)}


def linear_layers(model: PreTrainedModel, *, ffn: bool = False) -> dict[str, nn.Module]:
    """The dense linear layers of a model by name, those of its dense FFNs only with `ffn`."""
    left_out = set() if ffn else ffn_linear_names(model)
    found = model.named_modules()
    return {name: layer for name, layer in found if is_linear(layer) and name not in left_out}


def low_bit_linears(model: nn.Module) -> dict[str, LowBitLinear]:
    """The linear layers of a model that are stored in few bits, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowBitLinear)}


def predicted_heads(model: nn.Module) -> dict[str, PredictedHead]:
    """The head of a model by its name, if it has a predictor: one, or none."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PredictedHead)}


def untie_head(model: PreTrainedModel) -> None:
    """Tell transformers that the head no longer shares the embedding's weight, if it was stored in few bits.

    Such a head cannot be resized either, and a model whose embedding was resized alone would be lost.
    """
    head = model.get_output_embeddings()
    if isinstance(head, Stored) and not isinstance(head, ThroughKernels):
        model.resize_token_embeddings = refuse_resizing
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def refuse_resizing(*sizes: object, **options: object) -> None:
    """Stand in for `resize_token_embeddings` in a model whose head is stored in few bits.

    Raises:
        InvalidInputError: always.
    """
    raise InvalidInputError(
        "the head of this model is stored in few bits, and cannot be resized. Resize the embeddings of the dense model "
        "before it is folded, or fold it without --linears."
    )


def empty_like(layer: nn.Module, bits: int, group_size: int) -> LowBitLinear:
    """A low-bit layer without content, of the shape of a dense layer, whose bias it takes."""
    weight = weight_of(layer)
    shape = weight.shape[0], weight.shape[1]
    return LowBitLinear.empty(shape, bias_of(layer), bits, group_size, weight.dtype, weight.device)


def empty_head_like(layer: nn.Module, bits: tuple[int, int], group_size: int, top: int) -> PredictedHead:
    """A head without content, of the shape of a dense layer, whose bias it takes; see `PredictedHead.empty`."""
    weight = weight_of(layer)
    shape = weight.shape[0], weight.shape[1]
    return PredictedHead.empty(shape, bias_of(layer), bits, group_size, top, weight.dtype, weight.device)
