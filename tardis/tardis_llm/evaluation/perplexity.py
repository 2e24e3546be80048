"""Token perplexity of a causal model on windows of text, with its standard error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.limits import Tokenizer, check_windows
from ..calibration.text import begun, encode, first_token
from ..errors import InvalidInputError
from ..families.table import family_of, kind_of, vocabulary
from ..precision import quick_products
from ..report import Progress, silent

#: elements of the largest tensor of logits
LOGITS_AT_ONCE = 2**24
_STAGE = "measuring perplexity"


@dataclass(frozen=True)
class Perplexity:
    """Token perplexity: `exp` of the mean negative log-likelihood per token.

    Attributes:
        value: the perplexity; NaN or infinite where the model's output is.
        standard_error: standard error of `value`, from the variation between windows.
        tokens: tokens predicted; the first of each window is context only.
        windows: number of windows.
        length: tokens per window.
        losses: [windows] fp64, mean negative log-likelihood of each window.

    Examples:
        >>> from tardis_llm.checkpoint.loading import load_model
        >>> dense, folded = (token_perplexity(load_model(name), windows) for name in ("model", "folded"))
        >>> ratio, error = folded.ratio(dense)
        >>> abs(ratio - 1) < 0.1, error < folded.standard_error / folded.value
        (True, True)
    """

    kind: ClassVar[str] = "token perplexity"

    value: float
    standard_error: float
    tokens: int
    windows: int
    length: int
    losses: Tensor = field(repr=False, compare=False)

    @classmethod
    def of(cls, losses: Tensor, length: int) -> Perplexity:
        """The perplexity of two windows or more, from the mean negative log-likelihood of each, [windows] fp64."""
        value, error = exp_ratio(losses)
        return cls(value, error, len(losses) * (length - 1), len(losses), length, losses)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without those of single windows."""
        return {key: value for key, value in vars(self).items() if key != "losses"}

    def sentence(self) -> str:
        """What was measured on, for people."""
        return f"{self.tokens:,} tokens predicted in {self.windows:,} windows of {self.length}"

    def ratio(self, reference: Perplexity) -> tuple[float, float]:
        """This perplexity over another on the same windows, and its standard error.

        Pairing the windows takes out what makes a text hard for any model, so the error is far less than that of
        either perplexity.
        """
        return exp_ratio(self.losses - reference.losses)


def windows_of(text: str, tokenizer: Tokenizer, length: int) -> Tensor:
    """Cut a text into windows [n, length] of token ids, one after the other; the tail is dropped.

    The token that the tokenizer begins texts with, if there is one, is the first of every window.

    Raises:
        InvalidInputError: there is less than two windows of text, too little for a standard error.

    Examples:
        >>> windows_of("The text is cut into windows, the tail is dropped.", tokenizer, length=8).shape
        torch.Size([6, 8])
    """
    ids, first = torch.tensor(encode(tokenizer, text), dtype=torch.long), first_token(tokenizer)
    rest = length - len(first)
    count = len(ids) // rest
    if count < 2:
        raise InvalidInputError(
            f"the text has {len(ids)} tokens, less than two windows of {rest}; give more text or shorter windows."
        )
    return begun(ids[: count * rest].view(count, rest), first)


@torch.no_grad()
@quick_products()
def token_perplexity(model: PreTrainedModel, windows: Tensor, progress: Progress = silent) -> Perplexity:
    """Perplexity of a causal model on windows [n, length] of token ids, n >= 2.

    Each window is a text of its own. The standard error treats windows as independent: that of the mean
    negative log-likelihood over windows, times the perplexity (delta method).

    Raises:
        InvalidInputError: the model is an encoder, there is less than two windows, or it cannot take their tokens.

    Examples:
        >>> perplexity = token_perplexity(model, windows)
        >>> perplexity.windows, perplexity.tokens
        (40, 1240)
        >>> perplexity.value > 1, perplexity.standard_error > 0
        (True, True)
    """
    check_causal(model, Perplexity.kind)
    count, length = windows.shape
    if count < 2:
        raise InvalidInputError("a standard error needs two windows at least; give more text or shorter windows.")
    check_windows(model, windows)
    return Perplexity.of(torch.cat(list(_losses(model, windows, progress))), length)


def check_causal(model: PreTrainedModel, measure: str) -> None:
    """Raise InvalidInputError for an encoder or a model of speech, which have none of the measure named."""
    if not family_of(model.config).language_model:
        raise InvalidInputError(f"{kind_of(model)}, and such models have no {measure}; give a causal language model.")


def exp_ratio(losses: Tensor, counts: Tensor | None = None) -> tuple[float, float]:
    """`exp` of the sum of losses [n] over the sum of counts [n], and its standard error by the delta method.

    Args:
        losses: [n] fp64, independent of each other.
        counts: [n] fp64, what each loss is of; None for one each.
    """
    counts = torch.ones_like(losses) if counts is None else counts
    ratio, n = losses.sum() / counts.sum(), len(losses)
    error = ((losses - ratio * counts).square().sum() * n / (n - 1)).sqrt() / counts.sum()
    return float(ratio.exp()), float(ratio.exp() * error)


def _losses(model: PreTrainedModel, windows: Tensor, progress: Progress) -> Iterator[Tensor]:
    """Mean negative log-likelihood per token of each window, batch by batch, [batch] fp64."""
    batch = max(1, LOGITS_AT_ONCE // (windows.shape[1] * vocabulary(model)))
    for done in range(0, len(windows), batch):
        ids = windows[done : done + batch].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        # one window at a time in fp32, so that the copy stays small
        means = [F.cross_entropy(one[:-1].float(), target[1:]) for one, target in zip(logits, ids, strict=True)]
        progress(_STAGE, done + len(ids), len(windows))
        yield torch.stack(means).double().cpu()
