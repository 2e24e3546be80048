"""Generate text with a dense or folded causal model, within the positions that it knows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..architectures import family_of
from ..decoding import compile_errors_explained, compiled
from ..errors import InvalidInputError
from ..loading import position_limit


def prompt_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Token ids [1, tokens] of a prompt that leaves room for an answer.

    Raises:
        InvalidInputError: it is empty, too long, or the model is an encoder.
    """
    if not family_of(model.config).causal:
        raise InvalidInputError(f"{type(model).__name__} is an encoder, which generates no text; give a causal model.")
    ids: Tensor = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.long()
    if not ids.numel():
        raise InvalidInputError("the prompt is empty; give some words to go on from.")
    limit = position_limit(model, tokenizer)
    if limit and ids.shape[1] >= limit:
        raise InvalidInputError(
            f"the prompt has {ids.shape[1]} tokens and this model takes {limit}; shorten the prompt."
        )
    return ids


def room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> int | None:
    """Tokens that still fit behind ids [1, tokens]; None if there is no limit."""
    limit = position_limit(model, tokenizer)
    return limit - ids.shape[1] if limit else None


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
    compile: bool = False,
) -> str:
    """The text that follows ids [1, tokens].

    Args:
        ids: as from `prompt_ids`.
        max_new_tokens: fewer come where the model ends the text or its positions are used up.
        temperature: 0 takes the likeliest token each time.
        seed: of the sampling; the global generator is left alone.
        streamer: told of tokens as they come.
        compile: run each token as one graph; see `decoding.compiled`.

    Raises:
        InvalidInputError: it cannot be compiled.
    """
    space = room(model, tokenizer, ids)
    count = max_new_tokens if space is None else min(max_new_tokens, space)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    ending = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]), torch.no_grad(), compile_errors_explained():
        torch.manual_seed(seed)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            pad_token_id=ending,
            streamer=streamer,
            **sampling,
            **(compiled(model) if compile else {}),
        )
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text
