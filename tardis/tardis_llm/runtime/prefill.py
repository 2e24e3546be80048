"""Which forwards of a folded model go through its folds, and which through its dense FFNs.

    folded    every one: what is evaluated is what is served
    exact     single tokens only, as in decoding; prompts go through the dense FFNs
    auto      as many tokens at once as folding is faster for: as measured once and recorded in the checkpoint, else
              `CROSSOVER`

A prompt costs dense arithmetic either way, while decoding costs bytes: dense prompts are exact, and folds still pay
where most of the time goes. Dense weights have to be there: with low-bit ones in their place `auto` folds everything,
and `exact` cannot be.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InvalidInputError
from .ffn import folded_ffns

Prefill = Literal["folded", "exact", "auto"]
#: tokens at once up to which folding is taken to be faster where nothing was recorded: so it was measured in vLLM with
#: d = 2048, h = 8192 and 5 % of the neurons fixed, on one thread: with 16 tokens the fold takes 0.9 of the time of the
#: dense weights as they lie here, neuron by neuron, and with 32 as long
CROSSOVER = 32
_HOOK = "_tardis_prefill"


def set_prefill(model: PreTrainedModel, mode: Prefill) -> None:
    """Choose for all forwards from now on; a model that was just folded or loaded is `folded`.

    Args:
        model: folded, at least in parts.
        mode: one of `Prefill`.

    Raises:
        InvalidInputError: no such mode, or the dense weights are not there.
    """
    stacked = any(ffn.fallback for ffn in folded_ffns(model).values())
    check_prefill(mode, stacked)
    limit = crossover(model) if mode == "auto" else None
    _forget(model)
    if mode == "exact" or (mode == "auto" and not stacked):
        handle = model.register_forward_pre_hook(_Choice(model, limit), with_kwargs=True)
        setattr(model, _HOOK, handle)


def check_prefill(mode: str, stacked: bool) -> None:
    """See that a mode exists and can be had.

    Args:
        mode: as it was asked for.
        stacked: whether low-bit weights stand for dense ones.

    Raises:
        InvalidInputError: it does not, or cannot.
    """
    if mode not in get_args(Prefill):
        raise InvalidInputError(f"prefill {mode!r} is asked for; give one of {', '.join(get_args(Prefill))}.")
    if mode == "exact" and stacked:
        raise InvalidInputError(
            "prefill exact needs dense FFN weights, and this model stores low-bit ones in their place; use prefill "
            "folded, or fold again with --fallback bf16."
        )


def crossover(model: PreTrainedModel) -> int:
    """The most tokens at once for which folding is taken to be faster: what was recorded, else `CROSSOVER`."""
    config = getattr(model.config, "quantization_config", None)
    recorded: int | None = getattr(config, "crossover", None)
    return CROSSOVER if recorded is None else recorded


def _forget(model: PreTrainedModel) -> None:
    handle = getattr(model, _HOOK, None)
    if handle is not None:
        handle.remove()
        delattr(model, _HOOK)
    for ffn in folded_ffns(model).values():
        ffn.exact = False


class _Choice:
    """Before each forward, tells the folded FFNs whether it is exact.

    Args:
        model: folded.
        limit: tokens of a forward that is folded, at most; None folds what has one token per sequence.
    """

    def __init__(self, model: nn.Module, limit: int | None) -> None:
        self.ffns, self.limit = list(folded_ffns(model).values()), limit

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        shape = next((each.shape for each in given if isinstance(each, Tensor)), None)
        if shape is None:
            return  # the model says itself what it lacks
        batch, length = shape[:2]
        exact = length > 1 if self.limit is None else batch * length > self.limit
        for ffn in self.ffns:
            ffn.exact = exact
