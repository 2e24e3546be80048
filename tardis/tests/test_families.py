"""Every family of the table: its FFNs are found, checked, and computed from their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import (
    CAUSAL_NAMES,
    FAMILY_NAMES,
    INTERMEDIATE,
    LAYERS,
    SPEECH,
    guide_families,
    record,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    tokens,
)
from models import HIDDEN as D
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tardis_llm.errors import InvalidInputError, UnsupportedModelError
from tardis_llm.families.sites import ffn_linear_names, find_ffns, layer_list, set_module
from tardis_llm.families.table import FAMILIES, WITH_EXPERTS, family_of
from tardis_llm.ffn.activations import identify
from tardis_llm.integrations.vllm.names import Projections
from tardis_llm.runtime.backend import dense_ffn

every_family = pytest.mark.parametrize("name", FAMILY_NAMES)
SMALL_EYES = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}


def test_the_tiny_models_cover_every_family_of_the_table() -> None:
    assert {tiny_config(name).model_type for name in FAMILY_NAMES} == set(FAMILIES) - SPEECH


def test_the_guide_lists_every_family_with_its_kind_of_ffn() -> None:
    kinds = {name: "gated" if row.gated else "plain" for name, row in FAMILIES.items()}
    assert {name: ffn for name, (ffn, _) in guide_families().items()} == kinds


@every_family
def test_each_block_has_one_ffn_site_named_as_in_the_model(name: str) -> None:
    model = tiny_model(name)
    sites = find_ffns(model)
    assert [site.index for site in sites] == list(range(LAYERS))
    for site, block in zip(sites, layer_list(model), strict=True):
        assert site.block is block
        assert model.get_submodule(site.prefix) is site.parent
        assert model.get_submodule(site.up_name) is site.up
        assert model.get_submodule(site.activation_name) is site.activation
        assert model.get_submodule(site.down_name) is site.down
        assert (site.hidden_size, site.intermediate_size) == (D, neurons(model))
        parts = [site.prefix] if site.gated else [site.up_name, site.activation_name, site.down_name]
        assert list(site.replaced) == parts
        for found in (site.replaced, site.linears):
            assert all(model.get_submodule(name) is part for name, part in found.items())
        assert all(f"{linear}.weight" in model.state_dict() for linear in site.linears)
        family = FAMILIES[model.config.model_type]
        located = [(site.index, part) for part in (family.ffn, *family.linears)]
        assert [family.locate(name) for name in (site.prefix, *site.linears)] == located
        assert ffn_linear_names(model) >= set(site.linears)


def neurons(model: PreTrainedModel) -> int:
    """h of its FFNs, as its config says; several families do not."""
    return getattr(model.config, "intermediate_size", INTERMEDIATE)


@every_family
def test_the_weights_reproduce_what_the_modules_compute(name: str) -> None:
    model = tiny_model(name)
    for site in find_ffns(model):
        modules = [*site.projections.values(), site.activation, site.down]
        (x, *into), (*out, y) = record(model, modules, input_ids=tokens())
        dense = site.weights()
        assert dense.k == (2 if site.gated else 1)
        torch.testing.assert_close(dense_ffn(x, dense), y, rtol=1e-4, atol=1e-5)
        if not site.gated:
            assert torch.equal(into[0], out[0]), "something stands between up and activation"
            assert torch.equal(into[1], out[1]), "something stands between activation and down"
        assert y.std() > 0.1, "the FFN of a tiny model must matter"


@every_family
def test_what_is_behind_the_ffn_of_a_family_is_the_norm_that_the_table_names(name: str) -> None:
    model = tiny_model(name)
    for site in find_ffns(model):
        norms = [part for part in site.block.modules() if "Norm" in type(part).__name__]
        _, (y,) = record(model, [site.down], input_ids=tokens())
        into, _ = record(model, norms, input_ids=tokens())
        behind = [norm for norm, x in zip(norms, into, strict=True) if torch.equal(x, y)]
        assert behind == ([] if site.norm is None else [site.norm])


@every_family
def test_weights_are_views_of_the_model_but_those_of_a_gate_apart_are_copies(name: str) -> None:
    model = tiny_model(name)
    site, stored = find_ffns(model)[0], model.state_dict()
    if len(site.projections) > 1:
        gate, up = (stored[f"{part}.weight"] for part in site.projections)
        assert torch.equal(site.parts()[0], torch.cat([gate, up]))
        return
    names = [f"{part}.{kind}" for part in (site.up_name, site.down_name) for kind in ("weight", "bias")]
    for view, key in zip(site.parts(), names, strict=True):
        assert (view is None) == (key not in stored)
        assert view is None or (view.data_ptr() == stored[key].data_ptr() and not view.requires_grad)


@every_family
def test_the_outline_has_the_sizes_of_the_weights_and_no_numbers(name: str) -> None:
    site = find_ffns(tiny_model(name))[0]
    weights, outline = site.weights(), site.outline()
    assert (outline.d, outline.h, outline.k, outline.nbytes) == (weights.d, weights.h, weights.k, weights.nbytes)
    assert outline.w1.is_meta and outline.w2.is_meta


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "h.0.mlp"), ("opt", "decoder.layers.0"), ("bert", "encoder.layer.0")]
)
def test_a_model_without_head_is_named_without_the_base_prefix(name: str, prefix: str) -> None:
    assert find_ffns(AutoModel.from_config(tiny_model(name).config))[0].prefix == prefix


@every_family
def test_sites_are_found_and_identified_on_meta(name: str) -> None:
    config = tiny_model(name).config
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        sites = find_ffns(model)
        assert [identify(site.activation) for site in sites] == [identify(sites[0].activation)] * LAYERS
    assert sites[0].weights().w1.device.type == "meta"


def test_encoders_and_models_of_speech_are_the_families_that_are_no_language_models() -> None:
    causal = {model_type for model_type, family in FAMILIES.items() if family.language_model}
    assert {model_type for model_type, family in FAMILIES.items() if family.speech} == SPEECH
    assert {tiny_config(name).model_type for name in CAUSAL_NAMES} == causal


@pytest.mark.parametrize("name", ["llama", "llama_biased", "phi3", "glm4"])
def test_a_gated_ffn_has_its_gate_first_and_is_replaced_whole(name: str) -> None:
    model = tiny_model(name)
    site, block = find_ffns(model)[0], model.model.layers[0]
    gates = [] if "phi" in name or "glm" in name else [block.mlp.gate_proj]
    ups = [*gates, block.mlp.up_proj if gates else block.mlp.gate_up_proj]
    assert site.gated and list(site.projections.values()) == ups
    assert list(site.linears.values()) == [*ups, block.mlp.down_proj]
    assert site.replaced == {"model.layers.0.mlp": block.mlp}
    assert site.norm is (block.post_mlp_layernorm if name == "glm4" else None)
    assert (site.weights().b1 is None) == (name != "llama_biased")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "olmoe"])
def test_a_model_with_experts_is_refused_with_the_families_that_work(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"'{kind}' has experts.*cannot be folded.*bert, .*llama"):
        family_of(AutoConfig.for_model(kind))


def test_projections_are_known_by_block_and_part_whatever_stands_before() -> None:
    linears = ["model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.0.fc1"]
    known = Projections(FAMILIES["opt"], stacked=[1], linears=linears)
    names = ["decoder.layers.1.fc2", "model.decoder.layers.1.fc1", "model.decoder.layers.0.fc2", "layers.1.fc1"]
    assert [known.empty(name) for name in names] == [True, True, False, False]
    assert not known.empty("model.decoder.layers.1.self_attn.qkv_proj")
    assert all(map(known.in_few_bits, ["lm_head", "decoder.layers.0.fc1", "decoder.layers.2.self_attn.out_proj"]))
    assert not known.in_few_bits("decoder.layers.0.fc2")


def test_an_unknown_family_is_refused_with_the_supported_list() -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=320)
    with pytest.raises(UnsupportedModelError, match=r"unknown model family 't5'.*bert, .*bloom.*`family=Family"):
        find_ffns(T5ForConditionalGeneration(config))


def test_model_types_with_experts_exist_in_transformers_and_are_not_in_the_table() -> None:
    assert set(CONFIG_MAPPING_NAMES) >= WITH_EXPERTS | set(FAMILIES)
    assert not WITH_EXPERTS & set(FAMILIES)


def test_a_model_of_images_and_text_is_refused_and_its_text_model_alone_is_taken(tmp_path: Path) -> None:
    config = Gemma3Config(text_config=tiny_model("gemma3_text").config.to_dict(), vision_config=SMALL_EYES)
    both = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"'gemma3' has other inputs .* a 'gemma3_text': save that"):
        find_ffns(both)
    text = Gemma3ForCausalLM(both.config.text_config).eval()  # as the guide shows
    text.model, text.lm_head = both.model.language_model, both.lm_head
    text.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(find_ffns(loaded)) == LAYERS
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, both(tokens()).logits)


def test_a_config_flag_that_changes_the_ffn_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="slow_but_exact=False"):
        family_of(AutoConfig.for_model("bloom", slow_but_exact=True, pretraining_tp=2))


def test_parts_of_different_width_are_refused_by_name() -> None:
    model = tiny_model("opt")
    set_module(model, "model.decoder.layers.1.fc2", nn.Linear(INTERMEDIATE + 1, D))
    with pytest.raises(InvalidInputError, match=r"layers\.1\.fc1 is \[256, 64\].*layers\.1\.fc2 is \[64, 257\]"):
        find_ffns(model)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("transformer.h.0.mlp.c_fc", nn.Identity(), "c_fc is a Identity, not a linear layer"),
        ("transformer.h.0.mlp", nn.Identity(), "no module 'mlp.c_fc': transformer.h.0.mlp has no modules"),
        ("transformer.h", nn.Sequential(), "not a ModuleList"),
    ],
)
def test_a_model_that_was_modified_is_refused(name: str, part: nn.Module, message: str) -> None:
    model = tiny_model("gpt2")
    set_module(model, name, part)
    with pytest.raises(InvalidInputError, match=message):
        find_ffns(model)


@pytest.mark.parametrize(
    ("field", "value"), [("weight", torch.zeros(8, 1, dtype=torch.uint8)), ("bias", torch.zeros(3))]
)
def test_packed_weights_and_wrong_biases_are_refused(field: str, value: Tensor) -> None:
    model = tiny_model("phi")
    setattr(model.model.layers[0].mlp.fc1, field, nn.Parameter(value, requires_grad=False))
    with pytest.raises(InvalidInputError, match=f"fc1.{field}"):
        find_ffns(model)


def test_set_module_replaces_a_module_adds_a_child_and_refuses_a_missing_parent() -> None:
    model, new = tiny_model("gpt2"), nn.Identity()
    set_module(model, "transformer.h.1.mlp.act", new)
    set_module(model, "transformer.h.1.mlp.tardis", new)
    assert model.transformer.h[1].mlp.act is model.transformer.h[1].mlp.tardis is new
    with pytest.raises(InvalidInputError, match=r"no module 'transformer\.h\.9\.mlp': .*transformer.h has 0, 1\."):
        set_module(model, "transformer.h.9.mlp.tardis", new)


def test_the_seed_alone_decides_the_weights_of_a_tiny_model() -> None:
    state = torch.get_rng_state()
    same, other = tiny_model("mpt").state_dict(), tiny_model("mpt", seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, same[key]) for key, value in tiny_model("mpt").state_dict().items())
    assert not torch.equal(same["transformer.wte.weight"], other["transformer.wte.weight"])


def test_the_tiny_tokenizer_is_one_token_per_byte_and_survives_saving(tmp_path: Path) -> None:
    text = "Hé, two\n  lines\t"
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 257
    assert len(ids) == len(text.encode())
    tiny_model("gpt2").config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids) == text
    assert loaded.eos_token_id == 256
