"""Folding stacked with quantisation: what is stored in few bits, and that fixing and refitting see it as stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Result, assert_refused
from folds import SETTINGS, assert_resumes, folded_tiny, logits
from marks import long, mostly_long
from models import tiny_model
from safetensors.torch import load_file
from synthetic import correlated, fallback, fitted, forward, normal, random_ffn, stored_fold
from torch import Tensor
from transformers import AutoModelForCausalLM

from tardis_llm import FoldConfig
from tardis_llm.calibration.tokens import Tokens
from tardis_llm.checkpoint.folded import save_folded
from tardis_llm.errors import InvalidInputError
from tardis_llm.evaluation.fix_rate import count_fixes, measured
from tardis_llm.ffn.neuron import Neurons
from tardis_llm.ffn.packed import PackedMatrix
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights, Storage
from tardis_llm.folding.fold import Inputs
from tardis_llm.folding.rounding import quantise
from tardis_llm.folding.stack import match_sizes, quantise_fallback, store_fold
from tardis_llm.runtime.placing import folded_ffns
from tardis_llm.runtime.reference import folded_ffn

D, H = 24, 96
STACKED = replace(SETTINGS, fold_bits=8, fallback_bits=4)


def inputs() -> Inputs:
    return Inputs(Tokens(correlated(3000, D, 1)), Tokens(correlated(1000, D, 2)))


def relative(error: Tensor, reference: Tensor) -> float:
    """Squared error over the squared reference."""
    return float(error.square().sum() / reference.square().sum())


def runtime_error(folded: FoldedWeights, ffn: DenseFFN, x: Tensor) -> float:
    """As the runtime computes it, over the output's variance."""
    y = forward(ffn, x)
    error = (folded_ffn(x, folded.beside(fallback(ffn))) - y).square().sum(1).mean()
    return float(error / y.var(0, correction=0).sum())


