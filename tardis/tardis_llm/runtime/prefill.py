"""Choose which forwards of a folded model go through its folds, and which have every neuron computed.

    folded    all go through the folds: what is evaluated is what is served
    exact     single tokens, as in decoding, go through the folds, and prompts through the dense FFNs
    auto      up to so many tokens at once as folding is faster for go through the folds; the checkpoint records the
              number where it was measured, else it is `CROSSOVER`

A prompt costs dense arithmetic either way, while decoding costs bytes: dense prompts are exact, and folds still pay
where most of the time goes. Where low-bit weights stand for the dense ones, these make up the dense FFN, whose outputs
are as exact as they are; `auto` uses it where a kernel multiplies with them as they lie in no more time than folding
takes: in bf16, with AMX, and with AVX2 where many neurons are fixed.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InvalidInputError
from ..families.sites import named_blocks
from .placing import folded_ffns

Prefill = Literal["folded", "exact", "auto"]
#: tokens at once up to which folding is taken to be faster where nothing was recorded: so it was measured in vLLM with
#: d = 2048, h = 8192 and 5 % of the neurons fixed, on one thread: with 16 tokens the fold takes 0.9 of the time of the
#: dense weights as they lie here, neuron by neuron, and with 32 as long
CROSSOVER = 32
#: why prompts cannot be exact
STATIC = (
    "prefill exact needs the weights of every neuron, and this fold is static: it has those that it keeps. Use prefill "
    "auto or folded."
)
_HOOK = "_tardis_prefill"


def set_prefill(model: PreTrainedModel, mode: Prefill) -> None:
    """Choose the mode of all forwards from now on; that of a model that was just folded or loaded is `folded`.

    Args:
        model: folded, at least in parts.
        mode: one of `Prefill`.

    Raises:
        InvalidInputError: there is no such mode, or the fold is static and the mode is `exact`.

    Examples:
        >>> from tardis_llm.checkpoint.loading import load_model
        >>> dense, folded = load_model("model"), load_model("folded")
        >>> set_prefill(folded, "exact")
        >>> bool(torch.allclose(folded(windows).logits, dense(windows).logits, atol=1e-4))
        True
    """
    check_prefill(mode)
    if mode == "exact" and any(ffn.static for ffn in folded_ffns(model).values()):
        raise InvalidInputError(STATIC)
    choices = {"folded": None, "exact": _are_prompts, "auto": partial(_are_many, crossover(model))}
    for block in named_blocks(model).values():
        _note_lengths(block, mode == "exact")
    for ffn in folded_ffns(model).values():
        ffn.goes_dense = None if ffn.static else choices[mode]  # all that a static fold has, it always computes
        ffn.if_quick = mode == "auto"


def check_prefill(mode: str) -> None:
    """Raise InvalidInputError for a mode that does not exist.

    Args:
        mode: as a user gave it.
    """
    if mode not in get_args(Prefill):
        raise InvalidInputError(f"prefill {mode!r} is asked for; give one of {', '.join(get_args(Prefill))}.")


def crossover(model: PreTrainedModel) -> int:
    """The most tokens at once for which folding is taken to be faster: what was recorded, else `CROSSOVER`."""
    config = getattr(model.config, "quantization_config", None)
    recorded: int | None = getattr(config, "crossover", None)
    return CROSSOVER if recorded is None else recorded


def _are_many(limit: int, x: Tensor) -> bool:
    """Whether inputs x [..., d] are more than so many tokens."""
    return x.numel() // x.shape[-1] > limit


def _are_prompts(x: Tensor) -> bool:
    """Whether inputs x [batch, tokens, d] have several tokens of a sequence.

    Some families give their FFN all tokens in one row, [batch * tokens, d]: then the inputs of its block decide.
    """
    return (x.shape[-2] if x.dim() > 2 else _BLOCK.tokens) > 1


class _Block(threading.local):
    """The inputs [batch, tokens, d] of the block that a thread is in."""

    tokens = 1


_BLOCK = _Block()


def _note_lengths(block: nn.Module, on: bool) -> None:
    """Have each call of a block note how many tokens of a sequence it gets, or with `on` false no longer."""
    handle = block.__dict__.pop(_HOOK, None)
    if handle is not None:
        handle.remove()
    if on:
        setattr(block, _HOOK, block.register_forward_pre_hook(_note, with_kwargs=True))


def _note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = args[0] if args else kwargs["hidden_states"]
    _BLOCK.tokens = hidden.shape[-2]
