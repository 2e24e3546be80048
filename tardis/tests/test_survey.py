"""The survey of dense models, the pictures, the self-check and generation."""

from __future__ import annotations

import copy
import dataclasses
import math
import struct
from pathlib import Path

import pytest
import torch
from folds import SETTINGS, folded_tiny, text
from models import ENCODER_NAMES, LAYERS, LAYOUTS, tiny_model, tiny_tokenizer, tokens

from tardis_llm import fold
from tardis_llm.calibration.text import Windows, split_windows
from tardis_llm.errors import InvalidInputError
from tardis_llm.evaluation import self_check
from tardis_llm.evaluation.generation import generate, prompt_ids, room
from tardis_llm.evaluation.plots import plot_fold, plot_survey
from tardis_llm.evaluation.self_check import SelfCheck, Verdict
from tardis_llm.evaluation.survey import survey
from tardis_llm.families.sites import find_ffns
from tardis_llm.runtime.placing import folded_ffns


def windows() -> Windows:
    return split_windows(text(), 32, 0.125)


def is_png(path: Path) -> bool:
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    return content.startswith(b"\x89PNG") and width > 1000 and height > 500


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layout_can_be_surveyed(name: str):
    found = survey(tiny_model(name), windows())
    assert len(found.layers) == len(found.ranges) == LAYERS
    for layer, (low, high) in zip(found.layers, found.ranges, strict=True):
        assert 0 < layer.linearity < 1.2
        assert 0 < layer.width < 1
        assert bool((low < high).all())
        assert layer.dense >= 2 * 64 * 256 * 4


def test_without_text_only_sizes_are_given():
    found = survey(tiny_model("gpt2"))
    assert [(layer.d, layer.h, layer.activation) for layer in found.layers] == [(64, 256, "gelu_tanh")] * LAYERS
    assert all(layer.linearity is None and layer.width is None for layer in found.layers)


def test_linearity_is_what_a_fold_of_the_first_layer_reports():
    _, report = folded_tiny("gpt2")
    assert survey(tiny_model("gpt2"), windows()).layers[0].linearity == pytest.approx(
        report.layers[0].linearity, rel=1e-4
    )


def test_a_ffn_that_stays_where_its_activation_is_straight_is_linear():
    model = tiny_model("gpt2")
    for site in find_ffns(model):
        w1, b1, _, _ = site.parts()
        w1.mul_(1e-3)
        b1.zero_()
    assert max(layer.linearity for layer in survey(model, windows()).layers) < 1e-3


def test_a_survey_is_drawn(tmp_path: Path):
    plot_survey(survey(tiny_model("gpt2"), windows()), tmp_path / "survey.png", "tiny")
    assert is_png(tmp_path / "survey.png")


def test_a_survey_without_text_cannot_be_drawn(tmp_path: Path):
    with pytest.raises(InvalidInputError, match="give --text FILE"):
        plot_survey(survey(tiny_model("gpt2")), tmp_path / "survey.png")


@pytest.mark.parametrize("layers", [None, (1,)])
def test_a_folded_model_is_drawn(layers: tuple[int, ...] | None, tmp_path: Path):
    model, report = folded_tiny("opt", dataclasses.replace(SETTINGS, layers=layers))
    plot_fold(model, report, tmp_path / "fold.png")
    assert is_png(tmp_path / "fold.png")


def test_ranges_that_are_all_open_or_all_empty_are_drawn(tmp_path: Path):
    model, report = copy.deepcopy(folded_tiny("gpt2"))
    for bound in (torch.inf, -torch.inf):
        for ffn in folded_ffns(model).values():
            ffn.low.fill_(-bound)
            ffn.high.fill_(bound)
        plot_fold(model, report, tmp_path / f"{bound}.png")
        assert is_png(tmp_path / f"{bound}.png")


def test_the_report_of_another_model_is_not_drawn(tmp_path: Path):
    with pytest.raises(InvalidInputError, match="not that of this model"):
        plot_fold(folded_tiny("gpt2")[0], folded_tiny("opt")[1], tmp_path / "fold.png")


def test_the_self_check_compares_perplexities_before_and_after():
    model = tiny_model("gpt2")
    check = SelfCheck(model, windows().heldout)
    before = check.verdict()
    assert before.growth == 1
    fold(model, text(), SETTINGS)
    after = check.verdict()
    assert after.dense == before.dense
    assert after.growth == pytest.approx(after.folded / after.dense) != 1
    assert after.passed


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_the_self_check_of_an_encoder_goes_by_the_change_of_its_output(name: str):
    model = tiny_model(name)
    check = SelfCheck(model, windows().heldout)
    assert check.verdict().growth < 1e-6  # the reference is kept in half precision
    fold(model, text(), SETTINGS)
    verdict = check.verdict()
    assert verdict.measure == "output change"
    assert 1e-5 < verdict.growth < self_check.LARGEST_CHANGE
    assert "output change" in verdict.sentence()


def test_a_single_heldout_window_is_halved():
    assert SelfCheck(tiny_model("gpt2"), tokens(1, 32)).windows.shape == (2, 16)


@pytest.mark.parametrize("growth", [2.01, math.nan, math.inf])
def test_a_growth_that_is_too_large_or_no_number_does_not_pass(growth: float):
    assert not Verdict("perplexity", 80.0, 80 * growth, growth, 2.0, 100).passed


def test_generation_repeats_with_its_seed_and_leaves_the_global_generator_alone():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    ids = prompt_ids(model, tokenizer, "Hello")
    state = torch.get_rng_state()
    one, same, other = (generate(model, tokenizer, ids, 20, temperature=5.0, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(model, tokenizer, ids, 20) == generate(model, tokenizer, ids, 20, seed=3)  # greedy


def test_generation_stays_within_the_positions():
    model, tokenizer = tiny_model("gpt2", eos_token_id=None), tiny_tokenizer()
    ids = prompt_ids(model, tokenizer, "x" * 120)
    assert room(model, tokenizer, ids) == 8
    lengths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate(model, tokenizer, ids, 1000)
    assert 120 <= sum(lengths) <= 128


def test_prompts_that_cannot_be_answered_are_refused():
    tokenizer = tiny_tokenizer()
    for name, prompt, message in (
        ("gpt2", "", "prompt is empty"),
        ("gpt2", "x" * 128, "128 tokens and this model takes 128; shorten"),
        ("bert", "Hello", "is an encoder"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            prompt_ids(tiny_model(name), tokenizer, prompt)
