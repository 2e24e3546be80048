"""Mixed folds: which neurons they keep, that they read what they may, that they run and load, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from folds import assert_resumes, folded_tiny, logits, names_as_saved, text
from marks import mostly_long
from models import tiny_model
from synthetic import correlated, random_ffn
from torch import Tensor

from tardis_llm import FoldConfig, fold
from tardis_llm.calibration.tokens import Tokens, product
from tardis_llm.checkpoint.format import read_format
from tardis_llm.errors import CheckpointError, InvalidInputError
from tardis_llm.evaluation.fix_rate import count_fixes, measured
from tardis_llm.evaluation.plots import plot_fold
from tardis_llm.families.sites import find_ffns
from tardis_llm.ffn.accounting import planned
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights
from tardis_llm.folding.fold import FoldQuality, Inputs, choose_ranges, predict
from tardis_llm.folding.mixed import choose, fold_mixed
from tardis_llm.folding.refit import fold_error, refit_layer
from tardis_llm.folding.statistics import Statistics, outputs
from tardis_llm.pipeline.session import selected
from tardis_llm.runtime.decoding import prepare_decoding
from tardis_llm.runtime.kept import KeptFFN, prepare
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import folded_ffns
from tardis_llm.runtime.prefill import set_prefill
from tardis_llm.runtime.reference import fixed_neurons, folded_ffn

D, H, GROUP = 32, 256, 16
CONFIG = FoldConfig(select="mixed", fold_bits=8, fallback_bits=8, group_size=GROUP, predictor_bits=2)
SETTINGS = replace(CONFIG, reduction=0.5, sequence_length=32, split="uniform", keep_above=0.1)
FP32 = torch.float32

both_kinds = pytest.mark.parametrize("k", [1, 2], ids=["plain", "gated"])
two_families = pytest.mark.parametrize("family", ["gpt2", "llama"])


@cache
def inputs(tokens: int = 2500) -> Inputs:
    x = correlated(tokens + 500, D)
    return Inputs(Tokens(x[:tokens]), Tokens(x[tokens:]))


@cache
def made(
    k: int = 1, rate: float = 0.5, config: FoldConfig = CONFIG, dtype: torch.dtype = FP32
) -> tuple[FoldedWeights, FoldQuality]:
    """The fold of `random_ffn(D, H, k=k)`, which nobody may change."""
    ffn, given = random_ffn(D, H, k=k), inputs()
    return fold_mixed(ffn, given, predict(ffn, given, 2, config), rate, config, dtype)


def error(weights: FoldedWeights, ffn: DenseFFN, x: Tensor) -> float:
    wanted = outputs(ffn, x)
    return float((folded_ffn(x, weights) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


@pytest.mark.parametrize(
    ("family", "changed", "mixed"),
    [
        ("llama", {}, True),
        ("gpt2", {}, False),
        ("llama", {"fold_bits": None, "fallback_bits": None}, False),
        ("llama", {"refit": False}, False),
        ("llama", {"policy": "coverage"}, False),
        ("llama", {"select": "dynamic"}, False),
    ],
    ids=str,
)
def test_folds_with_a_gate_and_few_bits_are_mixed_if_nothing_is_asked_for(
    family: str, changed: dict[str, Any], mixed: bool
) -> None:
    config = replace(CONFIG, **{"select": None, **changed})
    assert selected(config, find_ffns(tiny_model(family))) == ("mixed" if mixed else "dynamic")


def test_a_default_fold_is_the_one_that_it_stands_for() -> None:
    found, asked = (folded_tiny("llama", replace(SETTINGS, select=select))[0] for select in (None, "mixed"))
    assert torch.equal(logits(found), logits(asked))


@both_kinds
def test_what_is_fixed_most_is_kept_and_bytes_are_those_of_a_dynamic_fold(k: int) -> None:
    ffn, given = random_ffn(D, H, k=k), inputs()
    predicted = predict(ffn, given, 2, CONFIG)
    choice = choose(ffn, given, predicted, 0.5, CONFIG)
    v = product(given.heldout.x, predicted.predictor.dequantise(), ffn.b1)
    often = choice.neurons.outside(v).float().mean(0)
    assert float(often[choice.kept].min()) >= float(often[choice.others].max())
    wanted = int((often > CONFIG.keep_above).sum())
    assert abs(len(choice.kept) - wanted) <= GROUP / 2
    assert torch.equal(torch.cat([choice.kept, choice.others]).sort().values, torch.arange(H))
    weights, quality = made(k)
    assert weights.kept == len(choice.kept) and quality.kept == weights.kept / H
    assert quality.fix_rate == pytest.approx(float(often[choice.others].mean()), rel=0.01)
    budget = planned(ffn, CONFIG.storage, 2).touched(0.5)
    assert 0.9 * budget < weights.touched(quality.fix_rate) <= 1.001 * budget
    assert quality.error == pytest.approx(error(weights, ffn, given.heldout.x), rel=0.02)


@both_kinds
def test_the_more_bytes_the_less_error_and_the_more_neurons(k: int) -> None:
    found = [made(k, rate) for rate in (0.1, 0.5, 0.9)]
    assert [weights.kept for weights, _ in found] == sorted(weights.kept for weights, _ in found)
    errors = [quality.error for _, quality in found]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 < errors[0]


def test_without_a_neuron_to_keep_the_fold_is_dynamic() -> None:
    weights, quality = made(config=replace(CONFIG, keep_above=1.0))
    assert weights.kept == 0 and not weights.mixed and weights.b1 is None
    assert quality.kept == 0 and 0.45 < quality.fix_rate <= 0.5
    assert weights.format == replace(made()[0].format, kept=0, kept_bias=False, mixed=False)


@both_kinds
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP32])
def test_kernels_compute_what_the_reference_does(isa: str, k: int, tokens: int, dtype: torch.dtype) -> None:
    weights, _ = made(k, config=replace(CONFIG, fallback_bits=4), dtype=dtype)
    x = correlated(tokens, D, seed=3).to(dtype)
    ffn = FoldedFFN(weights)
    ffn.lay_out(dtype)
    prepared = prepare(ffn.current, x)
    assert isinstance(prepared, KeptFFN) and prepared.predicted is not None
    found, wanted = prepared(x).float(), folded_ffn(x, weights).float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.04  # inputs in 8 bits, and neurons next to a bound
    fixed = prepared.fixed(x)
    assert fixed.shape == (tokens, H - weights.kept)
    assert float((fixed != fixed_neurons(x, weights)).float().mean()) < 0.05
    exact = prepared.exact(x, None).float()
    whole = outputs(replace(random_ffn(D, H, k=k), b2=None), x.float())
    assert float((exact - whole).norm() / whole.norm()) < 0.2 < float(whole.norm())


def test_statistics_refit_a_mixed_fold() -> None:
    ffn = random_ffn(D, H)
    weights, _ = made()
    other = correlated(2000, D, seed=9) + 0.5
    statistics = Statistics.zeros(D, H)
    statistics.add(other, ffn, weights)
    assert statistics.fix_rate == pytest.approx(float(fixed_neurons(other, weights).float().mean()), abs=1e-6)
    refitted = refit_layer(ffn, weights, statistics)
    assert fold_error(refitted, statistics) < 0.9 * fold_error(weights, statistics)
    assert fold_error(refitted, statistics) == pytest.approx(error(refitted, ffn, other), rel=0.02)
    module = FoldedFFN(weights)
    module.swap(refitted)
    assert torch.equal(module.weights.bias, refitted.bias)  # type: ignore[arg-type]
    assert torch.equal(module.weights.b1, weights.b1)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="another"):
        module.swap(made(rate=0.1)[0])


@two_families
def test_a_model_reads_what_it_reports_and_loads_as_it_was_saved(family: str, tmp_path: Path) -> None:
    before = logits(tiny_model(family))
    model, report = folded_tiny(family, SETTINGS)
    after = logits(model)
    assert 0 < float((after - before).abs().max()) < float("inf")
    assert 0 < report.kept < 1 and 0 < report.fix_rate < 1
    assert f"kept {report.kept:.2%}" in report.exact
    for layer in report.layers:
        ffn = folded_ffns(model)[layer.prefix]
        assert layer.resident == sum(tensor.nbytes for tensor in ffn.state_dict().values())
        assert layer.touched == ffn.weights.touched(layer.fix_rate) < layer.resident
        assert (ffn.weights.b1 is None) == (family == "llama")
    assert report.touched <= 0.5 * report.dense
    names = names_as_saved(model, report, tmp_path)
    assert sum(name.endswith("kept_down.planes") for name in names) == len(report.layers)
    assert sum(name.endswith("predicted_bias") for name in names) == (family == "gpt2") * len(report.layers)
    with count_fixes(model) as counts:
        logits(model)
    assert set(measured(report, model, counts.rates).as_dict()) == set(report.as_dict())
    plot_fold(model, report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("family", mostly_long(["gpt2", "llama"], ["llama"]))
def test_an_interrupted_fold_resumes_to_the_same_bytes(family: str, tmp_path: Path) -> None:
    assert_resumes(family, SETTINGS, tmp_path)


@pytest.mark.parametrize("family", mostly_long(["gpt2", "llama"], ["llama"]))
def test_exact_prompts_compute_every_neuron(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    before = logits(model)
    fold(model, text(), SETTINGS)
    prepare_decoding(model)
    folded = logits(model)
    set_prefill(model, "exact")
    exact = logits(model)
    assert float((exact - before).norm()) < float((folded - before).norm())


@pytest.mark.parametrize("fields", [{"kept": 0}, {"fallback_bits": None, "down_zero": False}, {"mixed": 1}])
def test_formats_that_no_mixed_fold_has_are_refused(fields: dict[str, object]) -> None:
    form = {**vars(made()[0].format), **fields}
    with pytest.raises(CheckpointError):
        read_format("ffn", form)


@pytest.mark.parametrize("fields", [{"fallback_bits": None}, {"refit": False}, {"keep_above": 1.5}])
def test_settings_that_no_mixed_fold_has_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        replace(CONFIG, **fields)


def test_all_ranges_stay_those_of_the_dynamic_choice() -> None:
    ffn, given = random_ffn(D, H, k=2), inputs()
    predicted = predict(ffn, given, 2, CONFIG)
    choice = choose(ffn, given, predicted, 0.5, CONFIG)
    rates = [choose_ranges(ffn, predicted, rate / 256, CONFIG).neurons.high for rate in range(1, 256)]
    assert any(torch.equal(choice.neurons.high, high) for high in rates)
