"""What a model can take, for every family: positions, vocabulary; and settings beyond what any library takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import QUICK_TINY, Result, assert_refused
from folds import SETTINGS
from marks import long
from models import CAUSAL_NAMES, ENCODER_NAMES, FAMILY_NAMES, POSITIONS, VOCAB, tiny_model, tiny_tokenizer, tokens
from transformers import PreTrainedTokenizerBase

from tardis_llm import fold
from tardis_llm.calibration.limits import check_windows, window_length
from tardis_llm.calibration.text import read_windows, split_windows
from tardis_llm.config import FoldConfig
from tardis_llm.errors import InvalidInputError
from tardis_llm.evaluation.generation import generate, prompt_ids
from tardis_llm.evaluation.perplexity import token_perplexity
from tardis_llm.evaluation.rolling import Document, word_perplexity
from tardis_llm.evaluation.survey import survey
from tardis_llm.families.table import position_limit, vocabulary
from tardis_llm.integrations.lm_eval import harness_model

Tardis = Callable[..., Result]
#: ALiBi without a table, computed for texts of any length
UNLIMITED = ["bloom", "falcon_alibi"]
#: Falcon's config says 2048 if nothing else
LIMITS = {name: 2048 if name.startswith("falcon") else POSITIONS for name in FAMILY_NAMES if name not in UNLIMITED}


def endless(*added: str) -> PreTrainedTokenizerBase:
    """A tokenizer without a limit of its own, with these tokens at the end of its vocabulary of VOCAB."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(VOCAB - len(tokenizer))] if added else [])
    tokenizer.add_tokens(list(added))
    tokenizer.model_max_length = 10**30
    return tokenizer


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_knows_how_many_positions_and_tokens_it_has(name: str) -> None:
    model = tiny_model(name)
    assert position_limit(model.config) == LIMITS.get(name)
    assert vocabulary(model) == VOCAB
    assert window_length(model, endless(), None) == min(1024, LIMITS.get(name, 1024))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in LIMITS if LIMITS[name] == POSITIONS])
def test_the_limit_is_what_the_model_itself_takes(name: str) -> None:
    model = tiny_model(name)
    assert model(input_ids=tokens(1, POSITIONS)).logits.shape[1] == POSITIONS
    with pytest.raises(InvalidInputError, match=f"windows of {POSITIONS + 1} tokens .* takes {POSITIONS} at most"):
        check_windows(model, tokens(1, POSITIONS + 1))


@torch.no_grad()
@pytest.mark.parametrize("name", UNLIMITED)
def test_alibi_takes_texts_of_any_length(name: str) -> None:
    ids = tokens(1, 3 * POSITIONS)
    check_windows(tiny_model(name), ids)
    assert tiny_model(name)(input_ids=ids).logits.shape[1] == 3 * POSITIONS


@pytest.mark.parametrize("name", [name for name in CAUSAL_NAMES if LIMITS.get(name) == POSITIONS])
def test_generation_ends_where_the_positions_do(name: str) -> None:
    model, tokenizer = tiny_model(name, eos_token_id=None), endless()
    with pytest.raises(InvalidInputError, match=f"takes {POSITIONS}; shorten the prompt"):
        prompt_ids(model, tokenizer, "x" * POSITIONS)
    ids = prompt_ids(model, tokenizer, "x" * (POSITIONS - 3))
    assert isinstance(generate(model, tokenizer, ids, 30), str)


