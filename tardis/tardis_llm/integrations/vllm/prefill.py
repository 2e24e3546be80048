"""Which calls of a served model's FFNs are folded: the modes of `runtime.prefill`, for an engine that mixes requests.

A call has the tokens of one step of the engine, prompts and single ones of many requests together, and goes one way as
a whole: by how many tokens it has, or by whether there is more than one of any request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from ...errors import InvalidInputError
from ...runtime.prefill import check_prefill
from .config import TardisConfig
from .names import PREFILL_OPTION


@dataclass(frozen=True)
class Choice:
    """When FFNs are dense.

    Attributes:
        mode: a `Prefill`.
        crossover: tokens of a call that `auto` folds, at most.
    """

    mode: str
    crossover: int

    @classmethod
    def of(cls, config: VllmConfig, settings: TardisConfig) -> Choice:
        """As `additional_config` says, `auto` without.

        Raises:
            InvalidInputError: there is no such mode, or it cannot be with this model or engine.
        """
        given = config.additional_config
        mode = given.get(PREFILL_OPTION, "auto") if isinstance(given, dict) else "auto"
        check_prefill(mode, stacked=any(layer.fallback_bits for layer in settings.layers.values()))
        if mode == "exact" and config.device_config.device_type != "cpu" and not config.model_config.enforce_eager:
            raise InvalidInputError(
                "prefill exact goes by what a call has, which CUDA graphs cannot; use prefill auto or --enforce-eager."
            )
        return cls(mode, settings.crossover)

    def dense(self, tokens: int) -> bool:
        """Whether the running call, of so many tokens, goes through the dense FFNs."""
        if self.mode == "auto":
            return tokens > self.crossover
        return self.mode == "exact" and _has_prompt(get_forward_context().attn_metadata, tokens)


def _has_prompt(metadata: Any, tokens: int) -> bool:
    """Whether a request has more than one token in a call; of calls that only try the model out vLLM says nothing."""
    layers = metadata[0] if isinstance(metadata, list) else metadata
    if not layers:
        return tokens > 1
    longest: int = next(iter(layers.values())).max_query_len
    return longest > 1