def test_the_remainder_holds_what_the_predictor_leaves() -> None:
    w1, w2 = normal(H, D), normal(D, H, seed=3)
    predictor = quantise(w1, 2, 16)
    remainder, down = quantise_fallback(w1, w2, predictor, Storage(16, None, 8), None)
    assert remainder is not None and down is not None
    assert (remainder.bits, down.bits) == (6, 8)
    assert down.planes.shape[::2] == (H, D // 8)
    up, columns = fallback_of(predictor, remainder, down)
    torch.testing.assert_close(up, predictor.dequantise() + remainder.dequantise())
    assert relative(up - w1, w1) < 1e-3
    assert relative(columns - w2, w2) < 1e-3


def fallback_of(
    predictor: PackedMatrix, remainder: PackedMatrix | None, down: PackedMatrix | None
) -> tuple[Tensor, Tensor]:
    """W1 and W2 as fixing reads them."""
    neurons = Neurons("gelu", *torch.zeros(4, H))
    return FoldedWeights(None, None, predictor, neurons, down, remainder).fallback(torch.float32)


@pytest.mark.parametrize("k", [1, 2])
def test_rows_of_w2_make_up_for_what_rounding_w1_did_to_the_size_of_a_neuron(k: int) -> None:
    ffn = random_ffn(D, H, "silu" if k == 2 else "gelu", k=k)
    folded, _ = stored_fold(D, H, Storage(D, 8, 4, 1), torch.float32, ffn.activation, "all", k)
    huge = torch.zeros(100, D)
    huge[:, 3] = 100.0
    tokens = Tokens(torch.cat([correlated(3000, D, 1), huge]), None, torch.cat([torch.ones(3000), torch.ones(100) / 2]))
    scale = down_scale(match_sizes(ffn, folded, tokens)) / down_scale(folded)
    exact = folded.neurons.residual(F.linear(tokens.x, ffn.w1, ffn.b1))
    rounded = folded.neurons.residual(F.linear(tokens.x, folded.fallback(torch.float32)[0], ffn.b1))
    before, after = ((exact - rounded * some).square().T @ tokens.weight for some in (1.0, scale.float().T))
    assert bool((after <= 1.001 * before).all())
    assert float(after.sum()) < 0.6 * float(before.sum())
    worst = (exact - rounded)[-1].abs().argmax()
    assert float(after[worst]) < 0.2 * float(before[worst])


def test_a_row_of_w2_whose_neuron_is_never_fixed_stays_as_it_is() -> None:
    ffn = random_ffn(D, H)
    folded, _ = stored_fold(D, H, Storage(D, 8, 4), torch.float32, ranges="none")
    assert torch.equal(down_scale(match_sizes(ffn, folded, inputs().fit)), down_scale(folded))


def down_scale(folded: FoldedWeights) -> Tensor:
    """[h, groups], of W2 in few bits."""
    assert isinstance(folded.down, PackedMatrix)
    return folded.down.scale


def test_a_predictor_with_all_the_bits_leaves_no_remainder() -> None:
    w1 = normal(H, D)
    predictor = quantise(w1, 4, 16)
    remainder, down = quantise_fallback(w1, normal(D, H), predictor, Storage(16, None, 4), None)
    assert remainder is None
    assert torch.equal(fallback_of(predictor, remainder, down)[0], predictor.dequantise())


def test_dense_storage_keeps_the_dense_weights() -> None:
    weight = normal(D, D)
    predictor = quantise(normal(H, D), 2, 16)
    assert quantise_fallback(normal(H, D), normal(D, H), predictor, Storage(), None) == (None, None)
    assert torch.equal(store_fold(weight, Storage(), torch.bfloat16, None), weight.bfloat16())


@pytest.mark.parametrize(("bits", "most"), [(4, 0.02), (8, 1e-4)])
def test_a_low_bit_fold_is_near_the_fold(bits: int, most: float) -> None:
    weight = normal(D, D)
    stored = store_fold(weight, Storage(16, bits), torch.float32, None)
    assert isinstance(stored, PackedMatrix)
    assert stored.bits == bits
    assert relative(stored.dequantise() - weight, weight) < most


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(("fold_bits", "fallback_bits"), [(None, 4), (4, None), (8, 8), (4, 4)])
def test_quality_is_that_of_the_runtime(fold_bits: int | None, fallback_bits: int | None, refit: bool) -> None:
    ffn, data = random_ffn(D, H), inputs()
    folded, quality = fitted(ffn, data, 0.2, fold_bits=fold_bits, fallback_bits=fallback_bits, refit=refit)
    assert isinstance(folded.fold, PackedMatrix) == (fold_bits is not None)
    assert folded.stacked == (fallback_bits is not None)
    assert quality.error == pytest.approx(runtime_error(folded, ffn, data.heldout.x), rel=1e-2)


def test_the_refit_takes_up_what_rounding_leaves() -> None:
    ffn, data = random_ffn(D, H), inputs()
    settings = {"fold_bits": 8, "fallback_bits": 4}
    stacked, refitted = fitted(ffn, data, 0.4, **settings)
    _, plain = fitted(ffn, data, 0.4, **settings, refit=False)
    _, dense = fitted(ffn, data, 0.4)
    assert dense.error < refitted.error < plain.error
    # a fold solved for dense fallback weights does worse with these
    exact, _ = fitted(ffn, data, 0.4)
    mixed = replace(exact, up=stacked.up, down=stacked.down)
    assert runtime_error(stacked, ffn, data.heldout.x) < runtime_error(mixed, ffn, data.heldout.x)


def test_more_bits_leave_less_error() -> None:
    ffn, data = random_ffn(D, H), inputs()
    errors = [fitted(ffn, data, 0.4, fold_bits=bits, fallback_bits=bits)[1].error for bits in (4, 8, None)]
    assert sorted(errors, reverse=True) == errors


@pytest.mark.parametrize("name", mostly_long(["gpt2", "opt", "falcon"], ["opt"]))
def test_a_stacked_model_reads_and_keeps_what_it_reports(name: str) -> None:
    model = tiny_model(name)
    dense = sum(tensor.nbytes for key, tensor in model.state_dict().items() if "fc" in key or "mlp" in key)
    before = logits(model)
    model, report = folded_tiny(name, STACKED)
    assert (logits(model) - before).abs().max() > 0
    assert bool(torch.isfinite(logits(model)).all())
    ffns = folded_ffns(model)
    for layer in report.layers:
        ffn = ffns[layer.prefix]
        stored = sum(tensor.nbytes for tensor in ffn.state_dict().values())
        assert 0 <= layer.resident - stored <= 4 * len(ffn.low)  # the up bias
        fixing = ffn.weights.fixing
        assert fixing > 0
        always = layer.resident - fixing
        assert layer.touched == pytest.approx(always + layer.fix_rate * fixing)
    assert report.dense == dense
    assert report.resident < 0.5 * report.dense
    with count_fixes(model) as counts:
        logits(model)
    there = measured(report, model, counts.rates)
    for layer, found in zip(report.layers, there.layers, strict=True):
        assert found.touched == pytest.approx(
            layer.touched + (found.fix_rate - layer.fix_rate) * _all(ffns, layer.prefix)
        )


def _all(ffns: dict, prefix: str) -> int:  # type: ignore[type-arg]
    return ffns[prefix].weights.fixing


def test_an_interrupted_stacked_fold_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    assert_resumes("gpt2", STACKED, tmp_path)


@pytest.mark.parametrize(
    ("name", "settings"),
    mostly_long(
        [
            *(("gpt2", STACKED), ("opt", STACKED)),
            *(("gpt2", replace(SETTINGS, fold_bits=4)), ("opt", replace(SETTINGS, fallback_bits=8))),
        ],
        [("opt", STACKED), ("gpt2", replace(SETTINGS, fold_bits=4))],
    ),
)
def test_stacked_folds_load_as_they_were_saved(name: str, settings: FoldConfig, tmp_path: Path) -> None:
    model, report = folded_tiny(name, settings)
    save_folded(model, report, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    stored = {key: tensor for file in tmp_path.glob("*.safetensors") for key, tensor in load_file(file).items()}
    ffn = sum(tensor.nbytes for key, tensor in stored.items() if ".tardis." in key or ".mlp." in key or ".fc" in key)
    down_biases = sum(tensor.nbytes for key, tensor in stored.items() if "fc2.bias" in key or "proj.bias" in key)
    assert settings.fallback_bits is None or 0 <= ffn - report.resident <= max(down_biases, 3 * 64 * 4)


@long
def test_the_command_line_makes_stacked_checkpoints(
    tardis: Callable[..., Result], fold: Callable[..., Result], tiny_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = fold("--fold-dtype", "int8", "--fallback", "int4", "--dtype", "bfloat16", "--json", out=out)
    assert result.code == 0
    report = json.loads(result.out)["report"]
    assert (report["config"]["fold_bits"], report["config"]["fallback_bits"]) == (8, 4)
    assert report["totals"]["resident"] < 0.6 * report["totals"]["dense"]
    evaluated = json.loads(tardis("eval", out, "--text", tiny_text, "--json").out)
    assert evaluated["ffn"]["resident"] == report["totals"]["resident"]
    assert tardis("inspect", out, "--plot", tmp_path / "plot.png").code == 0
    assert tardis("generate", out, "abc", "--max-new-tokens", 4).code == 0


def test_parts_in_bf16_of_a_model_in_another_dtype_are_refused(fold: Callable[..., Result]) -> None:
    assert_refused(fold("--fold-dtype", "bf16"), "the model is in float32; add --dtype bfloat16")


@pytest.mark.parametrize(
    "settings", [{"fold_bits": 3}, {"fallback_bits": 16}, {"predictor_bits": 8, "fallback_bits": 4}]
)
def test_storage_that_does_not_exist_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(settings))):
        FoldConfig(**settings)  # type: ignore[arg-type]
