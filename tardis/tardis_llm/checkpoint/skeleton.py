"""Models without content, folded as config.json says: what loading fills, and what weight files are compared with."""

from __future__ import annotations

import copy
import reprlib
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, TardisError
from ..families.sites import FFNSite, find_ffns
from ..ffn.weights import FoldedWeights, FoldFormat
from ..runtime.linears.placing import check_bits, empty_like, linear_layers, put_linears, untie_head
from ..runtime.modules import FoldedFFN
from ..runtime.placing import install
from .format import CheckpointConfig, stock_name
from .names import spelled

#: blocks of a model whose weight files are not known yet: more would take minutes to make, and no model has them
_MOST_BLOCKS = 10_000


def skeleton(config: PreTrainedConfig, settings: CheckpointConfig) -> PreTrainedModel | None:
    """The model that a checkpoint was saved from, on meta and folded; None where config.json names no class of it.

    Args:
        config: of the family.
        settings: of the fold.

    Raises:
        CheckpointError: the config describes no model, or a fold that does not fit it.
    """
    named: Any = getattr(transformers, stock_name(config) or "-", None)
    if getattr(named, "config_class", None) is not type(config) or not issubclass(named, PreTrainedModel):
        return None
    own = copy.deepcopy(config)
    own._attn_implementation = "eager"  # the weights are the same, and no other needs to be installed
    try:
        with torch.device("meta"):
            model = named(own)
    except TardisError:
        raise
    except Exception as error:  # the library raises many kinds, all for the same reason
        raise CheckpointError(
            f"config.json describes no {named.__name__} that can be made ({error}); copy config.json anew."
        ) from error
    install_folds(model, settings)
    return model


def install_folds(model: PreTrainedModel, settings: CheckpointConfig) -> None:
    """Put empty folded FFNs and low-bit linear layers into a model, in place of those that the checkpoint has so.

    Raises:
        CheckpointError: the model has no such layers, or config.json describes them as what they cannot be.
    """
    formats = settings.formats()
    sites = {spelled(model, site.prefix, formats) or site.prefix: site for site in find_ffns(model)}
    unknown = sorted(set(formats) - set(sites))
    if unknown:
        raise CheckpointError(
            f"config.json folds {unknown[0]}, which this model does not have; copy config.json anew, or fold again."
        )
    for name, layer in formats.items():
        _check_fits(name, layer, sites[name])
        dense = sites[name].weights()
        empty = FoldedWeights.empty(layer, dense.d, dense.h, dense.w1.dtype, dense.w1.device)
        install(model, sites[name], FoldedFFN(empty))
    for name, bits in settings.linears.items():
        _install_empty_linear(model, name, bits)
    untie_head(model)


def check_blocks(config: PreTrainedConfig, tensors: int | None) -> None:
    """Refuse a config with more blocks than there are tensors, before a model of so many is made.

    Args:
        config: of the family.
        tensors: in the weight files; None where these are not known.

    Raises:
        CheckpointError: it has.
    """
    blocks = getattr(config, "num_hidden_layers", 0)
    if not isinstance(blocks, int) or blocks < 1 or blocks > (tensors or _MOST_BLOCKS):
        held = f"the weight files hold {tensors} tensors" if tensors else "no model has so many"
        raise CheckpointError(
            f"config.json says that the model has {reprlib.repr(blocks)} blocks, and {held}; copy config.json anew."
        )


def _check_fits(name: str, layer: FoldFormat, site: FFNSite) -> None:
    """Raise CheckpointError where a format is not one that the FFN can have."""
    if layer.activation != site.activation_kind:
        raise CheckpointError(
            f"config.json folds {name} with the activation {layer.activation}, and the model has "
            f"{site.activation_kind} there; "
            "copy config.json anew, or fold again."
        )
    if layer.group_size > site.hidden_size:
        raise CheckpointError(
            f"config.json says that {layer.group_size} weights of {name} have one scale, and rows are "
            f"{site.hidden_size} wide; copy config.json anew, or fold again."
        )


def _install_empty_linear(model: PreTrainedModel, name: str, bits: int) -> None:
    """Put an empty low-bit layer in the place of a linear layer; a model without its head leaves out those of that."""
    dense = linear_layers(model)
    found = spelled(model, name, dense)
    if found is None and model.base_model is model and not name.startswith(f"{model.base_model_prefix}."):
        return
    if found is None:
        raise CheckpointError(
            f"config.json stores {name} in {bits} bits, and this model has no such linear layer; copy config.json "
            "anew, or fold again."
        )
    check_bits(bits)
    with torch.device("cpu"):  # it rounds a row to learn the shapes, which is slow on meta
        layer = empty_like(dense[found], bits)
    put_linears(model, {found: layer})
