"""Calibration text to token windows: files or a `datasets` name in, [windows, length] token ids out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InvalidInputError

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
    """

    fit: Tensor
    heldout: Tensor


def read_windows(
    sources: Sequence[str | Path], tokenizer: Tokenizer, tokens: int, length: int, heldout: float, seed: int = 0
) -> Windows:
    """Windows from spans spread evenly over all the text of `sources`.

    Args:
        sources: text files in UTF-8, or names for `datasets` as `name[:config[:split[:column]]]`.
        tokenizer: the model's.
        tokens: how many; fewer come back where the text is shorter.
        length: tokens per window.
        heldout: share of the windows kept apart.
        seed: shifts the spans.

    Raises:
        InvalidInputError: no text, unreadable or empty files, or less than two windows.
    """
    texts = [text for source in sources for text in _texts(source)]
    total = sum(map(len, texts))
    if not total:
        raise InvalidInputError(
            "the calibration text is empty; give --text FILE with some text in the model's language."
        )
    characters = tokens * _CHARACTERS_PER_TOKEN
    spans = _spread(texts, characters, seed) if total > characters else texts
    ids = [token for span in spans for token in _encode(tokenizer, span)]
    return split_windows(_spread_windows(torch.tensor(ids), tokens, length), length, heldout)


def split_windows(ids: Tensor, length: int, heldout: float) -> Windows:
    """Cut token ids (flat, or windows already) into windows and hold back an evenly spread share of them.

    Raises:
        InvalidInputError: fewer than two windows of `length` tokens.
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


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def _texts(source: str | Path) -> Iterator[str]:
    path = Path(source)
    if path.is_file():
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"{path} is not UTF-8 text ({error}); convert it first.") from error
    elif path.suffix or path.is_dir() or len(path.parts) > 2:
        raise InvalidInputError(f"no text file {path}; give a path that exists, or a dataset name.")
    else:
        yield from _dataset_texts(str(source))


def _dataset_texts(name: str) -> Iterator[str]:
    """The column `text` (or the one named) of a dataset: `name[:config[:split[:column]]]`."""
    if importlib.util.find_spec("datasets") is None:
        raise InvalidInputError(
            f"{name!r} is no file, and reading it as a dataset needs the package: pip install 'tardis-llm[eval]'."
        )
    from datasets import load_dataset

    dataset, config, split, column = (*name.split(":"), *[""] * 3)[:4]
    try:
        rows = load_dataset(dataset, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds, all with the same remedy
        raise InvalidInputError(
            f"{name!r} is neither a file nor a dataset that can be loaded ({error}); check the name, or give a file."
        ) from error
    column = column or "text"
    if column not in rows.column_names:
        raise InvalidInputError(
            f"{dataset} has no column {column!r}; name one of {', '.join(rows.column_names)} as the fourth part of "
            "`name:config:split:column`."
        )
    yield "\n\n".join(rows[column])


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
        return ids[:tokens]
    return ids[: have * length].view(have, length)[torch.arange(wanted) * have // wanted]


def _whole_words(span: str) -> str:
    first, last = span.find(" "), span.rfind(" ")
    return span[first + 1 : last] if 0 <= first < last else span
