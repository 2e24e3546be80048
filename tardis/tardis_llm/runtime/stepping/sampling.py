"""Choose tokens one after the other, with as little around the steps as can be.

Where a step takes some milliseconds, the loop of transformers around it is a tenth of a token's time: it calls many
small operations, and the weights that a step reads have put the code of each out of the caches.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from ...errors import InvalidInputError

#: arguments of a forward that steps know, or that say nothing which changes them
KNOWN = {"past_key_values", "attention_mask", "position_ids", "logits_to_keep", "use_cache"}
_AS_INTEGERS = (torch.bfloat16, torch.float16)  # which numpy finds the greatest of faster, or at all


def greedy(logits: Tensor) -> Tensor:
    """[batch, 1] the likeliest next tokens by logits [batch, tokens, vocabulary]; of equals the first.

    By numpy, as torch looks through 150,000 numbers seven to nine times as long (two threads of an Intel Xeon).
    """
    last = logits[:, -1].detach()
    if last.device.type != "cpu":
        return last.float().argmax(-1, keepdim=True)
    if last.dtype not in _AS_INTEGERS:
        return torch.from_numpy(last.numpy().argmax(-1, keepdims=True))
    bits = last.view(torch.int16).numpy()  # sorted as the numbers are, the negative ones the other way round
    found = bits.argmax(-1, keepdims=True)
    negative = np.take_along_axis(bits, found, -1) < 0
    if negative.any():
        found = np.where(negative, bits.argmin(-1, keepdims=True), found)
    return torch.from_numpy(found)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    following: Callable[[Tensor, Any], Tensor],
    streamer: BaseStreamer | None = None,
    **inputs: Any,
) -> Tensor:
    """Token ids [batch, length] of prompts and what follows; the `custom_generate` of transformers' `generate`.

    Args:
        model: what reads the prompts.
        input_ids: [batch, tokens] token ids of the prompts.
        logits_processor: what changes logits before a token is chosen.
        stopping_criteria: where texts end.
        generation_config: whether tokens are drawn, and by what ended texts go on.
        following: logits [batch, 1, vocabulary] by tokens [batch, 1] and the cache of what came before.
        streamer: told of tokens as they come.
        inputs: the other arguments of the model's forward, a cache among them.

    Raises:
        InvalidInputError: `generate` was asked for what this loop does not do.
    """
    _check(generation_config, inputs, input_ids.shape[1])
    ends = _Ends(stopping_criteria, generation_config, len(input_ids))
    cache, ids = inputs["past_key_values"], input_ids
    unread = ids[:, cache.get_seq_length() :]
    logits = model(input_ids=unread, past_key_values=cache, use_cache=True, **last_logits(model)).logits
    while True:
        tokens = ends.kept(_chosen(logits, ids, logits_processor, bool(generation_config.do_sample)))
        ids = torch.cat([ids, tokens], 1)
        if streamer is not None:
            streamer.put(tokens[:, 0])
        if ends.reached(ids):
            break
        logits = following(tokens, cache)
    if streamer is not None:
        streamer.end()
    return ids


def last_logits(model: PreTrainedModel) -> dict[str, Any]:
    """The argument that keeps a prompt's logits to its last token, where the model has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def with_stop_strings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model and arguments of its `generate` in which strings that end a text are a criterion of their own.

    For `generate` of transformers does not let a `custom_generate` have the tokenizer that it would need for them.

    Raises:
        InvalidInputError: there are such strings, and no tokenizer.
    """
    plain, settings = copy.copy(model), dict(settings)  # the copy shares all but its configuration
    own, given = model.generation_config, settings.get("generation_config")
    plain.generation_config = _without_strings(own)
    if given is not None:
        settings["generation_config"] = _without_strings(given)
    asked = (settings.pop("stop_strings", None), given and given.stop_strings, own.stop_strings)
    strings = next((each for each in asked if each), None)
    if strings is None:
        return plain, settings
    if tokenizer is None:
        raise InvalidInputError(f"the strings {strings} are to end a text; give the model's tokenizer as well.")
    criteria = [*(settings.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)]
    return plain, {**settings, "stopping_criteria": StoppingCriteriaList(criteria)}


def _without_strings(config: GenerationConfig) -> GenerationConfig:
    """The same settings without strings that end a text."""
    without = copy.copy(config)
    without.stop_strings = None
    return without


def _check(config: GenerationConfig, inputs: dict[str, Any], length: int) -> None:
    """Raise InvalidInputError for what `generate` of transformers does and `sample` does not, with so long prompts."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    asked = {
        "beams": (config.num_beams or 1) > 1,
        "a record of each step": bool(config.return_dict_in_generate),
        "guesses by the prompt": bool(config.prompt_lookup_num_tokens),
        "padding": mask is not None and not bool(mask.all()),
        "other positions": positions is not None and bool((positions[..., -1] != length - 1).any()),
        **{name: value is not None for name, value in inputs.items() if name not in KNOWN},
    }
    found = [name for name, wanted in asked.items() if wanted]
    if found:
        lacks = " and no ".join(found)
        raise InvalidInputError(
            f"the short loop around steps has no {lacks}; call the model's own generate within `stepping`."
        )


class _Ends:
    """Where the texts of a batch end, told from numbers where that is all it takes."""

    def __init__(self, criteria: StoppingCriteriaList, config: GenerationConfig, batch: int) -> None:
        self._length = criteria.max_length
        self._tokens = [
            token for each in criteria if isinstance(each, EosTokenCriteria) for token in each.eos_token_id.tolist()
        ]
        known = (EosTokenCriteria, MaxLengthCriteria)
        self._others = StoppingCriteriaList([each for each in criteria if not isinstance(each, known)])
        self._padding = next((token for token in (config.pad_token_id, *self._tokens) if token is not None), None)
        self._ended = [False] * batch

    def kept(self, tokens: Tensor) -> Tensor:
        """[batch, 1] tokens; those of ended texts are padding."""
        if self._tokens and any(self._ended):
            rows = [[self._padding] if ended else row for ended, row in zip(self._ended, tokens.tolist(), strict=True)]
            return torch.tensor(rows, device=tokens.device)
        return tokens

    def reached(self, ids: Tensor) -> bool:
        """Whether all texts have ended with the last of ids [batch, length]."""
        ended = [token in self._tokens for token in ids[:, -1].tolist()]
        if self._others:
            ended = [a or b for a, b in zip(ended, self._others(ids, None).tolist(), strict=True)]
        self._ended = [a or b for a, b in zip(self._ended, ended, strict=True)]
        return all(self._ended) or (self._length is not None and ids.shape[1] >= self._length)


def _chosen(logits: Tensor, ids: Tensor, processors: LogitsProcessorList, drawn: bool) -> Tensor:
    """[batch, 1] next tokens by logits [batch, tokens, vocabulary], as transformers chooses them."""
    if not processors and not drawn:
        return greedy(logits)
    scores = processors(ids, logits[:, -1].float())
    return torch.multinomial(scores.softmax(-1), 1) if drawn else scores.argmax(-1, keepdim=True)
