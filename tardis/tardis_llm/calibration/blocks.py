"""Run one transformer block, or the head alone, through the forward of the whole model.

Calibration goes through the model block by block and keeps only the hidden states [batch, tokens, d] between two
blocks. No block is called directly, because the arguments of blocks (masks, rotary tables, ALiBi) and what they return
(a tensor or a tuple) differ between families and releases of transformers. Instead, the list of blocks is reduced to
one and the model is called: a hook replaces the block's input, another takes its output, and a private exception ends
the forward there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import InvalidInputError, UnsupportedModelError
from ..families.sites import FFNSite, block_at, layer_list, only_layer


class _BlockDone(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward once the block has run; caught in `run_block`."""


@torch.no_grad()
def run_block(
    model: PreTrainedModel,
    index: int,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Run one block on hidden states, exactly as the model would call it. Hooks inside the block fire.

    Args:
        model: a model of a supported family, in eval mode.
        index: number of the block, from 0.
        input_ids: [batch, tokens], the tokens that `hidden` was computed from; they set positions and masks.
        attention_mask: [batch, tokens], 1 for text and 0 for padding; None for no padding.
        hidden: [batch, tokens, d], input of the block, in the model's dtype; moved to the block's device. None for
            the embeddings of `input_ids`, which are the input of block 0.

    Returns:
        [batch, tokens, d] output of the block, without gradient, on the block's device.

    Raises:
        InvalidInputError: no such block, a model in training mode, or `hidden` of the wrong shape or dtype.
        UnsupportedModelError: the family is not in the table, or its model does not call the block.
    """
    captured: list[Tensor] = []

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        captured.append(_hidden_of(output))
        raise _BlockDone

    hook = block_at(model, index).register_forward_hook(leave)
    _run_until_done(model, index, input_ids, attention_mask, hidden, hook)
    return captured[0]


@torch.no_grad()
def ffn_input(
    model: PreTrainedModel,
    site: FFNSite,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Run one block on hidden states up to its FFN, and return the input of the FFN.

    Args:
        model, input_ids, attention_mask, hidden: as for `run_block`.
        site: an FFN of the model, not folded.

    Returns:
        [batch * tokens, d], in the model's dtype.

    Raises:
        InvalidInputError, UnsupportedModelError: as `run_block`; or the FFN gets the tokens in several parts.
    """
    captured: list[Tensor] = []

    def enter(up: nn.Module, args: tuple[Any, ...]) -> None:
        captured.append(args[0].reshape(-1, args[0].shape[-1]))
        raise _BlockDone

    hook = site.up.register_forward_pre_hook(enter)
    _run_until_done(model, site.index, input_ids, attention_mask, hidden, hook)
    _check_count(site, captured[0], input_ids)
    return captured[0]


def watch_ffn(
    model: PreTrainedModel, site: FFNSite, input_ids: Tensor, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one block on hidden states, and return what its FFN gets and gives, and what the block returns.

    Args:
        model, input_ids, hidden: as for `run_block`.
        site: an FFN of the model, not folded.

    Returns:
        Inputs and outputs of the FFN and outputs of the block, each [batch, tokens, d] in the model's dtype.

    Raises:
        InvalidInputError, UnsupportedModelError: as `ffn_input`.
    """
    seen: dict[str, Tensor] = {}

    def enter(up: nn.Module, args: tuple[Any, ...]) -> None:
        seen["x"] = args[0].clone()

    def leave(down: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen["y"] = output.clone()  # Falcon adds to it in place

    hooks = site.up.register_forward_pre_hook(enter), site.down.register_forward_hook(leave)
    try:
        after = run_block(model, site.index, input_ids, hidden=hidden)
    finally:
        for hook in hooks:
            hook.remove()
    _check_count(site, seen["x"].flatten(0, -2), input_ids)
    x, y = (seen[name].reshape(*input_ids.shape, -1) for name in ("x", "y"))
    return x, y, after


def _check_count(site: FFNSite, x: Tensor, input_ids: Tensor) -> None:
    """Refuse an FFN that gets the tokens in several parts."""
    if len(x) != input_ids.numel():
        raise InvalidInputError(
            f"{site.up_name} got {len(x)} of {input_ids.numel()} tokens; set chunk_size_feed_forward = 0 in the "
            "model's config."
        )


def _run_until_done(
    model: PreTrainedModel,
    index: int,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    hidden: Tensor | None,
    hook: RemovableHandle,
) -> None:
    """Run block `index` on `hidden` until `hook`, which is removed afterwards, raises `_BlockDone`."""

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if hidden is None else _exchange_input(args, kwargs, hidden)

    try:
        _require_eval(model)
        with only_layer(model, index) as block:
            entry = block.register_forward_pre_hook(enter, with_kwargs=True)
            try:
                _forward(model, input_ids, attention_mask)
            finally:
                entry.remove()
    except _BlockDone:
        return
    finally:
        hook.remove()
    raise UnsupportedModelError(
        f"{type(model).__name__} finished without calling block {index}; correct `layers` in the Family of "
        f"{model.config.model_type!r}."
    )


@torch.no_grad()
def run_head(model: PreTrainedModel, input_ids: Tensor, hidden: Tensor) -> ModelOutput:
    """Run what follows the last block: the final norm and, if the model has one, its LM head.

    Args:
        model: a model of a supported family, in eval mode.
        input_ids: [batch, tokens], the tokens that `hidden` was computed from.
        hidden: [batch, tokens, d], output of the last block, in the model's dtype; moved to its device.

    Returns:
        The model's own output object, with `logits` or `last_hidden_state` as for the model itself.

    Raises:
        InvalidInputError, UnsupportedModelError: as `run_block`.
    """
    _require_eval(model)

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        value = _fit(hidden, _hidden_of(output))
        return (value, *output[1:]) if isinstance(output, tuple) else value

    with only_layer(model, len(layer_list(model)) - 1) as block:
        hook = block.register_forward_hook(leave)
        try:
            return _forward(model, input_ids, None)
        finally:
            hook.remove()


def _forward(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> ModelOutput:
    """Call the model, without its recording hidden states or attention.

    `output_*` is false even if the config says otherwise: when transformers records for the first time it adds hooks to
    the blocks in the list, once and for all, and here the list has a single block.
    """
    output: ModelOutput = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=False,
        output_hidden_states=False,
        output_attentions=False,
        return_dict=True,
    )
    return output


def _require_eval(model: nn.Module) -> None:
    if model.training:
        raise InvalidInputError("the model is in training mode, with dropout. Call model.eval() first.")


def _hidden_of(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or as the first of a tuple."""
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value


def _exchange_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block, with `hidden` for its hidden states, which come first or by keyword."""
    if args:
        return (_fit(hidden, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _fit(hidden, kwargs["hidden_states"])}


def _fit(hidden: Tensor, original: Tensor) -> Tensor:
    """Move `hidden` to the device of the tensor that it replaces; its shape and dtype must be those of that tensor."""
    if hidden.shape != original.shape or hidden.dtype != original.dtype:
        raise InvalidInputError(
            f"hidden is {list(hidden.shape)} {hidden.dtype}, but this block has {list(original.shape)} "
            f"{original.dtype}. Pass the output of the block before it for the same input_ids and model."
        )
    return hidden.to(original.device)
