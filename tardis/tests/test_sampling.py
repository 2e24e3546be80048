"""The short loop around steps chooses the tokens that `generate` of transformers chooses, and refuses what it lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CAUSAL_NAMES, END, LAYOUTS, tiny_model, tiny_tokenizer, tokens
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from tardis_llm.errors import InvalidInputError
from tardis_llm.runtime.decoding import prepare_decoding
from tardis_llm.runtime.stepping.forward import cache_for, stepping
from tardis_llm.runtime.stepping.sampling import greedy

_CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "drawn": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "repetition": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "least": {"do_sample": False, "min_new_tokens": 8, "eos_token_id": list(range(0, 320, 3))},
}


class _Heard(BaseStreamer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def _ready(name: str = "llama", **changes: Any) -> PreTrainedModel:
    model = tiny_model(name, **changes)
    prepare_decoding(model)
    return model


def _both(model: PreTrainedModel, ids: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """By `generate` of transformers with the same steps, and by the short loop; from the same seed."""
    found = []
    with torch.random.fork_rng(devices=[]), stepping(model) as steps:
        cache = {"past_key_values": kept} if (kept := cache_for(model)) is not None else {}
        for generate, more in ((model.generate, cache), (steps.generate, {})):
            torch.manual_seed(0)
            found.append(generate(ids, pad_token_id=0, **settings, **more))
    return found[0], found[1]


def _first_letter(ids: Tensor) -> str:
    """The first of some tokens that is a whole character."""
    return next(text for text in (tiny_tokenizer().decode([token]) for token in ids.tolist()) if text.isalpha())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("choice", list(_CHOICES))
def test_every_way_to_choose(choice: str, batch: int) -> None:
    wanted, found = _both(_ready(), tokens(batch, 9), max_new_tokens=16, **_CHOICES[choice])
    assert torch.equal(found, wanted)
    assert found.shape[1] > 9 + 7


@pytest.mark.parametrize(
    "name", [name if name in LAYOUTS else pytest.param(name, marks=pytest.mark.long) for name in CAUSAL_NAMES]
)
def test_every_family(name: str) -> None:
    wanted, found = _both(_ready(name), tokens(2, 7), max_new_tokens=6, eos_token_id=None)
    assert torch.equal(found, wanted)


def test_texts_of_a_batch_end_apart() -> None:
    model = _ready()
    free, _ = _both(model, tokens(3, 9), max_new_tokens=12, eos_token_id=None)
    ends = [int(free[0, 11]), int(free[1, 14])]
    wanted, found = _both(model, tokens(3, 9), max_new_tokens=12, eos_token_id=ends)
    assert torch.equal(found, wanted)
    assert (found[0, 12:] == 0).all() and not (found[2, 9:] == 0).all()
    alone, found = _both(model, tokens(3, 9)[:1], max_new_tokens=12, eos_token_id=ends)
    assert torch.equal(found, alone)
    assert found.shape[1] == 12


def test_strings_end_a_text() -> None:
    model, tokenizer = _ready(), tiny_tokenizer()
    free, _ = _both(model, tokens(1, 9), max_new_tokens=24, eos_token_id=None)
    said = _first_letter(free[0, 12:])
    wanted, found = _both(
        model, tokens(1, 9), max_new_tokens=24, eos_token_id=END, stop_strings=[said], tokenizer=tokenizer
    )
    assert torch.equal(found, wanted)
    assert found.shape[1] < free.shape[1]


@pytest.mark.parametrize("where", ["the model", "a configuration"])
def test_strings_of_a_configuration_end_a_text(where: str) -> None:
    model, tokenizer = _ready(), tiny_tokenizer()
    free, _ = _both(model, tokens(1, 9), max_new_tokens=24, eos_token_id=None)
    config = GenerationConfig(stop_strings=[_first_letter(free[0, 9:])], max_new_tokens=24, pad_token_id=0)
    given = {"generation_config": config} if where == "a configuration" else {}
    if not given:
        model.generation_config = config
    with stepping(model) as steps:
        found = steps.generate(tokens(1, 9), tokenizer=tokenizer, **given)
        assert torch.equal(found, model.generate(tokens(1, 9), tokenizer=tokenizer, **given))
        assert found.shape[1] < free.shape[1]
        assert config.stop_strings
        with pytest.raises(InvalidInputError, match="give the model's tokenizer"):
            steps.generate(tokens(1, 9), **given)


def test_a_streamer_hears_the_prompt_and_every_token() -> None:
    model, heard = _ready(), _Heard()
    with stepping(model) as steps:
        ids = steps.generate(tokens(1, 9), streamer=heard, max_new_tokens=5, eos_token_id=None)
    assert [token for some in heard.tokens for token in some] == ids[0].tolist()
    assert len(heard.tokens) == 6
    assert heard.ended == 1


def test_what_a_cache_holds_is_not_read_again() -> None:
    model = _ready()
    with torch.no_grad(), stepping(model) as steps:
        first = steps.generate(
            tokens(1, 9), max_new_tokens=4, eos_token_id=None, past_key_values=(cache := cache_for(model))
        )
        on = steps.generate(first, max_new_tokens=4, eos_token_id=None, past_key_values=cache)
    wanted = model.generate(tokens(1, 9), max_new_tokens=8, eos_token_id=None)
    assert torch.equal(on, wanted)


def test_steps_run_whole_but_the_first_token_of_the_prompt() -> None:
    with stepping(_ready()) as steps:
        steps.generate(tokens(2, 9), max_new_tokens=7, eos_token_id=None)
    assert steps.why_not == ""
    assert steps.count == 6


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 2}, "beams"),
        ({"return_dict_in_generate": True}, "a record of each step"),
        ({"attention_mask": torch.tensor([[0, *[1] * 8]] * 2)}, "padding"),
        ({"prompt_lookup_num_tokens": 2}, "guesses by the prompt"),
        ({"position_ids": torch.arange(1, 10)[None]}, "other positions"),
        ({"inputs_embeds": torch.zeros(2, 9, 64)}, "inputs_embeds"),
        ({"assistant_model": tiny_model("llama")}, "drafts"),
    ],
)
def test_what_it_lacks_is_refused(settings: dict[str, Any], named: str) -> None:
    with stepping(_ready()) as steps, pytest.raises(InvalidInputError, match=f"no {named}.* the model's own generate"):
        steps.generate(tokens(2, 9), max_new_tokens=3, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", ["both", "all below zero"])
def test_the_likeliest_token(dtype: torch.dtype, sign: str) -> None:
    logits = torch.randn(5, 2, 1001, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits = logits if sign == "both" else -logits.abs() - 0.5
    logits[0, -1, [7, 500]] = -0.25 if sign != "both" else 9  # of equals the first
    logits[1, -1, 3] = torch.inf if sign == "both" else -0.0
    wanted = logits[:, -1].float().numpy().argmax(-1)
    assert greedy(logits)[:, 0].tolist() == wanted.tolist()
    assert wanted[:2].tolist() == [7, 3]