@pytest.fixture(params=["mpt", "roberta"])
def short(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A model of a family with 128 positions, and a tokenizer without a limit."""
    tiny_model(request.param).save_pretrained(tmp_path / "model")
    endless().save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model"


@long
def test_commands_stay_within_the_positions(
    tardis: Tardis, short: tuple[str, Path], tiny_text: Path, tmp_path: Path
) -> None:
    name, model = short
    (tmp_path / "pages.txt").write_text("\n\n".join([tiny_text.read_text(encoding="utf-8")[:1_000] + "."] * 2))
    settings = [value for value in QUICK_TINY if value not in ("--sequence-length", "32")]
    folding = tardis("fold", model, "-o", tmp_path / "out", "--text", tiny_text, *settings)
    assert folding.code == 0
    assert f"windows of {POSITIONS}" in folding.err
    assert_refused(
        tardis("fold", model, "-o", tmp_path / "b", "--text", tiny_text, *settings, "--sequence-length", POSITIONS + 1),
        f"windows of {POSITIONS + 1} tokens do not fit this model; choose from 2 to {POSITIONS}",
    )
    assert tardis("inspect", model, "--text", tiny_text).code == 0
    if name in ENCODER_NAMES:
        return
    for directory in (model, tmp_path / "out"):
        assert tardis("eval", directory, "--text", tiny_text).code == 0
        assert tardis("eval", directory, "--text", tmp_path / "pages.txt", "--recipe", "words").code == 0
        assert_refused(tardis("eval", directory, "--text", tiny_text, "--window", 129), "choose from 2 to 128")
        assert_refused(tardis("generate", directory, "word " * 200), "this model takes 128; shorten the prompt")
        across = tardis("generate", directory, "x" * 120, "--max-new-tokens", 30)
        assert across.code == 0
        assert "only 8 tokens fit" in across.err
    comparison = ("compare", model, "-o", tmp_path / "c", "--text", tiny_text, "--eval-text", tiny_text)
    assert tardis(*comparison, "--methods", "affine", "--dtype", "float32").code == 0


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_token_without_an_embedding_is_named_with_both_sizes(name: str) -> None:
    model, tokenizer = tiny_model(name), endless("of the")
    ids = torch.tensor(tokenizer.encode("one of the two")).view(1, -1)
    message = f"has token {VOCAB}, but the model has embeddings for {VOCAB} tokens, and the tokenizer has {VOCAB + 1}"
    with pytest.raises(InvalidInputError, match=message):
        check_windows(model, ids, tokenizer)
    if name not in ENCODER_NAMES:
        with pytest.raises(InvalidInputError, match=message):
            prompt_ids(model, tokenizer, "one of the two")


def test_every_function_that_takes_tokens_refuses_those_without_an_embedding() -> None:
    model, ids = tiny_model("gpt2"), tokens(40, 32)
    message = f"has token {VOCAB}, but the model has embeddings for {VOCAB}"
    ids[3, 5] = VOCAB
    for call in (
        lambda: fold(model, ids, SETTINGS),
        lambda: survey(model, split_windows(ids, 32, 0.2)),
        lambda: token_perplexity(model, ids),
        lambda: word_perplexity(model, endless("of the"), [Document.of("a of the"), Document.of("b c")], 16),
    ):
        with pytest.raises(InvalidInputError, match=message):
            call()


def test_tasks_refuse_what_the_model_cannot_take() -> None:
    model, tokenizer = tiny_model("gpt2"), endless("of the")
    with pytest.raises(InvalidInputError, match=f"takes {POSITIONS} at most"):
        harness_model(model, tokenizer, POSITIONS + 1)
    with pytest.raises(InvalidInputError, match=f"the tokenizer has {VOCAB + 1}"):
        harness_model(model, tokenizer, 32)._loglikelihood_tokens([(None, [1, VOCAB], [2])])


def test_a_negative_token_is_none() -> None:
    with pytest.raises(InvalidInputError, match="has token -1"):
        check_windows(tiny_model("gpt2"), torch.tensor([[3, -1]]))


@pytest.mark.parametrize("verb", ["fold", "eval", "words", "inspect", "compare", "generate"])
def test_commands_name_the_sizes_of_tokenizer_and_model(
    tardis: Tardis, tiny_dir: Path, tiny_text: Path, tmp_path: Path, verb: str
) -> None:
    model = tmp_path / "model"
    tiny_model("gpt2").save_pretrained(model)
    endless(" the ").save_pretrained(model)
    pages = tmp_path / "pages.txt"
    pages.write_text("One of the two.\n\nAnd the other.")
    command = {
        "fold": ("fold", model, "-o", tmp_path / "out", "--text", tiny_text, *QUICK_TINY),
        "eval": ("eval", model, "--text", tiny_text),
        "words": ("eval", model, "--text", pages, "--recipe", "words"),
        "inspect": ("inspect", model, "--text", tiny_text),
        "compare": ("compare", model, "-o", tmp_path / "out", "--text", tiny_text, "--eval-text", tiny_text),
        "generate": ("generate", model, "Over the hills"),
    }[verb]
    assert_refused(tardis(*command), f"embeddings for {VOCAB} tokens, and the tokenizer has {VOCAB + 1}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**40])
def test_seeds_that_no_generator_takes_are_refused(
    fold: Callable[..., Result], tardis: Tardis, tiny_dir: Path, seed: int
) -> None:
    message = f"seed is {seed}; give a whole number"
    with pytest.raises(InvalidInputError, match=message):
        FoldConfig(seed=seed)
    assert_refused(fold("--seed", seed), message)
    assert_refused(tardis("generate", tiny_dir, "Hello", "--seed", seed), message)


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_seeds_of_64_bits_work(tiny_text: Path, seed: int) -> None:
    assert read_windows([tiny_text], tiny_tokenizer(), 512, 16, 0.2, FoldConfig(seed=seed).seed).fit.shape[1] == 16
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    assert isinstance(generate(model, tokenizer, tokens(1, 4), 2, temperature=1.0, seed=seed), str)


@pytest.mark.parametrize("temperature", [1e-300, float("nan")])
def test_temperatures_that_no_score_can_be_divided_by_are_refused(temperature: float) -> None:
    with pytest.raises(InvalidInputError, match="give 0, or a number from"):
        generate(tiny_model("gpt2"), tiny_tokenizer(), tokens(1, 4), 2, temperature=temperature)


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_a_memory_limit_is_a_number_from_0(limit: float) -> None:
    with pytest.raises(InvalidInputError, match="memory_limit_gib is"):
        FoldConfig(memory_limit_gib=limit)
