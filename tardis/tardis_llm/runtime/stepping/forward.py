"""Let a model of transformers decode through a `Program`, whatever calls it: its `generate`, or a loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...errors import InvalidInputError
from ...families.sites import running
from ...families.steps import STEPS
from ..backend import backend_for
from ..cpu.backend import CpuBackend
from .cache import GrowingCache
from .program import NotWholeError, Program
from .sampling import KNOWN, sample, with_stop_strings

_SEQUENCES = 16  # beyond, products are bound by arithmetic, and other kernels are faster
#: by how much logits may differ, of their spread; in folded FFNs, neurons next to a bound of theirs may go either way
_ALIKE, _ALIKE_FOLDED = 0.1, 0.3


class Steps:
    """The forward of a model, which runs steps of one token through a `Program` where it can.

    A step is one where each sequence of a batch gets one token behind a `GrowingCache`, without padding; all else goes
    through the model's own forward. The first step goes both ways: where the logits differ, the model is built
    otherwise than its family, and no step runs whole.

    Args:
        model: in eval mode, prepared for decoding.
        forward: what all else goes through; default: the model's `forward`, which it may stand for.

    Attributes:
        why_not: why steps do not run whole; "" while they do, or none was asked for.
        count: how many steps ran whole.
    """

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any] | None = None) -> None:
        self._model, self._forward = model, forward or model.forward
        self._program: Program | None = None
        self._checked = False
        self.why_not = ""
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own forward returns for these arguments."""
        ids: Any = kwargs.get("input_ids")
        cache: Any = kwargs.get("past_key_values")
        if args or self.why_not or not self._is_step(ids, cache, kwargs):
            return self._forward(*args, **kwargs)
        logits = self._whole(ids, cache, kwargs)
        if logits is None:
            return self._forward(**kwargs)
        return CausalLMOutputWithPast(logits=logits.clone(), past_key_values=cache)

    def following(self, ids: Tensor, cache: Cache) -> Tensor:
        """Logits [batch, 1, vocabulary] behind one more token [batch, 1] of each sequence; the cache grows by it.

        They are those of `__call__` for the same tokens and cache; the next step overwrites them.
        """
        step = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        whole = not self.why_not and self._is_step(ids, cache, step)
        logits = self._whole(ids, cache, step) if whole else None
        return self._forward(**step).logits if logits is None else logits

    def generate(
        self,
        ids: Tensor,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> Tensor:
        """Token ids [batch, length]: those of the model's own `generate`, sooner, for greedy choice and for sampling.

        Args:
            ids: [batch, tokens] token ids of prompts of one length.
            streamer: told of tokens as they come.
            tokenizer: of the model; needed where strings end a text.
            settings: other arguments of `generate`.

        Raises:
            InvalidInputError: for beams, padding, drafts by another model, records of each step, and what else needs
                `generate` itself; or strings are to end a text and there is no tokenizer.

        Example:
            >>> with stepping(model) as steps:
            ...     steps.generate(ids, max_new_tokens=64)
        """
        if settings.get("assistant_model") is not None:
            raise InvalidInputError("the short loop around steps has no drafts; call the model's own generate.")
        settings.setdefault("past_key_values", cache_for(self._model) or DynamicCache(config=self._model.config))
        loop = functools.partial(sample, following=self.following, streamer=streamer)
        model, settings = with_stop_strings(self._model, tokenizer, settings)
        return model.generate(ids, streamer=streamer, custom_generate=loop, **settings)

    def _whole(self, ids: Tensor, cache: GrowingCache, kwargs: dict[str, Any]) -> Tensor | None:
        """Logits [batch, 1, vocabulary] of a step that runs whole; None where it does not."""
        try:
            logits = self._logits(ids, cache, kwargs)
        except NotWholeError as reason:
            self.why_not = str(reason)
            return None
        self.count += 1
        return logits

    def _is_step(self, ids: Any, cache: Any, kwargs: dict[str, Any]) -> bool:
        if not isinstance(cache, GrowingCache) or not isinstance(ids, Tensor) or torch.is_grad_enabled():
            return False
        if self._model.training or kwargs.get("return_dict") is False:
            return False
        if ids.shape[1] != 1 or len(ids) > _SEQUENCES or not cache.get_seq_length():
            return False
        known = {"input_ids", "return_dict", *KNOWN}
        if any(value is not None and value is not False for name, value in kwargs.items() if name not in known):
            return False
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if positions is not None and not bool((positions == cache.get_seq_length()).all()):
            return False
        return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all()))

    def _logits(self, ids: Tensor, cache: GrowingCache, kwargs: dict[str, Any]) -> Tensor:
        hidden = self._model.get_input_embeddings()(ids)
        if not isinstance(backend_for(hidden), CpuBackend):
            raise NotWholeError("its kernels are not those of a CPU.")
        if self._program is None or not self._program.fits(len(ids)):
            self._program = Program(self._model, len(ids))
        if not self._checked:
            self._check(hidden, cache, kwargs)
        return self._program.run(hidden, cache)

    def _check(self, hidden: Tensor, cache: GrowingCache, kwargs: dict[str, Any]) -> None:
        """Raise NotWholeError where the program's logits are not the model's; the cache stays as it is."""
        assert self._program is not None, "it is made before"
        wanted = self._forward(**kwargs).logits[:, -1].float()
        cache.crop(-1)
        found = self._program.run(hidden, cache)[:, -1].float()
        cache.crop(-1)
        difference = (found - wanted).square().mean().sqrt() / wanted.std(-1).mean().clamp_min(1e-30)
        if not float(difference) <= (_ALIKE_FOLDED if self._program.folded else _ALIKE):
            raise NotWholeError(f"its logits would differ by {float(difference):.2g} of their spread.")
        self._checked = True


def cache_for(model: PreTrainedModel) -> GrowingCache | None:
    """An empty cache with which steps of a model can run whole; None for families whose steps do not."""
    return GrowingCache(model.config.num_hidden_layers) if model.config.model_type in STEPS else None


@contextmanager
def stepping(model: PreTrainedModel) -> Iterator[Steps]:
    """Within the context, steps of the model behind a `GrowingCache` run through the kernels as a whole.

    Args:
        model: on the CPU, in eval mode, made ready by `prepare_decoding`.

    Example:
        >>> prepare_decoding(model)
        >>> with stepping(model) as steps:
        ...     ids = model.generate(prompt, past_key_values=cache_for(model))
        >>> steps.count, steps.why_not
    """
    steps = Steps(model)
    with running(model, _as_forward(model.forward, steps)):
        yield steps


def _as_forward(forward: Callable[..., Any], steps: Steps) -> Callable[..., Any]:
    """A function with the signature of a forward, which transformers looks at."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return steps(*args, **kwargs)

    return run
