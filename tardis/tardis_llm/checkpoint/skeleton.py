"""Empty models, folded as config.json says: loading fills them, and weight files are compared with them."""

from __future__ import annotations

import copy
import reprlib
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, TardisError
from ..families.linear import weight_of
from ..families.sites import FFNSite, find_ffns
from ..ffn.activations import kind
from ..ffn.weights import FoldedWeights, FoldFormat
from ..runtime.linears.lowbit import check_bits
from ..runtime.linears.placing import empty_head_like, empty_like, linear_layers, put_linears, untie_head
from ..runtime.modules import FoldedFFN
from ..runtime.placing import install
from .format import CheckpointConfig, HeadFormat, stock_name
from .names import resolve_name
from .old_linears import OldLinear

#: the most blocks of a model whose weight files are not known yet: no model has more, and making them takes minutes
_MOST_BLOCKS = 10_000


def skeleton(config: PreTrainedConfig, settings: CheckpointConfig) -> PreTrainedModel | None:
    """An empty model, folded and on the meta device, of the class that a checkpoint was saved from.

    Args:
        config: the model's, from config.json.
        settings: its `quantization_config`.

    Returns:
        The model; None where config.json names no class of transformers.

    Raises:
        CheckpointError: the config describes no model, or a fold that does not fit it.
    """
    named: Any = getattr(transformers, stock_name(config) or "-", None)
    if getattr(named, "config_class", None) is not type(config) or not issubclass(named, PreTrainedModel):
        return None
    own = copy.deepcopy(config)
    own._attn_implementation = "eager"  # has the same weights as all others, and is always installed
    try:
        with torch.device("meta"):
            model = named(own)
    except TardisError:
        raise
    except Exception as error:  # the library raises many kinds, all for the same reason
        raise CheckpointError(
            f"config.json describes no {named.__name__} that can be made ({error}); copy config.json anew."
        ) from error
    install_empty_layers(model, settings)
    return model


def install_empty_layers(model: PreTrainedModel, settings: CheckpointConfig) -> None:
    """Replace the layers that a checkpoint has folded, or in few bits, by empty folded FFNs and low-bit linear layers.

    Args:
        model: dense, on any device.
        settings: `quantization_config` of the checkpoint.

    Raises:
        CheckpointError: the model has no such layers, or they cannot have the described format.
    """
    formats = settings.formats()
    sites = {resolve_name(model, site.prefix, formats) or site.prefix: site for site in find_ffns(model)}
    unknown = sorted(set(formats) - set(sites))
    if unknown:
        raise CheckpointError(
            f"config.json folds {unknown[0]}, which this model does not have; copy config.json anew, or fold again."
        )
    for name, layer in formats.items():
        _check_fits(name, layer, sites[name])
        dense, device = sites[name].outline(), weight_of(sites[name].down).device
        empty = FoldedWeights.empty(layer, dense.d, dense.h, dense.w1.dtype, device)
        install(model, sites[name], FoldedFFN(empty))
    for name, bits in settings.linears.items():
        _install_empty_linear(model, name, bits, settings.linear_group_size)
    if (head := settings.head_format()) and settings.linear_group_size:
        _install_empty_head(model, head, settings.linear_group_size)
    untie_head(model)


def check_blocks(config: PreTrainedConfig, tensors: int | None) -> None:
    """Refuse a config with more blocks than there are tensors, before a model of so many is made.

    Args:
        config: the model's, from config.json.
        tensors: how many the weight files hold; None where the files are not known.

    Raises:
        CheckpointError: there are more blocks than tensors, or what config.json says is no number of blocks.
    """
    for blocks in (getattr(config, "num_hidden_layers", 0), getattr(config, "decoder_layers", 1)):
        if not isinstance(blocks, int) or blocks < 1 or blocks > (tensors or _MOST_BLOCKS):
            held = f"the weight files hold {tensors} tensors" if tensors else "no model has so many"
            raise CheckpointError(
                f"config.json says that the model has {reprlib.repr(blocks)} blocks, and {held}; copy config.json anew."
            )


def _check_fits(name: str, layer: FoldFormat, site: FFNSite) -> None:
    """Raise CheckpointError unless an FFN of the model can have the format that config.json gives it."""
    if kind(layer.activation) != kind(site.activation_kind):  # parameters are in weight files that are not read yet
        raise CheckpointError(
            f"config.json folds {name} with the activation {layer.activation}, and the model has "
            f"{site.activation_kind} there; copy config.json anew, or fold again."
        )
    if layer.gated != site.gated:
        raise CheckpointError(
            f"config.json says of {name} that its FFN has {'a' if layer.gated else 'no'} gate, which the model does "
            "not bear out; copy config.json anew, or fold again."
        )
    if layer.kept > site.intermediate_size:
        raise CheckpointError(
            f"config.json says that {layer.kept} neurons of {name} are kept, and it has {site.intermediate_size}; copy "
            "config.json anew, or fold again."
        )
    if layer.group_size > site.hidden_size:
        raise CheckpointError(
            f"config.json says that {layer.group_size} weights of {name} have one scale, and rows are "
            f"{site.hidden_size} wide; copy config.json anew, or fold again."
        )


def _install_empty_linear(model: PreTrainedModel, name: str, bits: int, group_size: int | None) -> None:
    """Replace a linear layer by an empty low-bit one; do nothing for a layer of a head that the model lacks."""
    for found, layer in _stored_layer(model, name, bits):
        check_bits(bits)
        empty = OldLinear(layer, bits) if group_size is None else empty_like(layer, bits, group_size)
        put_linears(model, {found: empty})


def _install_empty_head(model: PreTrainedModel, form: HeadFormat, group_size: int) -> None:
    """Replace the head by an empty one with a predictor; do nothing where the model lacks it."""
    for found, layer in _stored_layer(model, form.name, form.predictor_bits):
        bits = form.predictor_bits, form.remainder_bits
        put_linears(model, {found: empty_head_like(layer, bits, group_size, form.top)})


def _stored_layer(model: PreTrainedModel, name: str, bits: int) -> list[tuple[str, nn.Module]]:
    """Name and module of the dense linear layer that a checkpoint stores in few bits; none for a head's without it.

    Raises:
        CheckpointError: the model lacks another one.
    """
    dense = linear_layers(model)
    found = resolve_name(model, name, dense)
    if found is None and model.base_model is model and not name.startswith(f"{model.base_model_prefix}."):
        return []
    if found is None:
        raise CheckpointError(
            f"config.json stores {name} in {bits} bits, and this model has no such linear layer; copy config.json "
            "anew, or fold again."
        )
    return [(found, dense[found])]
