"""Linear layers in few bits: their kernels against what the format says, whole models, and files."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import Result, assert_refused
from folds import SETTINGS, logits, text
from models import ENCODER_NAMES, FAMILY_NAMES, LAYOUTS, VOCAB, tiny_model, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from tardis_llm import FoldConfig, FoldReport, fold, save_folded
from tardis_llm.checkpoint.manifest import MANIFEST, read_report
from tardis_llm.errors import CheckpointError, InvalidInputError
from tardis_llm.families.sites import find_ffns
from tardis_llm.runtime.linears import LOW_BIT_LAYERS, int8, nf4
from tardis_llm.runtime.linears.int8 import Int8Linear
from tardis_llm.runtime.linears.lowbit import LowBitLinear
from tardis_llm.runtime.linears.nf4 import NF4, Nf4Linear
from tardis_llm.runtime.linears.placing import (
    linear_layers,
    low_bit_copies,
    low_bit_linears,
    put_linears,
    quantise_linears,
)

BITS = sorted(LOW_BIT_LAYERS)
#: [out, in]: odd ones, one number, several blocks of every kernel
SHAPES = [(70, 200), (257, 33), (1, 1), (64, 128)]


def random_layer(bits: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> LowBitLinear:
    """A layer of random weights and biases, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    return LOW_BIT_LAYERS[bits].of(weight.to(dtype), bias.to(dtype))


def random_inputs(count: int, columns: int) -> Tensor:
    """[count, columns] with an outlier, and a token of zeros where there are three."""
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(1))
    x[:, 0] *= 100
    x[2:3] = 0
    return x


