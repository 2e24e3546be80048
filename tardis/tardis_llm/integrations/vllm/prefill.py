"""The prefill modes of `runtime.prefill` in vLLM, whose engine puts tokens of many requests into one call.

A call of an FFN has all tokens of one step of the engine: prompts, and single tokens that are decoded. It goes through
the folds or through the dense weights as a whole. What decides is how many tokens it has, or whether it has a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from ...errors import InvalidInputError
from ...runtime.prefill import STATIC, check_prefill
from .config import TardisConfig
from .names import PREFILL_OPTION


@dataclass(frozen=True)
class Choice:
    """Which calls go through the dense FFNs.

    Attributes:
        mode: a `runtime.prefill.Prefill`.
        crossover: the most tokens of a call that mode `auto` sends through the folds.
    """

    mode: str
    crossover: int

    @classmethod
    def of(cls, config: VllmConfig, settings: TardisConfig) -> Choice:
        """The choice that `additional_config` of the engine asks for; default: mode `auto`.

        Raises:
            InvalidInputError: there is no such mode, or this engine cannot have it.
        """
        given = config.additional_config
        mode = given.get(PREFILL_OPTION, "auto") if isinstance(given, dict) else "auto"
        check_prefill(mode)
        if mode == "exact" and any(layer.kept and not layer.mixed for layer in settings.layers.values()):
            raise InvalidInputError(STATIC)
        if mode == "exact" and config.device_config.device_type != "cpu" and not config.model_config.enforce_eager:
            raise InvalidInputError(
                "prefill exact looks at the requests of each call, which CUDA graphs cannot; use prefill auto or "
                "--enforce-eager."
            )
        return cls(mode, settings.crossover)

    @property
    def if_quick(self) -> bool:
        """Whether calls that would go through low-bit weights for the dense ones are folded where that is faster."""
        return self.mode == "auto"

    def dense(self, tokens: int) -> bool:
        """Whether the running call, which has a number of tokens, goes through the dense FFNs."""
        if self.mode == "auto":
            return tokens > self.crossover
        return self.mode == "exact" and _has_prompt(get_forward_context().attn_metadata, tokens)


def _has_prompt(metadata: Any, tokens: int) -> bool:
    """Whether any request has more than one token in a call.

    Args:
        metadata: vLLM's attention metadata; empty in calls that only try the model out.
        tokens: of the call.
    """
    layers = metadata[0] if isinstance(metadata, list) else metadata
    if not layers:
        return tokens > 1
    longest: int = next(iter(layers.values())).max_query_len
    return longest > 1
