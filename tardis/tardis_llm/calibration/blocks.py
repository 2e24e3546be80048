"""Run one transformer block, or the head alone, through the forward of the whole model.

Calibration walks the model block by block, keeping only the hidden states [batch, tokens, d] between two
blocks. Blocks are never called by hand, because what they take (masks, rotary tables, ALiBi) and return (a
tensor, a tuple) differs from family to family and from release to release. Instead the model itself calls the
one block left in its list, hooks exchange the hidden states on the way in, and a private exception ends the
forward on the way out.
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
    """Run block `index` alone on `hidden`, exactly as the model would call it. Hooks inside the block fire.

    Args:
        model: a model of a supported family, in eval mode.
        index: number of the block, from 0.
        input_ids: [batch, tokens] the tokens behind `hidden`; they set positions and masks.
        attention_mask: [batch, tokens], 1 for text and 0 for padding; None for no padding.
        hidden: [batch, tokens, d] input of the block, in the model's dtype; moved to the block's device. None
            for the embeddings as the model makes them, which is the input of block 0.

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
    """What the FFN at `site` gets when its block runs on `hidden`; the block stops there.

    Args:
        site: an FFN of the model, not folded.
        model, input_ids, attention_mask, hidden: as for `run_block`.

    Returns:
        [batch * tokens, d], in the model's dtype.

    Raises:
        InvalidInputError, UnsupportedModelError: as `run_block`; or the FFN runs on parts of the tokens.
    """
    captured: list[Tensor] = []

    def enter(up: nn.Module, args: tuple[Any, ...]) -> None:
        captured.append(args[0].reshape(-1, args[0].shape[-1]))
        raise _BlockDone

    hook = site.up.register_forward_pre_hook(enter)
    _run_until_done(model, site.index, input_ids, attention_mask, hidden, hook)
    if len(captured[0]) != input_ids.numel():
        raise InvalidInputError(
            f"{site.up_name} got {len(captured[0])} of {input_ids.numel()} tokens; set chunk_size_feed_forward = 0 in "
            "the model's config."
        )
    return captured[0]


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
    """Put the output of the last block through the rest of the model: final norm and, if it has one, LM head.

    Args:
        model: a model of a supported family, in eval mode.
        input_ids: [batch, tokens] the tokens behind `hidden`.
        hidden: [batch, tokens, d] output of the last block, in the model's dtype; moved to its device.

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
    """The model's forward, recording nothing.

    `output_*` is false even if the config says otherwise: the first recording makes transformers hook every
    block in the list, once and for all, and here all blocks but one are out of the list.
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
    """The hidden states in what a block returns: itself, or the first of a tuple."""
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value


def _exchange_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with its hidden states, first or by keyword, exchanged for `hidden`."""
    if args:
        return (_fit(hidden, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _fit(hidden, kwargs["hidden_states"])}


def _fit(hidden: Tensor, original: Tensor) -> Tensor:
    """`hidden` on the device of the tensor that it replaces; shape and dtype must be right already."""
    if hidden.shape != original.shape or hidden.dtype != original.dtype:
        raise InvalidInputError(
            f"hidden is {list(hidden.shape)} {hidden.dtype}, but this block has {list(original.shape)} "
            f"{original.dtype}. Pass the output of the block before it for the same input_ids and model."
        )
    return hidden.to(original.device)
