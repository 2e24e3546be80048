"""Linear layers in few bits: their kernels against what the format says, whole models, and files."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Result, assert_refused
from folds import SETTINGS, logits, text
from models import ENCODER_NAMES, FAMILY_NAMES, LAYERS, LAYOUTS, VOCAB, tiny_model, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from tardis_llm import FoldConfig, FoldReport, fold, save_folded
from tardis_llm.checkpoint.manifest import MANIFEST, read_report
from tardis_llm.checkpoint.old_linears import _NF4
from tardis_llm.config import FORMAT_VERSION
from tardis_llm.errors import CheckpointError, InvalidInputError
from tardis_llm.families.sites import find_ffns
from tardis_llm.pipeline.linears import Covariances, low_bit_copies, low_bit_copy, quantise_linears
from tardis_llm.runtime.cpu.library import open_library
from tardis_llm.runtime.linears.lowbit import BITS, LowBitLinear
from tardis_llm.runtime.linears.placing import linear_layers, low_bit_linears, predicted_heads, put_linears

#: [out, in]: odd ones, one number, several blocks of every kernel
SHAPES = [(70, 200), (257, 33), (1, 1), (64, 128), (40, 1100)]


def layer_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A dense layer with this weight [out, in]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


def random_layer(
    bits: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32, group_size: int = 64
) -> LowBitLinear:
    """A layer of random weights and biases, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    return low_bit_copy(layer_of(weight.to(dtype), bias.to(dtype)), bits, group_size)


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
    return model, fold(model, text(), dataclasses.replace(SETTINGS, linear_bits=bits, head="whole"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folded GPT-2 whose other linear layers are in int8."""
    save_folded(*quantised("gpt2", 8), tmp_path)
    return tmp_path


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (4, 10_000), (8, 64), (8, 128)])
def test_the_product_is_that_of_the_stored_weight(
    bits: int, group_size: int, dtype: torch.dtype, count: int, shape: tuple[int, int]
):
    layer, x = random_layer(bits, shape, dtype, group_size), random_inputs(count, shape[1]).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    if open_library() is not None:  # kernels round inputs to 8 bits, by the largest of a group: here an outlier
        tolerance = 6e-2
    assert deviation(y, F.linear(x.float(), layer.dequantise(), layer.bias.float())) < tolerance


@pytest.mark.parametrize("bits", BITS)
def test_without_kernels_and_where_gradients_flow_it_is_the_reference(bits: int, monkeypatch: pytest.MonkeyPatch):
    layer, x = random_layer(bits, (70, 200)), random_inputs(3, 200)
    expected = F.linear(x, layer.dequantise(), layer.bias)
    torch.testing.assert_close(layer(x.requires_grad_()), expected)
    monkeypatch.setattr("tardis_llm.runtime.backend._kernels_wanted", lambda: False)
    assert torch.equal(layer(x.detach()), expected)


def test_gptq_spreads_errors_by_what_the_layers_of_a_model_get():
    from synthetic import correlated

    x = correlated(600, 96, seed=5)
    layers = {name: layer_of(torch.randn(32, 96, generator=torch.Generator().manual_seed(6))) for name in ("q", "k")}
    with Covariances(layers) as seen:
        for some in x.split(200):
            for layer in layers.values():
                layer(some)
    for name, layer in layers.items():
        torch.testing.assert_close(seen.of(name), x.T @ x / 600, rtol=1e-4, atol=1e-4)
        exact = F.linear(x, layer.weight)
        near, spread = (low_bit_copy(layer, 4, 32, covariance).dequantise() for covariance in (None, seen.of(name)))
        assert deviation(F.linear(x, spread), exact) < 0.8 * deviation(F.linear(x, near), exact)
    assert seen.of("v") is None


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.01), (4, 0.12)])
def test_rounding_loses_what_its_bits_lose(bits: int, worst: float):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(2))
    assert 0 < deviation(low_bit_copy(layer_of(weight), bits, 64).dequantise(), weight) < worst


@pytest.mark.parametrize("bits", BITS)
def test_a_layer_that_has_run_is_saved_copied_and_pickled_as_it_was_made(bits: int):
    layer, x = random_layer(bits, (70, 200)), random_inputs(2, 200)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    size, expected = layer.nbytes, layer(x)
    assert layer.layout is None or layer._buffers["planes"].numel() == 0  # the kernel has the only copy
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
        low_bit_copy(layer_of(torch.full((2, 2), torch.nan)), 8, 64)


def test_other_bits_are_refused():
    with pytest.raises(InvalidInputError, match=r"in 3 bits.*give one of \[4, 8\]"):
        quantise_linears(tiny_model("gpt2"), 3)
    with pytest.raises(InvalidInputError, match="linear_bits is 3; give 4, 8 or None"):
        FoldConfig(linear_bits=3)


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
    assert isinstance(model.get_output_embeddings(), LowBitLinear)
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
    attention = LAYERS * 4 * (64 * (3 * 64 + 64) + 3 * 64 + 64)
    assert report.shared == 4 * VOCAB * 64
    assert report.dense == attention + report.shared


@pytest.mark.parametrize(("name", "bits"), zip(["gpt_neox", "bert"], BITS, strict=True))
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


def test_bf16_loads_with_the_same_planes_and_scales(saved: Path):
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    for name, layer in low_bit_linears(quantised("gpt2", 8)[0]).items():
        state, expected = loaded.get_submodule(name).state_dict(), layer.state_dict()
        assert all(torch.equal(state[part], expected[part]) for part in ("planes", "scale"))


def test_files_hold_planes_and_an_empty_weight(saved: Path):
    stored = load_file(saved / "model.safetensors")
    name = "transformer.h.0.attn.c_attn"
    assert stored[f"{name}.planes"].shape == (192, 8, 8)
    assert stored[f"{name}.scale"].dtype == torch.float16
    assert stored[f"{name}.weight"].shape == stored["lm_head.weight"].shape == (0,)
    assert stored["transformer.wte.weight"].shape == (VOCAB, 64)


def test_a_model_without_its_head_loads(saved: Path):
    base, model = AutoModel.from_pretrained(saved), quantised("gpt2", 8)[0]
    with torch.no_grad():
        expected = model.transformer(tokens()).last_hidden_state
        assert torch.equal(base(tokens()).last_hidden_state, expected)


@pytest.mark.parametrize("lost", ["transformer.h.1.attn.c_attn.planes", "lm_head.scale"])
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
    sentence = "5 linear layers outside the FFNs in int8"
    made = fold("--linears", "int8", "--fold-dtype", "int4", "--fallback", "int4")
    assert made.code == 0
    assert sentence in made.out
    directory = tmp_path / "out"
    assert sentence in tardis("inspect", directory).out
    assert json.loads(tardis("inspect", directory, "--json").out)["linears"]["bits"] == 8
    assert "perplexity" in tardis("eval", directory, "--text", tiny_text).out
    assert tardis("generate", directory, "a text").code == 0
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert (len(low_bit_linears(loaded)), list(predicted_heads(loaded))) == (4, ["lm_head"])


def test_linears_in_bf16_are_refused_for_another_dtype(fold: Callable[..., Result]):
    assert_refused(fold("--linears", "bf16"), "add --dtype bfloat16")


def test_layers_that_share_a_name_with_nothing_are_an_error():
    with pytest.raises(AttributeError):
        put_linears(tiny_model("gpt2"), {"transformer.h.9.attn.c_attn": nn.Identity()})


def stored_as_before(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """Codes and scales of a weight [out, in], whose inputs are a multiple of 64, as format version 3 had them."""
    if bits == 8:
        scale = (weight.abs().amax(1) / 127).bfloat16()
        codes = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        return {"codes": codes.to(torch.int8), "scale": scale}
    groups, values = weight.unflatten(1, (-1, 64)), torch.tensor(_NF4)
    scale = groups.abs().amax(2).bfloat16()
    codes = torch.bucketize(groups / scale.float()[..., None], (values[1:] + values[:-1]) / 2).flatten(1)
    return {"codes": (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), "scale": scale}


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.02), (4, 0.2)])
def test_a_checkpoint_of_format_version_3_loads_and_is_saved_anew(bits: int, worst: float, saved: Path, tmp_path: Path):
    stored, linears = load_file(saved / "model.safetensors"), low_bit_linears(quantised("gpt2", 8)[0])
    for name, layer in linears.items():
        del stored[f"{name}.planes"]
        stored |= {f"{name}.{part}": tensor for part, tensor in stored_as_before(layer.dequantise(), bits).items()}
    save_file(stored, saved / "model.safetensors", {"format": "pt"})
    (saved / MANIFEST).unlink()
    config = json.loads((saved / "config.json").read_text())
    del config["quantization_config"]["linear_group_size"]
    config["quantization_config"] |= {"format_version": 3, "linears": dict.fromkeys(linears, bits)}
    (saved / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert deviation(logits(loaded), logits(quantised("gpt2", 8)[0])) < worst
    assert low_bit_linears(loaded).keys() == linears.keys()
    loaded.save_pretrained(tmp_path / "anew")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "anew")), logits(loaded))
    settings = json.loads((tmp_path / "anew" / "config.json").read_text())["quantization_config"]
    assert (settings["format_version"], settings["linear_group_size"]) == (FORMAT_VERSION, 64)
    assert set(settings["linears"].values()) == {8}
