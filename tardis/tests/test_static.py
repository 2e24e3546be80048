"""Static folds: which neurons they keep, how they fit, and that they run, load and are refused as they should."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import Result
from folds import assert_resumes, folded_tiny, folds_at_random, logits, names_as_saved, text
from models import tiny_model
from synthetic import correlated, random_ffn
from torch import Tensor
from transformers import AutoModelForCausalLM

from tardis_llm import FoldConfig, fold, save_folded
from tardis_llm.calibration.tokens import Tokens
from tardis_llm.checkpoint.format import read_format
from tardis_llm.errors import CheckpointError, InfeasibleBudgetError, InvalidInputError
from tardis_llm.evaluation.fix_rate import count_fixes, measured
from tardis_llm.evaluation.plots import plot_fold
from tardis_llm.evaluation.shapes import RandomFold, random_folds
from tardis_llm.ffn.accounting import cost, most_kept
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights, Storage
from tardis_llm.folding.fold import FoldQuality, Inputs
from tardis_llm.folding.refit import fold_error, refit_layer
from tardis_llm.folding.static import error_of_lines, fold_static
from tardis_llm.folding.statistics import Statistics, outputs
from tardis_llm.runtime.decoding import prepare_decoding
from tardis_llm.runtime.kept import prepare
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import folded_ffns, install
from tardis_llm.runtime.prefill import set_prefill
from tardis_llm.runtime.reference import folded_ffn

D, H, GROUP = 32, 128, 16
CONFIG = FoldConfig(select="static", fold_bits=8, fallback_bits=8, group_size=GROUP)
SETTINGS = replace(CONFIG, reduction=0.5, sequence_length=32)
FP32 = torch.float32

both_kinds = pytest.mark.parametrize("k", [1, 2], ids=["plain", "gated"])
two_families = pytest.mark.parametrize("family", ["gpt2", "llama"])


@cache
def inputs(tokens: int = 3000) -> Inputs:
    x = correlated(tokens + 500, D)
    return Inputs(Tokens(x[:tokens]), Tokens(x[tokens:]))


@cache
def made(
    kept: int, k: int = 1, config: FoldConfig = CONFIG, dtype: torch.dtype = FP32
) -> tuple[FoldedWeights, FoldQuality]:
    """The fold of `random_ffn(D, H, k=k)`, which nobody may change."""
    return fold_static(random_ffn(D, H, k=k), inputs(), kept, config, dtype)


def error(weights: FoldedWeights, ffn: DenseFFN, x: Tensor) -> float:
    wanted = outputs(ffn, x)
    return float((folded_ffn(x, weights) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


@both_kinds
def test_the_more_neurons_are_kept_the_less_error_is_left(k: int) -> None:
    ffn, held = random_ffn(D, H, k=k), inputs().heldout.x
    found = [made(kept, k) for kept in (16, 48, 96, 128)]
    errors = [quality.error for _, quality in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]  # all are kept, in 8 bits
    assert errors[0] < found[0][1].linearity
    for weights, quality in found:
        assert quality.error == pytest.approx(error(weights, ffn, held), rel=0.02)
        assert quality.kept == weights.kept / H and quality.fix_rate == 0


def test_neurons_that_a_line_does_for_are_folded() -> None:
    ffn, straight = random_ffn(D, H), torch.arange(0, H, 4)
    w1, w2 = ffn.w1.clone(), ffn.w2.clone()
    w1[straight] *= 1e-3  # what the activation bends is next to nothing there
    w2[:, straight] *= 1e3
    left = error_of_lines(replace(ffn, w1=w1, w2=w2), inputs())
    others = torch.ones(H, dtype=torch.bool)
    others[straight] = False
    assert float(left[straight].max()) < float(left[others].min())


def test_kept_neurons_make_up_for_what_no_fold_does() -> None:
    ffn = random_ffn(D, H)
    weights, _ = made(64)
    neurons = error_of_lines(ffn, inputs()).topk(64).indices.sort().values
    assert float((weights.kept_ffn(FP32).w2 - ffn.w2[:, neurons]).norm() / ffn.w2[:, neurons].norm()) > 0.02
    assert float((weights.kept_ffn(FP32).w1 - ffn.w1[neurons]).norm() / ffn.w1[neurons].norm()) < 0.02


@both_kinds
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP32])
def test_kernels_compute_what_the_reference_does(isa: str, k: int, tokens: int, dtype: torch.dtype) -> None:
    weights, _ = made(64, k, replace(CONFIG, fallback_bits=4), dtype)
    x = correlated(tokens, D, seed=3).to(dtype)
    ffn = FoldedFFN(weights)
    ffn.lay_out(dtype)
    found, wanted = prepare(ffn.current, x)(x).float(), folded_ffn(x, weights).float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.02  # inputs in 8 bits, or sums in bf16
    assert ffn.state_dict().keys() == FoldedFFN(weights).state_dict().keys()


def test_statistics_refit_a_static_fold() -> None:
    ffn = random_ffn(D, H)
    weights, _ = made(64)
    other = correlated(2000, D, seed=9) + 0.5
    statistics = Statistics.zeros(D, H)
    statistics.add(other, ffn, weights)
    refitted = refit_layer(ffn, weights, statistics)
    assert fold_error(refitted, statistics) < 0.9 * fold_error(weights, statistics)
    assert fold_error(refitted, statistics) == pytest.approx(error(refitted, ffn, other), rel=0.02)
    module = FoldedFFN(weights)
    for before, after in ((module.swap(refitted), weights), (module.weights, refitted)):
        assert before.bias is not None and after.bias is not None
        assert torch.equal(before.bias, after.bias)
    with pytest.raises(InvalidInputError, match="another"):
        module.swap(made(48)[0])


@two_families
def test_a_model_reads_and_keeps_what_it_reports_and_loads_as_it_was_saved(family: str, tmp_path: Path) -> None:
    before = logits(tiny_model(family))
    model, report = folded_tiny(family, SETTINGS)
    after = logits(model)
    assert 0 < float((after - before).abs().max()) < float("inf")
    for layer in report.layers:
        ffn = folded_ffns(model)[layer.prefix]
        stored = sum(tensor.nbytes for tensor in ffn.state_dict().values())
        assert layer.touched == layer.resident == stored
        assert ffn.weights.kept % GROUP == 0 or layer.kept == 1
    assert report.touched <= 0.5 * report.dense
    names = names_as_saved(model, report, tmp_path)
    assert sum(name.endswith("kept_down.planes") for name in names) == len(report.layers)
    with count_fixes(model) as counts:
        logits(model)
    assert measured(report, model, counts.rates) == report
    plot_fold(model, report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_groups_longer_than_a_row_are_as_long_as_a_row(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_folded(model, fold(model, text(), replace(SETTINGS, group_size=256)), tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert {layer["group_size"] for layer in model.config.quantization_config.layers.values()} == {64}


def test_an_interrupted_fold_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    assert_resumes("llama", SETTINGS, tmp_path)


@two_families
def test_random_folds_keep_the_share_asked_for(family: str) -> None:
    model = tiny_model(family)
    for site, ffn in folds_at_random(model, 2, Storage(16, 4, 4), 0.0, "static"):
        install(model, site, ffn)
        assert ffn.weights.kept == pytest.approx(0.5 * site.intermediate_size, abs=8)
    prepare_decoding(model)
    assert bool(torch.isfinite(logits(model)).all())
    for site, ffn in random_folds(tiny_model(family), RandomFold(2, 4, 4, select="static", kept=1.0, group_size=48)):
        assert site.intermediate_size - 48 < ffn.weights.kept <= site.intermediate_size
    with pytest.raises(InvalidInputError, match="--fallback int4"):
        RandomFold(select="static")


def test_bytes_by_hand() -> None:
    ffn, storage = random_ffn(D, H, k=2), Storage(GROUP, 4, 4)
    form = storage.static_format(ffn, 48)
    there = FoldedWeights.empty(form, D, H, FP32, torch.device("meta"))
    fold_bytes = D * D // 2 + D * D // GROUP * 2 + 4 * D
    kept = 3 * 48 * D // 2 + 2 * 48 * D // GROUP * 2 + D * 48 // GROUP * 2 + (4 * 96 if ffn.b1 is not None else 0)
    assert cost(ffn, there).always == cost(ffn, there).resident == fold_bytes + kept
    assert cost(ffn, there).touched(0.3) == fold_bytes + kept
    share = (fold_bytes + kept) / ffn.nbytes
    assert most_kept(ffn, storage, 1 - share) == 48
    assert most_kept(ffn, storage, 1 - share + 1e-3) == 32
    assert most_kept(ffn, storage, 0.01) == H


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fallback_bits": None}, "fallback_bits is None"),
        ({"split": "loss"}, "split is 'loss'"),
        ({"refit": False}, "refit is False"),
        ({"predictor_bits": 2}, "predictor_bits is 2"),
        ({"remainder_bits": 2}, "remainder_bits is 2"),
        ({"select": "some"}, "one of dynamic, static"),
    ],
)
def test_settings_that_a_static_fold_lacks_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        replace(CONFIG, **settings)  # type: ignore[arg-type]


def test_a_budget_without_room_for_neurons_is_refused() -> None:
    with pytest.raises(InfeasibleBudgetError, match="no room for 16 kept neurons"):
        fold(tiny_model("llama"), text(), replace(SETTINGS, reduction=0.95))


def test_exact_prompts_are_refused() -> None:
    model = tiny_model("llama")
    fold(model, text(), SETTINGS)
    set_prefill(model, "auto")
    assert all(ffn.goes_dense is None for ffn in folded_ffns(model).values())  # so that steps of any batch run whole
    with pytest.raises(InvalidInputError, match="static"):
        set_prefill(model, "exact")


@pytest.mark.parametrize("fields", [{"kept": -1}, {"kept": "8"}, {"kept": 8, "bits": 2}, {"kept_bias": 1}])
def test_a_config_that_no_static_fold_has_is_refused(fields: dict[str, object]) -> None:
    sound = vars(Storage(GROUP, 4, 4).static_format(random_ffn(D, H), 48))
    assert read_format("mlp", sound).kept == 48
    with pytest.raises(CheckpointError, match="of mlp is"):
        read_format("mlp", {**sound, **fields})


def test_the_command_line_folds_statically(
    tardis: Callable[..., Result], tiny_dir: Path, tiny_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = ("--select", "static", "--fold-dtype", "int4", "--fallback", "int4", "--group-size", 16)
    quick = ("--tokens", 4096, "--sequence-length", 32, "--reduction", 0.5)
    made = tardis("fold", tiny_dir, "-o", out, "--text", tiny_text, *settings, *quick, "--json")
    assert made.code == 0, made.err
    report = json.loads(made.out)["report"]
    assert report["config"]["select"] == "static"
    evaluated = json.loads(tardis("eval", out, "--text", tiny_text, "--json").out)
    assert evaluated["ffn"]["touched"] == report["totals"]["touched"] == report["totals"]["resident"]
    assert "kept" in tardis("inspect", out).out
    assert tardis("generate", out, "A", "--max-new-tokens", 3).code == 0
