"""Find the linear layers of a model outside its FFNs, lm_head included, and put others in their places.

The others store their weights in few bits, or multiply by our kernels. Dense FFNs are included where a caller says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from ...errors import InvalidInputError
from ...families.linear import bias_of, is_linear, weight_of
from ...families.sites import ffn_linear_names, set_module
from ...report import LinearsReport
from ..cpu.library import available
from . import LOW_BIT_LAYERS
from .dense import ThroughKernels, kernel_linear
from .lowbit import LowBitLinear
from .nf4 import Nf4Linear


def quantise_linears(model: PreTrainedModel, bits: int, *, ffn: bool = False) -> LinearsReport:
    """Store the linear layers of a model in few bits, in place: all outside the FFNs, lm_head included.

    A head that shares its weight with the embedding gets a copy of its own; the embedding stays as it is.

    Args:
        model: dense or folded.
        bits: in `LOW_BIT_LAYERS`.
        ffn: also store dense FFNs in few bits.

    Returns:
        Layers, and bytes before and after.

    Raises:
        InvalidInputError: see `low_bit_copies`.

    Examples:
        >>> report = quantise_linears(model, 8)
        >>> report.layers, report.stored < report.dense
        (5, True)
    """
    layers = low_bit_copies(model, bits, ffn=ffn)
    embeddings = {module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Embedding)}
    before = [part for layer in put_linears(model, layers).values() for part in layer.parameters()]
    untie_head(model)
    dense, stored = (sum(part.nbytes for part in parts) for parts in (before, layers.values()))
    return LinearsReport(bits, len(layers), dense, stored, sum(p.nbytes for p in before if p.data_ptr() in embeddings))


def low_bit_copies(model: PreTrainedModel, bits: int, *, ffn: bool = False) -> dict[str, LowBitLinear]:
    """Low-bit copies of a model's linear layers by name; `put_linears` puts them in.

    Args:
        model: dense or folded.
        bits: in `LOW_BIT_LAYERS`.
        ffn: also copy the layers of dense FFNs.

    Raises:
        InvalidInputError: see `check_bits`, or a weight is not finite.
    """
    check_bits(bits)
    layers = linear_layers(model, ffn=ffn)
    return {name: LOW_BIT_LAYERS[bits].of(weight_of(layer), bias_of(layer)) for name, layer in layers.items()}


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


def untie_head(model: PreTrainedModel) -> None:
    """Tell transformers that the head no longer shares the embedding's weight, if it was stored in few bits.

    Such a head cannot be resized either, and a model whose embedding was resized alone would be lost.
    """
    if isinstance(model.get_output_embeddings(), LowBitLinear):
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


def empty_like(layer: nn.Module, bits: int) -> LowBitLinear:
    """A low-bit layer without content, of the shape of a dense layer, whose bias it takes."""
    weight = weight_of(layer)
    return LOW_BIT_LAYERS[bits].empty((weight.shape[0], weight.shape[1]), bias_of(layer), weight.dtype, weight.device)


def check_bits(bits: int) -> None:
    """Raise InvalidInputError where no layer stores its weight in so many bits, or its kernels are not installed."""
    if bits not in LOW_BIT_LAYERS:
        raise InvalidInputError(f"linear layers in {bits} bits are asked for; give one of {sorted(LOW_BIT_LAYERS)}.")
    if bits == Nf4Linear.bits and importlib.util.find_spec("bitsandbytes") is None:
        raise InvalidInputError(
            "linear layers in int4 need bitsandbytes, which is not installed. Run pip install 'tardis-llm[quant]', or "
            "store them in int8, which needs nothing more."
        )
