"""Word perplexity by the recipe of lm-eval's `wikitext` task: rolling log-likelihood over documents.

Each document is scored by itself, every token of it: the first follows a prefix token (the tokenizer's beginning or
end of text), and it is cut into windows that follow each other, each with the token before it as context; the last one
is filled up with context to the full length. The log-likelihoods are summed over everything and divided by the number
of words, as counted before detokenising. So models with different tokenizers can be compared, and the figure is much
larger than the token perplexity of `perplexity.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.limits import check_length, check_tokens
from ..calibration.text import first_token
from ..errors import InvalidInputError
from ..families.table import vocabulary
from ..precision import quick_products
from ..report import Progress, silent
from .perplexity import LOGITS_AT_ONCE, check_causal, exp_ratio

_STAGE = "measuring word perplexity"
_LONGEST_TITLE = 100
_RAW = re.compile(r" @[-,.]@ ")  # how WikiText writes the hyphen of a compound, and the marks within a number

# Natural spacing is put back in three steps, in lm-eval's order: marks, what is in brackets and quotes, and the rest.
_MARKS = {"s '": "s'", " @-@ ": "-", " @,@ ": ",", " @.@ ": ".", **{f" {mark} ": f"{mark} " for mark in ":;.!?,"}}
_PAIRS = [("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")]
_REST = {
    **{"= = = =": "====", "= = =": "===", "= =": "=="},
    **{" ° ": "°", " \n": "\n", "\n ": "\n", " N ": " 1 ", " 's": "'s"},
}


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: what is scored.
        words: number of words, before detokenising.
        bytes: number of bytes in UTF-8, before detokenising.
    """

    text: str
    words: int
    bytes: int

    @classmethod
    def of(cls, text: str, raw: bool = False) -> Document:
        """A text as a document; raw WikiText is detokenised. White space separates words, empty ends included."""
        return cls(detokenise(text) if raw else text, len(re.split(r"\s+", text)), len(text.encode("utf-8")))


@dataclass(frozen=True)
class WordPerplexity:
    """Word perplexity: `exp` of the negative log-likelihood of all documents, divided by their number of words.

    Attributes:
        value: the perplexity; NaN or infinite where the model's output is.
        standard_error: standard error of `value`, from the variation between documents.
        byte_perplexity: `exp` of the negative log-likelihood per byte.
        documents: number of documents.
        words: number of words in all documents.
        bytes: number of bytes in all documents.
        tokens: number of tokens in all documents; each is predicted.
        length: tokens that the model sees at once.
        losses: [documents] fp64, negative log-likelihood of each.
        counts: [documents] fp64, words of each.
    """

    kind: ClassVar[str] = "word perplexity"

    value: float
    standard_error: float
    byte_perplexity: float
    documents: int
    words: int
    bytes: int
    tokens: int
    length: int
    losses: Tensor = field(repr=False, compare=False)
    counts: Tensor = field(repr=False, compare=False)

    @classmethod
    def of(cls, documents: Sequence[Document], losses: Tensor, tokens: int, length: int) -> WordPerplexity:
        """The perplexity of two documents or more, from the negative log-likelihood of each, [documents] fp64."""
        counts = torch.tensor([document.words for document in documents], dtype=torch.float64)
        size = sum(document.bytes for document in documents)
        value, error = exp_ratio(losses, counts)
        byte_perplexity = float((losses.sum() / size).exp())
        return cls(
            value, error, byte_perplexity, len(documents), int(counts.sum()), size, tokens, length, losses, counts
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without those of single documents."""
        values = {key: value for key, value in vars(self).items() if key not in ("losses", "counts")}
        return {"kind": self.kind, **values}

    def sentence(self) -> str:
        """What was measured on, for people."""
        return (
            f"{self.words:,} words, {self.tokens:,} tokens predicted in {self.documents:,} documents, up to "
            f"{self.length} at once; {self.byte_perplexity:.4f} per byte"
        )

    def ratio(self, reference: WordPerplexity) -> tuple[float, float]:
        """This perplexity over another on the same documents, and its standard error, with the documents paired."""
        return exp_ratio(self.losses - reference.losses, self.counts)


class _Window(NamedTuple):
    """Tokens to put in, and how many of them at the end to predict from: each predicts the one after it."""

    document: int
    tokens: list[int]
    following: list[int]


def documents_of(text: str) -> list[Document]:
    """Cut a text into documents: at headings of WikiText (` = Title = `), or else at blank lines.

    A single short line between blank lines that does not end a sentence is a title, and goes with what follows it.
    Raw WikiText is known by its ` @-@ `.

    Examples:
        >>> [document.text for document in documents_of("A title\\n\\nOne text.\\n\\nAnother one.")]
        ['A title\\n\\nOne text.', 'Another one.']
    """
    raw, lines = bool(_RAW.search(text)), text.split("\n")
    starts = [number for number, line in enumerate(lines) if _is_heading(line)]
    if not starts:
        return [Document.of(block, raw) for block in _blocks(text)]
    bounds = [0, *starts, len(lines)]
    pages = ["\n".join(lines[start:stop]) for start, stop in pairwise(bounds)]
    return [Document.of(page, raw) for page in pages if page.strip()]


def detokenise(text: str) -> str:
    """WikiText with its natural spacing, by the same rules as lm-eval's `wikitext_detokenizer`."""
    for raw, natural in _MARKS.items():
        text = text.replace(raw, natural)
    for left, right in _PAIRS:
        text = re.sub(rf"\{left}\s*([^\{right}]*?)\s*\{right}", rf"{left}\1{right}", text)
    for raw, natural in _REST.items():
        text = text.replace(raw, natural)
    return text


@torch.no_grad()
@quick_products()
def word_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    length: int,
    progress: Progress = silent,
) -> WordPerplexity:
    """Word perplexity of a causal model on documents, two at least.

    The standard error is that of a ratio of sums over documents (delta method), as documents are independent and
    tokens within one are not.

    Args:
        model: dense or folded, in eval mode.
        tokenizer: the model's.
        documents: what is scored; see `documents_of`.
        length: tokens that the model sees at once.
        progress: told of the windows done.

    Raises:
        InvalidInputError: the model is an encoder, there are less than two documents, the tokenizer has no token for
            the beginning or the end of a text, or the model cannot take their tokens or the length.

    Examples:
        >>> documents = documents_of("One text, of six words only.\\n\\nAnother one.")
        >>> perplexity = word_perplexity(model, tokenizer, documents, length=64)
        >>> perplexity.documents, perplexity.words
        (2, 8)
    """
    check_causal(model, WordPerplexity.kind)
    if len(documents) < 2:
        raise InvalidInputError(
            "word perplexity needs two documents at least, which start at headings such as ` = Title = ` or behind "
            "blank lines; give more text, or measure token perplexity."
        )
    prefix, begun = _prefix(tokenizer), bool(first_token(tokenizer))
    texts = [tokenizer.encode(document.text, add_special_tokens=not begun, verbose=False) for document in documents]
    check_length(model, length)
    for ids in texts:
        check_tokens(model, torch.tensor([prefix, *ids]), tokenizer)
    windows = [window for number, ids in enumerate(texts) for window in _windows(number, [prefix, *ids], length, begun)]
    losses = torch.zeros(len(documents), dtype=torch.float64)
    for window, loss in _losses(model, windows, progress):
        losses[window.document] += loss
    return WordPerplexity.of(documents, losses, sum(map(len, texts)), length)


