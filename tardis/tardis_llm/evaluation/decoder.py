"""Decode a batch step by step behind a prompt, again and again from the same place, so that it can be timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache

from ..errors import InvalidInputError
from ..runtime.decoding import compile_errors_explained, compiled_call
from ..runtime.stepping.forward import Steps, cache_for
from ..runtime.stepping.sampling import greedy, last_logits


class Decoder:
    """Decodes a batch behind a prompt; every method that decodes cuts the cache back to the prompt afterwards.

    Args:
        model: in eval mode, as it is when the decoder is made: its cache is what the prompt leaves.
        prompt: [batch, tokens] token ids.
        compiled: the most steps at once, which then run as one compiled graph each; None for steps as `generate` runs
            them: whole by the kernels where they can, see `stepping`, else in torch's eager mode.

    Attributes:
        prefill: seconds that the prompt took.

    Raises:
        InvalidInputError: the model cannot be compiled, or its constant cache cannot be cut back.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, prompt: Tensor, compiled: int | None = None) -> None:
        self.model = model
        self._steps = Steps(model, model)
        self._following = self._steps.following if compiled is None else _by(compiled_call(model))
        cache: Cache | None = cache_for(model)
        if compiled is not None:
            cache = _static_cache(model, prompt.shape[1] + compiled)
        start = time.perf_counter()
        output = model(input_ids=prompt, past_key_values=cache, use_cache=True, **last_logits(model))
        self.prefill = time.perf_counter() - start
        self.cache = output.past_key_values
        self.first = greedy(output.logits)

    @property
    def why_not(self) -> str:
        """Why steps do not run whole by the kernels; "" if they do, are compiled, or there was none yet."""
        return self._steps.why_not

    @torch.no_grad()
    def seconds(self, steps: int) -> float:
        """Seconds per step over `steps` greedy steps, behind a step that does not count; see `warm_up`."""
        self.warm_up()
        start = time.perf_counter()
        self._decode(steps, self._following)
        return (time.perf_counter() - start) / steps

    @torch.no_grad()
    def warm_up(self) -> None:
        """Run one step: it may compile the graph, and put weights in order that another variant left in its own."""
        with compile_errors_explained():
            self._decode(1, self._following)

    @torch.no_grad()
    def step_eagerly(self) -> None:
        """Run one step in eager mode, where hooks see what happens."""
        self._decode(1, _by(self.model))

    def _decode(self, steps: int, following: Callable[[Tensor, Cache], Tensor]) -> None:
        ids = self.first
        for _ in range(steps):
            ids = greedy(following(ids, self.cache))
        _cut(self.cache, steps)


def _by(forward: Callable[..., Any]) -> Callable[[Tensor, Cache], Tensor]:
    """What gives logits [batch, 1, vocabulary] by tokens [batch, 1] and a cache, through a model's forward."""

    def following(ids: Tensor, cache: Cache) -> Tensor:
        logits: Tensor = forward(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return logits

    return following


def _static_cache(model: PreTrainedModel, tokens: int) -> StaticCache:
    cache = StaticCache(model.config, tokens)
    if any(layer.is_sliding for layer in cache.layers):
        raise InvalidInputError(
            f"{type(model).__name__} attends within a sliding window, whose compiled steps cannot go back to where the "
            "prompt ended; measure it without --compile."
        )
    return cache


def _cut(cache: Cache, tokens: int) -> None:
    """Take so many tokens off the end of a cache that holds all there were."""
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            layer.cumulative_length.sub_(tokens)
    else:
        cache.crop(-tokens)
