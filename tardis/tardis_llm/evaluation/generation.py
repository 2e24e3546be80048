"""Generate text with a dense or folded causal model, within the positions that it knows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..calibration.limits import check_tokens, token_limit
from ..calibration.speech import transcribe
from ..config import check_seed
from ..errors import InvalidInputError
from ..families.table import family_of, kind_of
from ..runtime.decoding import compile_errors_explained, compiled
from ..runtime.stepping.forward import stepping

_AT_ONCE = 8  # windows of speech
_COLDEST = 1e-3  # a temperature by which scores can be divided


def prompt_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Token ids [1, tokens] of a prompt that leaves room for an answer.

    Raises:
        InvalidInputError: it is empty, too long, has a token that the model does not know, or the model is an encoder.

    Examples:
        >>> prompt_ids(model, tokenizer, "Once upon").shape
        torch.Size([1, 9])
    """
    if not family_of(model.config).language_model:
        raise InvalidInputError(f"{kind_of(model)}, and goes on from no text; give a causal language model.")
    ids: Tensor = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.long()
    if not ids.numel():
        raise InvalidInputError("the prompt is empty; give some words to go on from.")
    check_tokens(model, ids, tokenizer)
    limit = token_limit(model, tokenizer)
    if limit and ids.shape[1] >= limit:
        raise InvalidInputError(
            f"the prompt has {ids.shape[1]} tokens and this model takes {limit}; shorten the prompt."
        )
    return ids


def room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> int | None:
    """Tokens that still fit behind ids [1, tokens]; None if there is no limit."""
    limit = token_limit(model, tokenizer)
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

    Of the model's generation_config.json only its ends of text count: what else is there may ask for other ways to
    decode, and not all of it works.

    Args:
        model: in eval mode; text is generated where it is.
        ids: [1, tokens] token ids of the prompt, on any device; see `prompt_ids`.
        max_new_tokens: fewer come where the model ends the text or its positions are used up.
        temperature: 0 takes the likeliest token each time.
        seed: seed of the sampling; devices draw different numbers from one. Global generators are left alone.
        streamer: told of tokens as they come.
        compile: run each token as one graph of torch, see `decoding.compiled`; otherwise our kernels run tokens whole
            where they can, see `stepping`.

    Raises:
        InvalidInputError: it cannot be compiled, or the temperature or the seed is out of range.

    Examples:
        >>> text = generate(model, tokenizer, prompt_ids(model, tokenizer, "Once upon"), max_new_tokens=4)
        >>> text == generate(model, tokenizer, prompt_ids(model, tokenizer, "Once upon"), max_new_tokens=4)
        True
    """
    check_seed(seed)
    if not (temperature <= 0 or temperature >= _COLDEST):
        raise InvalidInputError(f"temperature is {temperature}; give 0, or a number from {_COLDEST}.")
    space = room(model, tokenizer, ids)
    count = max_new_tokens if space is None else min(max_new_tokens, space)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    plain = copy.copy(model)  # shares everything but this attribute
    plain.generation_config = _ends(model, tokenizer)
    ids = ids.to(model.device)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "tokenizer": tokenizer, **sampling}
    with _own_generator(model.device, seed), torch.no_grad(), compile_errors_explained(), stepping(plain) as steps:
        if compile:
            out = plain.generate(ids, streamer=streamer, **settings, **compiled(model))
        else:
            out = steps.generate(ids, streamer=streamer, **settings)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def transcript(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, features: Tensor) -> str:
    """What a model of speech writes down for windows of features, greedily.

    Args:
        features: [windows, mels, frames]; see `read_audio`.

    Raises:
        InvalidInputError: features do not fit the model.
    """
    windows = [text for some in features.split(_AT_ONCE) for text in transcribe(model, some)]
    return "".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in windows).strip()


@contextmanager
def _own_generator(device: torch.device, seed: int) -> Iterator[None]:
    """Within the context, what is drawn on a device begins at a seed; its generator and the CPU's go on as before."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(seed)
        yield


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Settings that say where a text ends, and nothing else."""
    given = model.generation_config
    ends = given.eos_token_id if isinstance(given.eos_token_id, list) else [given.eos_token_id]
    known = [token for token in ends if isinstance(token, int) and token >= 0]
    if not known and tokenizer.eos_token_id is not None:
        known = [tokenizer.eos_token_id]
    padding = next((token for token in (tokenizer.pad_token_id, *known) if token is not None), None)
    words = given.stop_strings if isinstance(given.stop_strings, str | list) else None
    return GenerationConfig(eos_token_id=known or None, pad_token_id=padding, stop_strings=words or None)
