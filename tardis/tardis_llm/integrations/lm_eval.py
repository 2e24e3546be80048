"""Models in lm-eval, the evaluation harness of EleutherAI, with log-probabilities as in our own evaluation.

lm-eval takes seconds to import, so it is imported where it is needed and not with TARDIS.
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
from ..families.table import family_of, kind_of
from ..report import Progress

#: tokens per forward. More is no faster on a CPU: lm-eval normalises all logits, which then no longer fit the caches
BATCH_TOKENS_CPU, BATCH_TOKENS_GPU = 512, 16_384

_MODULES_WITH_BARS = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")


class Request(NamedTuple):
    """A request of lm-eval: the log-probability of a continuation after a context.

    Attributes:
        text: context and continuation as text; None for a window of a longer text.
        context: its token ids, one at least.
        continuation: its token ids, one at least.
    """

    text: tuple[str, str] | None
    context: list[int]
    continuation: list[int]

    def clipped(self, length: int) -> Request:
        """The request reduced to the end of its continuation, if a model that sees `length` tokens cannot score all."""
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
    """The model as an `HFLM` of lm-eval, for functions such as `lm_eval.evaluate`. The model itself is not changed.

    The softmax is computed in fp32, as in `token_perplexity`. lm-eval computes it in bf16 for a bf16 model; choices
    then tie, and a tie goes to the first choice, which in BLiMP is always the right one. Padding is on the right, where
    a causal model does not see it.

    Args:
        model: dense, folded or otherwise changed, on any device.
        tokenizer: the model's; copied, because lm-eval gives it a padding token.
        length: how many tokens the model sees at once; longer texts lose their beginning.
        batch_tokens: tokens per forward; default: 512 on a CPU, 16,384 on a GPU.

    Raises:
        InvalidInputError: lm-eval is not installed, the model is an encoder, or `length` exceeds its positions.
    """
    check_available()
    if not family_of(model.config).language_model:
        raise InvalidInputError(
            f"{kind_of(model)}, and such models give text no probability; give a causal language model."
        )
    check_length(model, length)
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS_CPU if model.device.type == "cpu" else BATCH_TOKENS_GPU
    with quiet():
        return _harness_class()(model, copy.deepcopy(tokenizer), length, batch_tokens)


@contextmanager
def quiet() -> Iterator[None]:
    """Within the context, lm-eval and the libraries that it uses print no messages, warnings or progress bars."""
    import datasets

    modules: list[Any] = [importlib.import_module(name) for name in _MODULES_WITH_BARS]
    logger, bars = logging.getLogger("lm_eval"), [module.tqdm for module in modules]
    levels, drawn = (logger.level, transformers.logging.get_verbosity()), datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for module in modules:
        module.tqdm = _NoBar  # some progress bars have no switch
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
    """A replacement of tqdm that draws no bar, with the part of its interface that lm-eval uses."""

    def __init__(self, iterable: Iterable[Any] = (), **_: Any) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def update(self, steps: int = 1) -> None:
        """Do nothing, where tqdm advances its bar."""

    def close(self) -> None:
        """Do nothing, where tqdm removes its bar."""


@lru_cache(maxsize=1)
def _harness_class() -> type:
    """A class like `HFLM` that batches by tokens and computes only the logits that are scored.

    A batch of `HFLM` has a fixed number of sequences, which must be small for long ones and is then too small for short
    ones. To score a word at the end of a passage, it computes and normalises the logits of the whole passage.
    """
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        """The class of the models that `harness_model` returns."""

        def __init__(
            self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, batch_tokens: int
        ) -> None:
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                max_length=length,
                batch_size=2**31,  # no further split of the batches of `_loglikelihood_tokens`
                logits_cache=False,  # it takes wrong positions where two requests split the same tokens differently
                softmax_dtype="float32",
            )
            self._batch_tokens = batch_tokens
            self._partial = "logits_to_keep" in inspect.signature(model.forward).parameters
            self._scored = 0  # number of positions, at the end of the present batch, whose logits are needed
            self.watch("", None)

        def watch(self, stage: str, progress: Progress | None) -> None:
            """From now on, report the number of requests that are done to `progress`; None stops that."""
            self._stage, self._progress = stage, progress

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, ...]], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            """Log-probability of each request's continuation, and whether each token of it is the likeliest."""
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
            """Logits [batch, positions, vocabulary] for ids [batch, length].

            There may be fewer positions than tokens, the last ones; HFLM counts positions from the end.
            """
            check_tokens(self.model, inps, self.tokenizer)
            kept = {"logits_to_keep": self._scored} if self._partial else {}
            logits: Tensor = self.model(input_ids=inps, use_cache=False, **kept).logits
            return logits

    return Harness


def _batches(requests: Sequence[Request], tokens: int) -> Iterator[list[int]]:
    """Batches of indices of requests, longest first, each of `tokens` tokens with padding at most or of one request."""
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
    """How many positions at the end of a batch, padded on the right, contain all those that predict continuations."""
    inputs = [min(len(request.context) + len(request.continuation) - 1, length) for request in requests]
    first = min(size - len(request.continuation) for size, request in zip(inputs, requests, strict=True))
    return max(inputs) - first
