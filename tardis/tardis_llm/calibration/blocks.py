"""Run one transformer block, or what stands behind the last one, through the forward of the whole model.

Calibration goes through the model block by block and keeps only the hidden states [batch, tokens, d] between two
blocks. No block is called directly, because the arguments of blocks (masks, rotary tables, ALiBi) and what they return
(a tensor or a tuple) differ between families and releases of transformers. Instead, the list of blocks is reduced to
one and the model is called: a hook replaces the block's input, another takes its output, and a private exception ends
the forward there.

A model of speech has two lists of blocks, numbered through. Its encoder runs whole for each block of the decoder,
unless its output comes with the inputs: `run_encoder_end` makes it from the hidden states behind the encoder's blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import InvalidInputError, UnsupportedModelError
from ..families.sites import FFNSite, block_at, encoder_blocks, layer_lists, named_blocks, only_layer
from ..families.table import sound_of
from ..precision import quick_products
from .inputs import Speech, TextOrSpeech, ids_of, model_arguments

_JUST_ADDED = 1e-3  # of what was added: the rounding of bf16 leaves 1e-5 of it, and a norm half


class _BlockDone(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward once the block has run; caught in `run_block`."""


@torch.no_grad()
def run_block(
    model: PreTrainedModel,
    index: int,
    inputs: TextOrSpeech,
    attention_mask: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Run one block on hidden states, exactly as the model would call it. Hooks inside the block fire.

    Args:
        model: a model of a supported family, in eval mode.
        index: number of the block, from 0.
        inputs: token ids [batch, tokens], or speech, that `hidden` was computed from; they set positions and masks.
        attention_mask: [batch, tokens], 1 for text and 0 for padding; None for no padding.
        hidden: [batch, tokens, d], input of the block, in the model's dtype; moved to the block's device. None for
            the embeddings of `inputs`, which are the input of the first block of a list.

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
    _run_until_done(model, index, inputs, attention_mask, hidden, hook)
    return captured[0]


@torch.no_grad()
def ffn_input(
    model: PreTrainedModel,
    site: FFNSite,
    inputs: TextOrSpeech,
    attention_mask: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Run one block on hidden states up to its FFN, and return the input of the FFN.

    Args:
        model, inputs, attention_mask, hidden: as for `run_block`.
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
    _run_until_done(model, site.index, inputs, attention_mask, hidden, hook)
    _check_count(site, captured[0], shape_in(model, site.index, inputs))
    return captured[0]


def watch_ffn(
    model: PreTrainedModel, site: FFNSite, inputs: TextOrSpeech, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one block on hidden states, and return what its FFN gets and gives, and what the block returns.

    Args:
        model, inputs, hidden: as for `run_block`.
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

    with _hooked(site.up.register_forward_pre_hook(enter), site.down.register_forward_hook(leave)):
        after = run_block(model, site.index, inputs, hidden=hidden)
    _check_count(site, seen["x"].flatten(0, -2), after.shape[:-1])
    x, y = (seen[name].reshape(*after.shape[:-1], -1) for name in ("x", "y"))
    return x, y, after


def stream_gain(
    model: PreTrainedModel, site: FFNSite, inputs: TextOrSpeech, hidden: Tensor | None = None
) -> float | None:
    """By what a block multiplies its FFN's output before it adds it to the residual stream.

    It is measured, by adding a known tensor to that output, behind the FFN's own norm if there is one.

    Args:
        model, inputs, hidden: as for `run_block`.
        site: an FFN of the model, not folded.

    Returns:
        Usually 1; None where the block does more than add, as with a norm behind the sum (BERT).

    Raises:
        InvalidInputError, UnsupportedModelError: as `run_block`.
    """
    plain = run_block(model, site.index, inputs, hidden=hidden).float()
    # far above the rounding of the stream, and far from what a norm could take for small
    size = 4 * plain.square().mean(-1, keepdim=True).sqrt()
    added = size * torch.arange(plain.shape[-1], device=plain.device).mul(2.4).sin()

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + added.view_as(output).to(output.dtype)

    with _hooked((site.norm or site.down).register_forward_hook(add)):
        change = run_block(model, site.index, inputs, hidden=hidden).float() - plain
    gain = float((change * added).sum() / added.square().sum())
    rest = float((change - gain * added).square().sum() / change.square().sum().clamp_min(1e-30))
    return gain if rest < _JUST_ADDED else None


@contextmanager
def _hooked(*hooks: RemovableHandle) -> Iterator[None]:
    """Remove hooks in the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def shape_in(model: PreTrainedModel, index: int, inputs: TextOrSpeech) -> torch.Size:
    """[batch, tokens] of the hidden states in block `index`."""
    if not isinstance(inputs, Tensor) and index < encoder_blocks(model):
        return torch.Size((len(inputs), sound_of(model.config).positions))
    return ids_of(inputs).shape


def _check_count(site: FFNSite, x: Tensor, shape: torch.Size) -> None:
    """Refuse an FFN that gets the tokens [batch, tokens] in several parts."""
    if len(x) != shape.numel():
        raise InvalidInputError(
            f"{site.up_name} got {len(x)} of {shape.numel()} tokens; set chunk_size_feed_forward = 0 in the "
            "model's config."
        )


def _run_until_done(
    model: PreTrainedModel,
    index: int,
    inputs: TextOrSpeech,
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
                _forward(model, inputs, attention_mask)
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
def run_head(model: PreTrainedModel, inputs: TextOrSpeech, hidden: Tensor) -> ModelOutput:
    """Run what follows the last block: the final norm and, if the model has one, its LM head.

    Args:
        model: a model of a supported family, in eval mode.
        inputs: token ids [batch, tokens], or speech, that `hidden` was computed from.
        hidden: [batch, tokens, d], output of the last block, in the model's dtype; moved to its device.

    Returns:
        The model's own output object, with `logits` or `last_hidden_state` as for the model itself.

    Raises:
        InvalidInputError, UnsupportedModelError: as `run_block`.
    """
    with _leaving_with(model, len(named_blocks(model)) - 1, hidden):
        return _forward(model, inputs, None)


@torch.no_grad()
def enter_head(model: PreTrainedModel, inputs: TextOrSpeech, hidden: Tensor) -> None:
    """Run what follows the last block up to the head, whose hooks fire; no logits are made.

    Arguments and errors as for `run_head`.
    """

    def stop(head: nn.Module, args: tuple[Any, ...]) -> None:
        raise _BlockDone

    with _leaving_with(model, len(named_blocks(model)) - 1, hidden):
        hook = model.get_output_embeddings().register_forward_pre_hook(stop)  # the last hook: all others have run
        try:
            _forward(model, inputs, None)
        except _BlockDone:
            return
        finally:
            hook.remove()


@torch.no_grad()
def run_encoder_end(model: PreTrainedModel, speech: Speech, hidden: Tensor) -> Tensor:
    """Run what follows the last block of an encoder of speech.

    Args:
        model: a model of speech, in eval mode.
        speech: that `hidden` was computed from.
        hidden: [batch, positions, d], output of the encoder's last block, in the model's dtype.

    Returns:
        [batch, positions, d] what the decoder gets.

    Raises:
        InvalidInputError: as `run_block`.
    """
    encoder = model.get_submodule(next(iter(layer_lists(model))).rpartition(".")[0])
    with _leaving_with(model, encoder_blocks(model) - 1, hidden):
        output = encoder(speech.features.to(model.device), **_NO_RECORDS)
    encoded: Tensor = output.last_hidden_state
    return encoded


@contextmanager
def _leaving_with(model: PreTrainedModel, index: int, hidden: Tensor) -> Iterator[None]:
    """Within the context, block `index` is alone in its list and returns `hidden`, whatever it computes."""
    _require_eval(model)

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        value = _fit(hidden, _hidden_of(output))
        return (value, *output[1:]) if isinstance(output, tuple) else value

    with only_layer(model, index) as block:
        hook = block.register_forward_hook(leave)
        try:
            yield
        finally:
            hook.remove()


#: false even if the config says otherwise: when transformers records hidden states or attention for the first time, it
#: adds hooks to the blocks in the list, once and for all, and here the list has a single block
_NO_RECORDS = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}


def _forward(model: PreTrainedModel, inputs: TextOrSpeech, attention_mask: Tensor | None) -> ModelOutput:
    """Call the model, without its recording hidden states or attention."""
    mask = {} if attention_mask is None else {"attention_mask": attention_mask.to(model.device)}
    arguments = model_arguments(inputs, model.device)
    with quick_products():
        output: ModelOutput = model(**arguments, **mask, use_cache=False, **_NO_RECORDS)
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
            f"{original.dtype}. Pass the output of the block before it for the same inputs and model."
        )
    return hidden.to(original.device)
