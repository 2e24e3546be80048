"""Names: of vLLM's architectures, of blocks in its models, and what is said of a model that it does not serve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...checkpoint.format import PREFIX, CheckpointConfig, stock_name
from ...errors import CheckpointError, UnsupportedModelError
from ...families.table import FAMILIES, NAMED, Family, family_of
from ...runtime.linears.placing import check_bits

#: the key of the mode of prompts, a `Prefill`, in vLLM's `additional_config`
PREFILL_OPTION = "tardis_prefill"


def architectures() -> list[str]:
    """`Tardis<Stock class>` of every causal family of the table, those that vLLM does not serve included."""
    return [f"{PREFIX}{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]}" for name, row in FAMILIES.items() if row.causal]


def check_served(config: PreTrainedConfig) -> Family:
    """The row of the table for a folded checkpoint's config.

    Raises:
        UnsupportedModelError: TARDIS does not fold such models, they are encoders, or vLLM has none.
        CheckpointError, InvalidInputError: see `linear_bits`.
    """
    family = family_of(config)
    if getattr(config, NAMED, None):
        raise UnsupportedModelError(
            f"config.json names the parts of this model's FFNs as {NAMED!r}, and vLLM serves families of TARDIS' table "
            "only; use transformers (`tardis generate`)."
        )
    if not family.causal:
        raise UnsupportedModelError(
            f"in vLLM, folded encoders such as {family.model_type} are not served; use transformers."
        )
    from vllm import ModelRegistry

    linear_bits(CheckpointConfig.read(config.quantization_config).linears)
    stock = stock_name(config)
    if stock not in ModelRegistry.get_supported_archs():
        served = (name.removeprefix(PREFIX) for name in architectures())
        choices = sorted(name for name in served if name in ModelRegistry.get_supported_archs())
        raise UnsupportedModelError(
            f"vLLM has no {stock or 'model of an unnamed class'}, so it cannot serve a fold of one. Of the families "
            f"that TARDIS folds it serves {', '.join(choices)}; with others use transformers (`tardis generate`)."
        )
    return family


def block_index(name: str, family: Family) -> int:
    """The number of the block that a module's full name in the model lies in.

    Raises:
        CheckpointError: it lies in none.
    """
    found = family.locate(name)
    if found is None:
        raise CheckpointError(
            f"config.json folds {name!r}, which is in no block of a {family.model_type} model; copy config.json anew, "
            "or fold the model again."
        )
    return found[0]


def linear_bits(linears: Mapping[str, int]) -> int | None:
    """The bits of the linear layers that are stored in few, by their names in the checkpoint; None if there are none.

    Raises:
        CheckpointError: they differ.
        InvalidInputError: nothing stores linear layers in so many bits, or what multiplies is not installed.
    """
    if not linears:
        return None
    bits = set(linears.values())
    if len(bits) > 1:
        raise CheckpointError(
            f"config.json has linear layers in {sorted(bits)} bits, and vLLM is served all in the same; fold the model "
            "again, or use transformers (`tardis generate`)."
        )
    check_bits(*bits)
    return bits.pop()


class Projections:
    """How the linear layers of a model of vLLM are stored, by their names in it.

    vLLM may have other names than the checkpoint has, and one layer for several, but for the projections of FFNs.

    Args:
        family: of the model.
        stacked: numbers of the blocks with low-bit weights in the place of dense ones.
        linears: names in the checkpoint of the linear layers in few bits: all but those of FFNs, and dense FFNs or not.
    """

    def __init__(self, family: Family, stacked: Iterable[int], linears: Iterable[str]) -> None:
        self._family, self._stacked = family, frozenset(stacked)
        self._few = {self._of_ffn(name) for name in linears} | {None}

    def empty(self, name: str) -> bool:
        """Whether a layer has no weight."""
        found = self._of_ffn(name)
        return found is not None and found[0] in self._stacked

    def in_few_bits(self, name: str) -> bool:
        """Whether a layer is in few bits, where some are."""
        return self._of_ffn(name) in self._few

    def _of_ffn(self, name: str) -> tuple[int, str] | None:
        """The block and the projection of its FFN that a layer is; None for other layers."""
        found = self._family.locate(name)
        return found if found and found[1] in self._family.linears else None
