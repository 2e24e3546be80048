"""Loaded models in lm-eval, the evaluation harness of EleutherAI: scored as our own evaluation scores them.

lm-eval and what it imports take seconds to load, so it is imported where it is needed and not with TARDIS.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.limits import check_length, check_tokens
from ..errors import InvalidInputError
from ..families.table import family_of
from ..report import Progress

#: tokens per forward. On a CPU more is no faster: the logits, all of which lm-eval normalises, leave the caches
BATCH_TOKENS_CPU, BATCH_TOKENS_GPU = 512, 16_384

_MODULES_WITH_BARS = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")


class Request(NamedTuple):
    """What lm-eval asks a model for: the log-probability of a continuation.

    Attributes:
        text: context and continuation; None for a window of a longer text.
        context: token ids, one at least.
        continuation: token ids, one at least.
    """

    text: tuple[str, str] | None
    context: list[int]
    continuation: list[int]

    def clipped(self, length: int) -> Request:
        """With no more of the continuation than a model that sees `length` tokens can score, the end of it."""
        if len(self.continuation) <= length:
            return self
        return Request(self.text, self.continuation[-length - 1 : -length], self.continuation[-length:])


def check_available() -> None:
    """Raise InvalidInputError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("datasets") is None:
        raise InvalidInputError("tasks are run by lm-eval, which is not installed: pip install 'tardis-llm[eval]'.")


def harness_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, batch_tokens: int | None = None
) -> Any:
    """The model as an `HFLM` of lm-eval, for `lm_eval.evaluate` and the like. The model itself is not changed.

    Log-probabilities are taken in fp32 of the model's logits, as in `token_perplexity`; in bf16, which is lm-eval's
    default for a bf16 model, choices tie, and the first one, in BLiMP always the right one, wins. Padding is on the
    right, where a causal model does not see it.

    Args:
        model: dense, folded or otherwise changed, on its device.
        tokenizer: its own; copied, because lm-eval gives it a padding token.
        length: tokens that the model sees at once; of longer texts the beginning is dropped.
        batch_tokens: tokens per forward; as fits the device without.

    Raises:
        InvalidInputError: lm-eval is not installed, the model is an encoder, or it does not take so many tokens.
    """
    check_available()
    if not family_of(model.config).causal:
        raise InvalidInputError(
            f"{type(model).__name__} is an encoder, which gives text no probability; give a causal language model."
        )
    check_length(model, length)
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS_CPU if model.device.type == "cpu" else BATCH_TOKENS_GPU
    with quiet():
        return _harness_class()(model, copy.deepcopy(tokenizer), length, batch_tokens)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep messages, warnings and progress bars of lm-eval, and of what it uses, off the screen."""
    import datasets

    modules: list[Any] = [importlib.import_module(name) for name in _MODULES_WITH_BARS]
    logger, bars = logging.getLogger("lm_eval"), [module.tqdm for module in modules]
    levels, drawn = (logger.level, transformers.logging.get_verbosity()), datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for module in modules:
        module.tqdm = _NoBar  # some of them have no switch
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar
        if not drawn:
            datasets.enable_progress_bars()
        transformers.logging.set_verbosity(levels[1])
        logger.setLevel(levels[0])


class _NoBar:
    """The part of tqdm's interface that lm-eval uses, without a bar."""

    def __init__(self, iterable: Iterable[Any] = (), **_: Any) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def update(self, steps: int = 1) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@lru_cache(maxsize=1)
def _harness_class() -> type:
    """`HFLM` that batches by tokens and asks the model only for the logits that are scored.

    Its own batches have a fixed number of sequences, few enough for long ones and far too few for short ones; and for
    a word at the end of a passage it has the logits of all the passage computed and normalised.
    """
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        """See `harness_model`."""

        def __init__(
            self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, batch_tokens: int
        ) -> None:
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                max_length=length,
                batch_size=2**31,  # all that `_loglikelihood_tokens` hands on at once
                logits_cache=False,  # takes wrong positions where one context goes on into the continuation of another
                softmax_dtype="float32",
            )
            self._batch_tokens = batch_tokens
            self._partial = "logits_to_keep" in inspect.signature(model.forward).parameters
            self._scored = 0  # positions at the end of the present batch
            self.watch("", None)

        def watch(self, stage: str, progress: Progress | None) -> None:
            """Tell `progress` of the requests done from here on."""
            self._stage, self._progress = stage, progress

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, ...]], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            """(log-probability, whether each token of it is the likeliest) of each request."""
            known = [Request(*request).clipped(self.max_length) for request in requests]
            answers: dict[int, tuple[float, bool]] = {}
            for batch in _batches(known, self._batch_tokens):
                some = [known[number] for number in batch]
                self._scored = _scored(some, self.max_length)
                answers.update(zip(batch, super()._loglikelihood_tokens(some, disable_tqdm=True), strict=True))
                if self._progress:
                    self._progress(self._stage, len(answers), len(known))
            return [answers[number] for number in range(len(known))]

        @torch.no_grad()
        def _model_call(self, inps: Tensor, attn_mask: None = None, labels: None = None) -> Tensor:
            """Logits [batch, at most length, vocabulary] for ids [batch, length]; HFLM counts from their end."""
            check_tokens(self.model, inps, self.tokenizer)
            kept = {"logits_to_keep": self._scored} if self._partial else {}
            logits: Tensor = self.model(input_ids=inps, use_cache=False, **kept).logits
            return logits

    return Harness


def _batches(requests: Sequence[Request], tokens: int) -> Iterator[list[int]]:
    """Numbers of requests in batches of at most `tokens` tokens with padding, or of one request; longest first."""
    sizes = [len(request.context) + len(request.continuation) for request in requests]
    batch: list[int] = []
    for number in sorted(range(len(requests)), key=lambda number: -sizes[number]):
        if batch and (len(batch) + 1) * sizes[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _scored(requests: Sequence[Request], length: int) -> int:
    """Positions at the end of a batch, padded on the right, from which all continuations are predicted."""
    inputs = [min(len(request.context) + len(request.continuation) - 1, length) for request in requests]
    first = min(size - len(request.continuation) for size, request in zip(inputs, requests, strict=True))
    return max(inputs) - first
