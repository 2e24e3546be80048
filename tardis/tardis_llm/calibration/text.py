"""From calibration text to windows [windows, length] of token ids.

Where a tokenizer begins every text with a token (BOS), every window begins with it: models that were trained so, such
as Gemma, make little sense of text without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import FoldConfig, check_seed
from ..errors import InvalidInputError
from .documents import Documents, read_documents
from .inputs import Speech, TextOrSpeech, ids_of, token_count
from .limits import Tokenizer, check_windows

Windowed = TypeVar("Windowed", bound=TextOrSpeech)

_SPANS = 64  # how many pieces of a long text are tokenized
_PROBE = "text"
_CHARACTERS_PER_TOKEN = 8  # more than texts have on average, so that pieces yield enough tokens
#: the fewest calibration tokens per input dimension from which second moments are estimated
TOKENS_PER_DIMENSION = 4


@dataclass(frozen=True)
class Windows:
    """Windows to calibrate on: of text, or of speech.

    Attributes:
        fit: token ids [windows, length] int64, or speech, to fit on.
        heldout: the same, kept apart to choose and to check on.

    Examples:
        >>> windows = split_windows(torch.arange(256), length=32, heldout=0.25)
        >>> len(windows.fit), len(windows.heldout)
        (6, 2)
    """

    fit: TextOrSpeech
    heldout: TextOrSpeech

    def __iter__(self) -> Iterator[TextOrSpeech]:
        """Those to fit on, then those kept apart."""
        return iter((self.fit, self.heldout))


def read_windows(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    tokens: int,
    length: int,
    heldout: float,
    seed: int = 0,
    field: str | None = None,
) -> Windows:
    """Read windows of tokens, evenly spread over all the text of some sources.

    Args:
        sources: files or names of datasets; see `read_documents`.
        tokenizer: the model's.
        tokens: how many tokens to read; fewer come back where the text is shorter.
        length: tokens per window, with the one that the tokenizer begins texts with, if there is one.
        heldout: share of the windows to keep apart.
        seed: picks the pieces of the text that are read.
        field: the field of records that holds their text; default: "text".

    Raises:
        InvalidInputError: there is no text, a file is unreadable or empty, or the text gives less than two windows.

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
    """Windows of tokens, evenly spread over documents; arguments and errors are those of `read_windows`."""
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
    first = first_token(tokenizer)
    rest = length - len(first)
    windows = split_windows(_spread_windows(torch.tensor(ids), tokens, rest), rest, heldout)
    return Windows(*(begun(ids_of(some), first) for some in windows))


def calibration_windows(
    documents: Sequence[Documents],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: FoldConfig,
    length: int,
) -> Windows:
    """Windows of `length` tokens to calibrate a model on, with the settings of a fold.

    Raises:
        InvalidInputError: there is too little text, windows are too long, or the model does not know a token.
    """
    windows = windows_over(documents, tokenizer, config.tokens, length, config.heldout, config.seed)
    for some in windows:
        check_windows(model, some, tokenizer)
    return windows


def split_windows(ids: Tensor, length: int, heldout: float) -> Windows:
    """Cut token ids into windows, and keep an evenly spread share of them apart.

    Args:
        ids: [tokens], or windows [count, length], whose length then counts.
        length: tokens per window.
        heldout: share of the windows to keep apart; one window at least.

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
    kept = heldout_of(count, heldout)
    return Windows(windows[~kept], windows[kept])


def heldout_of(count: int, share: float) -> Tensor:
    """[count] bool, which of so many windows are kept apart: evenly spread, and one at least."""
    kept = max(1, round(count * share))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[(torch.arange(kept) * count) // kept + count // (2 * kept)] = True
    return chosen


def spread(count: int, limit: int | None) -> list[int]:
    """Evenly spread indices.

    Args:
        count: how many things there are.
        limit: how many of them to pick; None for all.

    Example:
        >>> spread(10, 4)
        [0, 2, 5, 7]
    """
    wanted = count if limit is None else min(limit, count)
    return [index * count // wanted for index in range(wanted)]


def some_windows(windows: Windowed, tokens: int) -> Windowed:
    """Some windows, evenly spread over all.

    Args:
        windows: [count, length] token ids, or speech.
        tokens: about how many tokens to keep, in two windows at least; 0 for all.
    """
    chosen = spread(len(windows), max(2, tokens // ids_of(windows).shape[1]) if tokens else None)
    return cast(Windowed, windows[chosen])


def check_enough(windows: Windows, d: int) -> None:
    """Raise InvalidInputError where there are too few tokens to estimate the second moments of d inputs."""
    have, need = token_count(windows.fit), TOKENS_PER_DIMENSION * d
    if have < need and isinstance(windows.fit, Speech):
        raise InvalidInputError(
            f"{have} tokens in the transcripts of the calibration speech are too few for a model of width {d}: second "
            f"moments need {need} at least. Give more --audio, or raise --tokens."
        )
    if have < need:
        raise InvalidInputError(
            f"{have} calibration tokens are too few for a model of width {d}: second moments need {need} at least, and "
            "about 64,000 serve well. Give more --text, or raise --tokens."
        )


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a text, without special tokens for its beginning and end."""
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def first_token(tokenizer: Tokenizer) -> list[int]:
    """The token that a tokenizer puts in front of every text (BOS); an empty list where it puts none there.

    What BERT and its like put around a text stays out: a window is a piece of text without an end.
    """
    first = getattr(tokenizer, "bos_token_id", None)
    if first is None or tokenizer.encode(_PROBE) != [first, *encode(tokenizer, _PROBE)]:
        return []
    return [first]


def begun(windows: Tensor, first: list[int]) -> Tensor:
    """Windows [count, length] of token ids, with the token of `first_token` in front of each."""
    return torch.cat([windows.new_tensor(first).expand(len(windows), -1), windows], dim=1)


def _spread(texts: list[str], characters: int, seed: int) -> list[str]:
    """`_SPANS` evenly spread pieces of a text, of about `characters` in all, each of whole words."""
    joined = "\n\n".join(texts)
    size, stride = characters // _SPANS + 1, len(joined) // _SPANS
    shift = int(torch.randint(max(1, stride - size), (1,), generator=torch.Generator().manual_seed(seed)))
    starts = [shift + i * stride for i in range(_SPANS)]
    return [_whole_words(joined[start : start + size + 1]) for start in starts]


def _spread_windows(ids: Tensor, tokens: int, length: int) -> Tensor:
    """Evenly spread windows [count, length] of `tokens` tokens in all; where there are no more, flat ids [tokens]."""
    have, wanted = len(ids) // length, tokens // length
    if have <= wanted or wanted < 2:
        return ids[: min(tokens, len(ids))]
    return ids[: have * length].view(have, length)[spread(have, wanted)]


def _whole_words(span: str) -> str:
    first, last = span.find(" "), span.rfind(" ")
    return span[first + 1 : last] if 0 <= first < last else span