def deviation(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


@cache
def quantised(name: str, bits: int) -> tuple[PreTrainedModel, FoldReport]:
    """A tiny model, folded, its other linear layers in few bits."""
    model = tiny_model(name)
    return model, fold(model, text(), dataclasses.replace(SETTINGS, linear_bits=bits))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folded GPT-2 whose other linear layers are in int8."""
    save_folded(*quantised("gpt2", 8), tmp_path)
    return tmp_path


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_the_product_is_that_of_the_stored_weight(bits: int, dtype: torch.dtype, count: int, shape: tuple[int, int]):
    layer, x = random_layer(bits, shape, dtype), random_inputs(count, shape[1]).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = 1e-3 if bits == 8 and dtype == torch.float32 else 1e-2  # NF4 is multiplied by inputs in bf16
    assert deviation(y, F.linear(x.float(), layer.dequantise(), layer.bias.float())) < tolerance


@pytest.mark.parametrize(("bits", "kernel"), [(8, (int8, "exact_in_int8")), (4, (nf4, "multiplies_nf4"))])
@pytest.mark.parametrize("shape", SHAPES)
def test_processors_without_the_instructions_get_the_same(
    monkeypatch: pytest.MonkeyPatch, bits: int, kernel: tuple[ModuleType, str], shape: tuple[int, int]
):
    layer, x = random_layer(bits, shape), random_inputs(3, shape[1])
    expected, codes = layer(x), layer.state_dict()["codes"].clone()
    monkeypatch.setattr(*kernel, lambda: False)
    assert deviation(layer(x), expected) < 1e-2
    assert torch.equal(layer.state_dict()["codes"], codes)


def test_a_processor_without_the_nf4_product_is_told_about_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
):
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: False)
    nf4.multiplies_nf4.cache_clear()
    layer, x = random_layer(4, (64, 64)), random_inputs(3, 64)
    assert deviation(layer(x), layer(x)) == 0
    nf4.multiplies_nf4.cache_clear()
    assert [str(each.message) for each in recwarn if "Store the linear layers in int8" in str(each.message)]


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.01), (4, 0.12)])
def test_rounding_loses_what_its_bits_lose(bits: int, worst: float):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(2))
    assert 0 < deviation(LOW_BIT_LAYERS[bits].of(weight, None).dequantise(), weight) < worst


def test_an_outlier_costs_the_other_inputs_nothing_in_int8():
    layer, x = random_layer(8, (64, 256)), random_inputs(1, 256)
    rest = x.clone()
    rest[:, 0] = 0
    assert deviation(layer(x) - layer(x - rest), layer(rest) - layer.bias) < 0.01


def test_the_codes_of_nf4_are_those_of_bitsandbytes():
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    scale = weight.unflatten(1, (-1, 64)).abs().amax(2)
    weight = (weight.unflatten(1, (-1, 64)) * (scale.bfloat16().float() / scale)[..., None]).flatten(1)  # as stored
    theirs, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    layer = Nf4Linear.of(weight, None)
    assert torch.equal(torch.tensor(NF4), state.code.cpu())
    assert (theirs.view_as(layer.codes) == layer.codes).float().mean() > 0.999  # ties may fall either way


@pytest.mark.parametrize("bits", BITS)
def test_a_layer_that_has_run_is_saved_copied_and_pickled_as_it_was_made(bits: int):
    layer, x = random_layer(bits, (70, 200)), random_inputs(2, 200)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    size, expected = layer.nbytes, layer(x)
    assert layer.codes.numel() == 0  # the kernel has the only copy
    assert abs(layer.nbytes - size) < 0.5 * size
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to(torch.float32)):
        state = same.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
        assert torch.equal(same(x), expected)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_pass_through_a_layer(bits: int):
    layer, x = random_layer(bits, (70, 200)), random_inputs(2, 200).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantise().sum(0).expand(2, -1))


@pytest.mark.parametrize("bits", BITS)
def test_nothing_in_and_every_shape_in_front(bits: int):
    layer = random_layer(bits, (70, 200))
    assert layer(torch.zeros(0, 200)).shape == (0, 70)
    assert layer(torch.zeros(2, 3, 200)).shape == (2, 3, 70)


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(InvalidInputError, match="NaN or infinite"):
        Int8Linear.of(torch.full((2, 2), torch.nan), None)


def test_other_bits_are_refused():
    with pytest.raises(InvalidInputError, match=r"in 3 bits.*give one of \[4, 8\]"):
        quantise_linears(tiny_model("gpt2"), 3)
    with pytest.raises(InvalidInputError, match="linear_bits is 3; give 4, 8 or None"):
        FoldConfig(linear_bits=3)


def test_without_bitsandbytes_int4_names_the_extra_before_any_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match=r"pip install 'tardis-llm\[quant\]'.*int8"):
        fold(tiny_model("gpt2"), text(), dataclasses.replace(SETTINGS, linear_bits=4))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_all_linear_layers_but_those_of_the_ffns_are_stored_so(name: str):
    model = tiny_model(name)
    dense, exact, embedding = linear_layers(model, ffn=True), logits(model), model.get_input_embeddings().weight.clone()
    report = quantise_linears(model, 8)
    stored = low_bit_linears(model)
    ffns = {part for site in find_ffns(model) for part in site.linears}
    assert stored.keys() == dense.keys() - ffns
    assert report.layers == len(stored)
    assert report.stored == sum(layer.nbytes for layer in stored.values()) < 0.5 * report.dense
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert deviation(logits(model), exact) < 0.1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ENCODER_NAMES])
def test_dense_ffns_too_and_all_of_it_back(name: str, bits: int):
    model = tiny_model(name)
    exact, dense = logits(model), linear_layers(model, ffn=True)
    before = put_linears(model, low_bit_copies(model, bits, ffn=True))
    assert not linear_layers(model, ffn=True)
    assert before == dense
    assert deviation(logits(model), exact) < (0.1 if bits == 8 else 0.6)
    put_linears(model, before)
    assert torch.equal(logits(model), exact)


def test_a_head_that_shared_the_embedding_no_longer_does():
    model = tiny_model("gpt2")
    assert model.config.tie_word_embeddings
    report = quantise_linears(model, 8)
    model.tie_weights()
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.shape == (0,)
    attention = 3 * 4 * (64 * (3 * 64 + 64) + 3 * 64 + 64)
    assert report.shared == 4 * VOCAB * 64
    assert report.dense == attention + report.shared


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["gpt_neox", "bert"])
def test_saving_and_loading_and_saving_again_give_the_same_logits(name: str, bits: int, tmp_path: Path):
    model, report = quantised(name, bits)
    loader = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    save_folded(model, report, tmp_path / "first")
    loader.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "again")
    for directory in (tmp_path / "first", tmp_path / "again"):
        loaded = loader.from_pretrained(directory)
        assert torch.equal(logits(loaded), logits(model))
        assert low_bit_linears(loaded).keys() == low_bit_linears(model).keys()
    assert read_report(tmp_path / "first").linears == report.linears


def test_bf16_loads_with_the_same_codes_and_scales(saved: Path):
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    for name, layer in low_bit_linears(quantised("gpt2", 8)[0]).items():
        state, expected = loaded.get_submodule(name).state_dict(), layer.state_dict()
        assert all(torch.equal(state[part], expected[part]) for part in ("codes", "scale"))


def test_files_hold_codes_and_an_empty_weight(saved: Path):
    stored = load_file(saved / "model.safetensors")
    name = "transformer.h.0.attn.c_attn"
    assert stored[f"{name}.codes"].shape == (192, 64)
    assert stored[f"{name}.codes"].dtype == torch.int8
    assert stored[f"{name}.weight"].shape == stored["lm_head.weight"].shape == (0,)
    assert stored["transformer.wte.weight"].shape == (VOCAB, 64)


def test_a_model_without_its_head_loads(saved: Path):
    base, model = AutoModel.from_pretrained(saved), quantised("gpt2", 8)[0]
    with torch.no_grad():
        expected = model.transformer(tokens()).last_hidden_state
        assert torch.equal(base(tokens()).last_hidden_state, expected)


def test_without_tardis_loading_fails(saved: Path):
    code = (
        "import sys; sys.modules['tardis_llm'] = None\n"
        "from transformers import AutoModelForCausalLM as loader\n"
        f"loader.from_pretrained({str(saved)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "mismatch" in done.stderr


@pytest.mark.parametrize("lost", ["transformer.h.1.attn.c_attn.codes", "lm_head.scale"])
def test_a_missing_tensor_is_an_error_and_never_random(saved: Path, lost: str):
    stored = load_file(saved / "model.safetensors")
    save_file({n: t for n, t in stored.items() if n != lost}, saved / "model.safetensors", {"format": "pt"})
    (saved / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=lost):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("entry", [{"transformer.h.7.attn.c_attn": 8}, {"lm_head": 3}, {"transformer.wte": 8}])
def test_a_config_for_other_layers_is_refused(saved: Path, entry: dict[str, int]):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["linears"] |= entry
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{next(iter(entry))} in {next(iter(entry.values()))} bits"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_the_command_line_folds_inspects_evaluates_and_generates(
    fold: Callable[..., Result], tardis: Callable[..., Result], tiny_text: Path, tmp_path: Path
):
    sentence = "7 linear layers outside the FFNs in int8"
    made = fold("--linears", "int8", "--fold-dtype", "int4", "--fallback", "int4")
    assert made.code == 0
    assert sentence in made.out
    directory = tmp_path / "out"
    assert sentence in tardis("inspect", directory).out
    assert json.loads(tardis("inspect", directory, "--json").out)["linears"]["bits"] == 8
    assert "perplexity" in tardis("eval", directory, "--text", tiny_text).out
    assert tardis("generate", directory, "a text").code == 0
    assert len(low_bit_linears(AutoModelForCausalLM.from_pretrained(directory))) == 7


def test_linears_in_bf16_are_refused_for_another_dtype(fold: Callable[..., Result]):
    assert_refused(fold("--linears", "bf16"), "add --dtype bfloat16")


def test_layers_that_share_a_name_with_nothing_are_an_error():
    with pytest.raises(AttributeError):
        put_linears(tiny_model("gpt2"), {"transformer.h.9.attn.c_attn": nn.Identity()})
