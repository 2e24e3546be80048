"""Names of architectures, blocks and linear layers in vLLM, and the check that vLLM serves a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...checkpoint.format import OLD_LINEARS, PREFIX, CheckpointConfig, HeadFormat, stock_name
from ...errors import CheckpointError, UnsupportedModelError
from ...families.table import FAMILIES, NAMED, Family, family_of
from ...runtime.linears.lowbit import check_bits

#: key in vLLM's `additional_config` of the prefill mode, a `runtime.prefill.Prefill`
PREFILL_OPTION = "tardis_prefill"


def architectures() -> list[str]:
    """The names `Tardis<Stock>` of all causal families in the table, including those that vLLM does not serve."""
    return [f"{PREFIX}{_stock(row)}" for row in FAMILIES.values() if row.language_model]


def _stock(family: Family) -> str:
    """The class of transformers that generates text with the models of a family."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]


def check_served(config: PreTrainedConfig) -> Family:
    """Check that vLLM can serve a folded checkpoint, and return its family.

    Args:
        config: the model's, with `quantization_config`.

    Raises:
        UnsupportedModelError: the family is unknown, named by the user, of encoders, or not in vLLM.
        CheckpointError: linear layers are stored in different numbers of bits, or in a format of old.
        InvalidInputError: the bits of linear layers are not supported.
    """
    family = family_of(config)
    if getattr(config, NAMED, None):
        raise UnsupportedModelError(
            f"config.json names the parts of this model's FFNs as {NAMED!r}, and vLLM serves families of TARDIS' table "
            "only; use transformers (`tardis generate`)."
        )
    if not family.language_model:
        raise UnsupportedModelError(
            f"vLLM does not serve folded encoders such as {family.model_type}; use transformers."
        )
    from vllm import ModelRegistry

    linear_form(CheckpointConfig.read(config.quantization_config))
    stock = stock_name(config)
    if stock not in ModelRegistry.get_supported_archs():
        stocks = {_stock(row) for row in FAMILIES.values() if row.language_model}
        choices = sorted(stocks.intersection(ModelRegistry.get_supported_archs()))
        raise UnsupportedModelError(
            f"vLLM has no {stock or 'model of an unnamed class'}, so it cannot serve a fold of one. Of the families "
            f"that TARDIS folds it serves {', '.join(choices)}; with others use transformers (`tardis generate`)."
        )
    return family


def block_index(name: str, family: Family) -> int:
    """The number of the block in which the checkpoint folds an FFN.

    Args:
        name: of the FFN in the checkpoint.
        family: of the model.

    Raises:
        CheckpointError: the name is that of no module in a block.
    """
    found = family.locate(name)
    if found is None:
        raise CheckpointError(
            f"config.json folds {name!r}, which is in no block of a {family.model_type} model; copy config.json anew, "
            "or fold the model again."
        )
    return found[0]


def up_projection(family: Family) -> str:
    """Path from a block of a vLLM model to the up projection; vLLM puts a gate projection into the same layer."""
    return f"{family.ffn}.gate_up_proj" if family.gate else family.up


class LinearForm(NamedTuple):
    """How the linear layers of a checkpoint are stored in few bits, and the head, if it has a predictor."""

    bits: int
    group_size: int
    head: HeadFormat | None = None


def linear_form(checkpoint: CheckpointConfig) -> LinearForm | None:
    """How linear layers are stored in few bits; None if none is.

    Raises:
        CheckpointError: layers have different numbers of bits, or are in a format of old.
        InvalidInputError: the bits are not supported.
    """
    bits, size = sorted(set(checkpoint.linears.values())), checkpoint.linear_group_size
    if not bits:
        return None
    if len(bits) > 1:
        raise CheckpointError(
            f"config.json has linear layers in {bits} bits, and in vLLM all must have the same; fold the model again, "
            "or use transformers (`tardis generate`)."
        )
    if size is None:
        raise CheckpointError(
            f"this checkpoint has linear layers as format version {OLD_LINEARS} had them, which vLLM no longer serves. "
            "Load it with transformers (import tardis_llm first), and save_pretrained it anew."
        )
    check_bits(bits[0])
    return LinearForm(bits[0], size, checkpoint.head_format())


class Projections:
    """How the linear layers of a vLLM model are stored, by their names in vLLM.

    Projections of FFNs have the same names within a block as in the checkpoint, but for gate and up, which are one
    layer. Other layers may have other names, and one layer of vLLM may contain several of the checkpoint, so they are
    all taken to be stored alike.

    Args:
        family: of the model.
        stacked: numbers of the blocks in which low-bit weights replace the dense weights of the FFN.
        linears: names in the checkpoint of the linear layers that are stored in few bits. Either no layer is, or all
            outside the FFNs are, and those of dense FFNs may be.
    """

    def __init__(self, family: Family, stacked: Iterable[int], linears: Iterable[str]) -> None:
        self._family, self._stacked = family, frozenset(stacked)
        self._few = {self._of_ffn(name) for name in linears} | {None}

    def empty(self, name: str) -> bool:
        """Whether a layer is a projection of an FFN whose dense weights low-bit ones replace."""
        found = self._of_ffn(name)
        return found is not None and found[0] in self._stacked

    def in_few_bits(self, name: str) -> bool:
        """Whether a layer is stored in few bits, in a model where some are."""
        return self._of_ffn(name) in self._few

    def _of_ffn(self, name: str) -> tuple[int, str] | None:
        """The block's number and the path in it, if a layer is a projection of an FFN; None for other layers.

        Gate and up are stored alike, so the layer that vLLM has for both goes by the path of up.
        """
        index, path = self._family.locate(name) or (0, "")
        if path == up_projection(self._family):
            path = self._family.up
        return (index, path) if path in self._family.linears else None
