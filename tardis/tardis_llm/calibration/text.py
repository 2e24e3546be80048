"""Calibration text to token windows: documents in, [windows, length] token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import FoldConfig, check_seed
from ..errors import InvalidInputError
from ..families.table import position_limit, vocabulary
from .documents import Documents, read_documents

_SPANS = 64  # places of the text from which windows are taken, evenly spread
_CHARACTERS_PER_TOKEN = 8  # more than any text needs; halves the odds of reading twice
_LONGEST = 1024
#: calibration tokens per input dimension below which second moments say too little
TOKENS_PER_DIMENSION = 4


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    model_max_length: int

    def encode(self, text: str, add_special_tokens: bool = ..., verbose: bool = ...) -> list[int]:
        """Token ids of a text."""
        ...


@dataclass(frozen=True)
class Windows:
    """Calibration tokens.

    Attributes:
        fit: [windows, length] int64, to fit on.
        heldout: [windows, length] int64, kept apart.

    Examples:
        >>> windows = split_windows(torch.arange(256), length=32, heldout=0.25)
        >>> len(windows.fit), len(windows.heldout)
        (6, 2)
    """

    fit: Tensor
    heldout: Tensor


def read_windows(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    tokens: int,
    length: int,
    heldout: float,
    seed: int = 0,
    field: str | None = None,
) -> Windows:
    """Windows from spans spread evenly over all the text of `sources`.

    Args:
        sources: files or names of datasets; see `read_documents`.
        tokenizer: the model's.
        tokens: how many; fewer come back where the text is shorter.
        length: tokens per window.
        heldout: share of the windows kept apart.
        seed: shifts the spans.
        field: of records, that holds their text; "text" without.

    Raises:
        InvalidInputError: no text, unreadable or empty files, or less than two windows.

    Examples:
        >>> windows = read_windows(["notes.txt"], tokenizer, tokens=4096, length=32, heldout=0.125)
        >>> windows.fit.shape, windows.heldout.shape
        (torch.Size([112, 32]), torch.Size([16, 32]))
    """
    documents = [read_documents(source, field) for source in sources]
    return windows_over(documents, tokenizer, tokens, length, heldout, seed)


def windows_over(
    sources: Sequence[Documents], tokenizer: Tokenizer, tokens: int, length: int, heldout: float, seed: int = 0
) -> Windows:
    """Windows from spans spread evenly over documents; arguments and errors as `read_windows`."""
    check_seed(seed)
    texts = [documents.text for documents in sources]
    total = sum(map(len, texts))
    if not total:
        raise InvalidInputError(
            "the calibration text is empty; give --text FILE with some text in the model's language."
        )
    characters = tokens * _CHARACTERS_PER_TOKEN
    spans = _spread(texts, characters, seed) if total > characters else texts
    ids = [token for span in spans for token in encode(tokenizer, span)]
    return split_windows(_spread_windows(torch.tensor(ids), tokens, length), length, heldout)


def calibration_windows(
    documents: Sequence[Documents],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: FoldConfig,
    length: int,
) -> Windows:
    """Windows of `length` tokens to calibrate a model on, as many as `config` says.

    Raises:
        InvalidInputError: there is too little text, or the model does not know a token.
    """
    windows = windows_over(documents, tokenizer, config.tokens, length, config.heldout, config.seed)
    for ids in (windows.fit, windows.heldout):
        check_windows(model, ids, tokenizer)
    return windows


def split_windows(ids: Tensor, length: int, heldout: float) -> Windows:
    """Cut token ids (flat, or windows already) into windows and hold back an evenly spread share of them.

    Raises:
        InvalidInputError: fewer than two windows of `length` tokens.

    Examples:
        >>> windows = split_windows(torch.arange(12), length=3, heldout=0.25)
        >>> windows.heldout
        tensor([[6, 7, 8]])
        >>> windows.fit.flatten().tolist()
        [0, 1, 2, 3, 4, 5, 9, 10, 11]
    """
    if ids.dim() == 2:
        length = ids.shape[1]
    flat = ids.flatten()
    count = len(flat) // length
    if count < 2:
        raise InvalidInputError(
            f"the calibration text has {len(flat)} tokens, less than two windows of {length}; give more text, raise "
            "--tokens, or give a shorter --sequence-length."
        )
    windows = flat[: count * length].view(count, length).long()
    kept = max(1, round(count * heldout))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[(torch.arange(kept) * count) // kept + count // (2 * kept)] = True
    return Windows(windows[~chosen], windows[chosen])


def spread(count: int, limit: int | None) -> list[int]:
    """Indices of `limit` things, evenly spread over `count` of them; all where there are no more.

    Example:
        >>> spread(10, 4)
        [0, 2, 5, 7]
    """
    wanted = count if limit is None else min(limit, count)
    return [index * count // wanted for index in range(wanted)]


def some_windows(windows: Tensor, tokens: int) -> Tensor:
    """Windows [n, length] evenly spread over all, `tokens` in all but two at least; every one for 0 tokens."""
    return windows[spread(len(windows), max(2, tokens // windows.shape[1]) if tokens else None)]


def default_length(tokenizer: Tokenizer | None, positions: int | None) -> int:
    """The longest window that tokenizer and model allow, 1024 at most."""
    limits = [_LONGEST, positions or _LONGEST, tokenizer.model_max_length if tokenizer else _LONGEST]
    return int(min(limits))


def check_enough(windows: Windows, d: int) -> None:
    """Raise InvalidInputError where there is too little text for the second moments of d inputs."""
    have, need = windows.fit.numel(), TOKENS_PER_DIMENSION * d
    if have < need:
        raise InvalidInputError(
            f"{have} calibration tokens are too few for a model of width {d}: second moments need {need} at least, and "
            "about 64,000 serve well. Give more --text, or raise --tokens."
        )


def check_windows(model: PreTrainedModel, ids: Tensor, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Check that a model can take windows [count, length] of token ids; arguments and errors as the checks called."""
    check_length(model, ids.shape[1])
    check_tokens(model, ids, tokenizer)


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise InvalidInputError where a model has no positions for windows of `length` tokens."""
    limit = position_limit(model.config)
    if limit and length > limit:
        raise InvalidInputError(f"windows of {length} tokens do not fit this model, which takes {limit} at most.")


def check_tokens(model: PreTrainedModel, ids: Tensor, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raise InvalidInputError where a model has no embedding for a token.

    Args:
        ids: of any shape.
        tokenizer: that made them; its size is named in the error.
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


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, without those that mark its beginning and end."""
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def _spread(texts: list[str], characters: int, seed: int) -> list[str]:
    """`_SPANS` spans of about `characters` in all, evenly spread, each starting and ending at white space."""
    joined = "\n\n".join(texts)
    size, stride = characters // _SPANS + 1, len(joined) // _SPANS
    shift = int(torch.randint(max(1, stride - size), (1,), generator=torch.Generator().manual_seed(seed)))
    starts = [shift + i * stride for i in range(_SPANS)]
    return [_whole_words(joined[start : start + size + 1]) for start in starts]


def _spread_windows(ids: Tensor, tokens: int, length: int) -> Tensor:
    """Windows [count, length] evenly spread over flat ids, `tokens` in all; flat as they are if there are no more."""
    have, wanted = len(ids) // length, tokens // length
    if have <= wanted or wanted < 2:
        return ids[: min(tokens, len(ids))]
    return ids[: have * length].view(have, length)[spread(have, wanted)]


def _whole_words(span: str) -> str:
    first, last = span.find(" "), span.rfind(" ")
    return span[first + 1 : last] if 0 <= first < last else span
