"""Names: of vLLM's architectures, of blocks in its models, and what is said of a model that it does not serve."""

from __future__ import annotations

import re

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...architectures import FAMILIES, Family, family_of
from ...checkpoint import PREFIX
from ...errors import CheckpointError, UnsupportedModelError

#: the key of the mode of prompts, a `Prefill`, in vLLM's `additional_config`
PREFILL_OPTION = "tardis_prefill"


def architectures() -> list[str]:
    """`Tardis<Stock class>` of every causal family of the table, those that vLLM does not serve included."""
    return [f"{PREFIX}{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]}" for name, row in FAMILIES.items() if row.causal]


def stock_name(config: PreTrainedConfig) -> str:
    """The stock class that a checkpoint's config names."""
    named = (config.architectures or [""])[0]
    return str(named.removeprefix(PREFIX))


def check_served(config: PreTrainedConfig) -> Family:
    """The row of the table for a folded checkpoint's config.

    Raises:
        UnsupportedModelError: TARDIS does not fold such models, they are encoders, vLLM has none, or linear layers
            outside the FFNs are in few bits.
    """
    from vllm import ModelRegistry

    family = family_of(config)
    if not family.causal:
        raise UnsupportedModelError(
            f"in vLLM, folded encoders such as {family.model_type} are not served; use transformers."
        )
    settings = config.quantization_config
    linears = settings["linears"] if isinstance(settings, dict) and "linears" in settings else {}
    if linears:
        raise UnsupportedModelError(
            f"in vLLM, linear layers outside the FFNs cannot be in few bits yet, and here {next(iter(linears))} and "
            f"{len(linears) - 1} others are. Fold without --linears, or use transformers (`tardis generate`)."
        )
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
    found = re.search(rf"(?:^|\.){re.escape(family.layers)}\.(\d+)(?:\.|$)", name)
    if found is None:
        raise CheckpointError(
            f"config.json folds {name!r}, which is in no block of a {family.model_type} model; copy config.json anew, "
            "or fold the model again."
        )
    return int(found[1])