def _is_heading(line: str) -> bool:
    """Whether a line is a heading of the first level: one equals sign on each side."""
    joined = line.strip().replace("= =", "==").replace("= =", "==")
    return joined.startswith("= ") and joined.endswith(" =")


def _blocks(text: str) -> Iterator[str]:
    """Runs of lines between blank lines, each with the titles in front of it."""
    title = ""
    for block in re.split(r"\n\s*\n", text.strip()):
        if "\n" not in block and len(block) <= _LONGEST_TITLE and not block.endswith((".", "!", "?")):
            title += block + "\n\n"
        else:
            yield title + block
            title = ""
    if title:
        yield title.strip()


def _prefix(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InvalidInputError(
        "the tokenizer has no token for the beginning or the end of a text, which word perplexity starts from; measure "
        "token perplexity."
    )


def _windows(document: int, ids: list[int], length: int, begun: bool = False) -> Iterator[_Window]:
    """Windows over a document's tokens, the first of which is the prefix; if `begun`, it is that of every window."""
    for start in range(0, len(ids) - 1, length):
        stop = min(start + length, len(ids) - 1)
        context = ids[max(0, stop - length) : stop]
        yield _Window(document, [ids[0], *context[1:]] if begun else context, ids[start + 1 : stop + 1])


def _losses(model: PreTrainedModel, windows: list[_Window], progress: Progress) -> Iterator[tuple[_Window, float]]:
    """Each window with the negative log-likelihood of what it predicts, in batches of equally long ones."""
    most, done = LOGITS_AT_ONCE // vocabulary(model), 0  # tokens at once
    ordered = sorted(windows, key=lambda window: -len(window.tokens))
    for size, group in groupby(ordered, key=lambda window: len(window.tokens)):
        same = list(group)
        batch = max(1, most // size)
        for first in range(0, len(same), batch):
            some = same[first : first + batch]
            ids = torch.tensor([window.tokens for window in some], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits  # [batch, size, vocabulary]
            for window, one in zip(some, logits, strict=True):
                target = torch.tensor(window.following, device=model.device)
                yield window, float(F.cross_entropy(one[-len(target) :].float(), target, reduction="sum"))
            done += len(some)
            progress(_STAGE, done, len(windows))
