"""Limits of a model and its tokenizer: how many tokens a text may have, and which tokens the model knows."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InvalidInputError
from ..families.table import family_of, position_limit, vocabulary
from .inputs import Speech, TextOrSpeech, ids_of

#: the most tokens of a window, unless more are asked for
_LONGEST = 1024


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here; any object with it will do."""

    model_max_length: int

    def encode(self, text: str, add_special_tokens: bool = ..., verbose: bool = ...) -> list[int]:
        """Token ids of a text."""
        ...


def window_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, wanted: int | None) -> int:
    """How many tokens a window of text has for a model.

    Args:
        model: of a supported family.
        tokenizer: the model's; None if only the model sets a limit.
        wanted: the number that was asked for; None for as many as model and tokenizer allow, 1024 at most.

    Raises:
        InvalidInputError: `wanted` is less than 2, or more than they allow.
    """
    limit = token_limit(model, tokenizer)
    if wanted is None:
        return default_length(tokenizer, limit)
    if wanted < 2 or (limit and wanted > limit):
        raise InvalidInputError(f"windows of {wanted} tokens do not fit this model; choose from 2 to {limit or 1024}.")
    return wanted


def token_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The most tokens of a text that both model and tokenizer allow; None if neither sets a limit."""
    limits = [limit for limit in (position_limit(model.config), tokenizer and tokenizer.model_max_length) if limit]
    known = [int(limit) for limit in limits if limit < 2**31]  # a tokenizer without a limit says 10^30
    return min(known, default=None)


def default_length(tokenizer: Tokenizer | None, positions: int | None) -> int:
    """The length of windows in tokens, if none is asked for: what tokenizer and model allow, 1024 at most.

    Args:
        tokenizer: None if only the model sets a limit.
        positions: the model's limit; None if it sets none.
    """
    limits = [_LONGEST, positions or _LONGEST, tokenizer.model_max_length if tokenizer else _LONGEST]
    return int(min(limits))


def check_windows(
    model: PreTrainedModel, inputs: TextOrSpeech, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise InvalidInputError where a model cannot take windows.

    They are of speech and it reads text, or the other way round; they are too long, or have tokens that it does not
    know.

    Args:
        model: of a supported family.
        inputs: [count, length] token ids, or speech.
        tokenizer: the one that made them; its size is named in the error.
    """
    check_kind(model, speech=isinstance(inputs, Speech))
    ids = ids_of(inputs)
    check_length(model, ids.shape[1])
    check_tokens(model, ids, tokenizer)


def check_kind(model: PreTrainedModel, speech: bool) -> None:
    """Raise InvalidInputError where a model gets speech and reads text, or text and hears speech."""
    name, hears = type(model).__name__, family_of(model.config).speech
    if speech and not hears:
        raise InvalidInputError(f"{name} reads text, and speech is given; give token ids, or --text, not --audio.")
    if hears and not speech:
        raise InvalidInputError(
            f"{name} hears speech, and text is given; give log-mel features [windows, mels, frames], or --audio, "
            "not --text."
        )


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise InvalidInputError where a model has no positions for windows of `length` tokens."""
    limit = position_limit(model.config)
    if limit and length > limit:
        raise InvalidInputError(f"windows of {length} tokens do not fit this model, which takes {limit} at most.")


def check_tokens(model: PreTrainedModel, ids: Tensor, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raise InvalidInputError where a model has no embedding for a token.

    Args:
        model: of a supported family.
        ids: token ids, of any shape.
        tokenizer: the one that made them; its size is named in the error.
    """
    rows = vocabulary(model)
    unknown = ids[(ids < 0) | (ids >= rows)]
    if len(unknown):
        size = f", and the tokenizer has {len(tokenizer):,}" if tokenizer is not None else ""
        raise InvalidInputError(
            f"the text has token {int(unknown[0])}, but the model has embeddings for {rows:,} tokens{size}. Give the "
            "model the tokenizer that belongs to it, or add rows for the new tokens with "
            "model.resize_token_embeddings and train them."
        )
