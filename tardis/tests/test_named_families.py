"""Families that a user names: models of classes that the table lacks fold, are saved, load and run like any other."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK_TINY, Result, assert_refused
from folds import SETTINGS, logits, text
from marks import long, mostly_long
from models import END, HEADS, HIDDEN, INTERMEDIATE, LAYERS, POSITIONS, VOCAB, randomise, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from tardis_llm import Family, fold, save_folded
from tardis_llm.checkpoint.config_file import load_config
from tardis_llm.checkpoint.loading import load_dense, load_model
from tardis_llm.errors import InvalidInputError, TardisError, UnsupportedModelError
from tardis_llm.families.sites import find_ffns
from tardis_llm.families.table import FAMILIES, NAMED, family_of, position_limit, vocabulary
from tardis_llm.integrations.vllm.names import check_served
from tardis_llm.pipeline import fold as pipeline
from tardis_llm.runtime.decoding import compiled, prepare_decoding
from tardis_llm.runtime.placing import folded_ffns

Tardis = Callable[..., Result]

NANOCHAT = Family("nanochat", "layers", ffn="mlp", up="mlp.fc1", activation="mlp.activation_fn", down="mlp.fc2")
SEED_OSS = Family(
    "seed_oss", "layers", "mlp", gate="mlp.gate_proj", up="mlp.up_proj", activation="mlp.act_fn", down="mlp.down_proj"
)
BERT_LIKE = ("encoder.layer", "", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense")
NAMES = {
    "nanochat": NANOCHAT,
    "gpt_neo": Family("gpt_neo", "h", "mlp", "mlp.c_fc", "mlp.act", "mlp.c_proj"),
    "electra": Family("electra", *BERT_LIKE, causal=False),
    "seed_oss": SEED_OSS,
    # gate and up are one layer, and windows of attention alternate
    "modernbert": Family("modernbert", "layers", "mlp", "mlp.Wi", "mlp.act", "mlp.Wo", merged=True, causal=False),
}
FIELDS: dict[str, dict[str, Any]] = {
    "nanochat": {"num_key_value_heads": 2},
    "gpt_neo": {"num_layers": LAYERS, "num_heads": HEADS, "attention_types": [[["global"], LAYERS]]},
    "electra": {"embedding_size": HIDDEN},
    "seed_oss": {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 172},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 1},
}
every_model = pytest.mark.parametrize("name", mostly_long(NAMES, ("nanochat", "seed_oss", "modernbert")))


def unknown_model(name: str) -> PreTrainedModel:
    """A small random model, in eval mode, of a family that is not in the table; a copy for each call."""
    return copy.deepcopy(_unknown_model(name))


@cache
def _unknown_model(name: str) -> PreTrainedModel:
    common = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": END,
        "eos_token_id": END,
        "pad_token_id": 1,
    }
    fields = {key: value for key, value in common.items() if key in AutoConfig.for_model(name).to_dict()}
    auto = AutoModelForCausalLM if NAMES[name].causal else AutoModelForMaskedLM
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(AutoConfig.for_model(name, **{**fields, **FIELDS[name]}), dtype=torch.float32)
    randomise(model, 0)
    return model.eval()


@every_model
def test_a_fold_is_saved_and_loads_again_with_the_same_logits(name: str, tmp_path: Path) -> None:
    model = unknown_model(name)
    dense = logits(model)
    with pytest.raises(UnsupportedModelError, match=f"unknown model family {name!r}.*give tardis_llm.fold"):
        fold(model, text(), SETTINGS)
    report = fold(model, text(), SETTINGS, family=NAMES[name])
    assert list(folded_ffns(model)) == [layer.prefix for layer in report.layers]
    assert len(report.layers) == LAYERS
    assert not torch.equal(logits(model), dense)
    save_folded(model, report, tmp_path)
    auto = AutoModelForCausalLM if NAMES[name].causal else AutoModelForMaskedLM
    for loaded in (load_model(str(tmp_path)), auto.from_pretrained(tmp_path).eval()):
        assert family_of(loaded.config) == NAMES[name]
        assert torch.equal(logits(loaded), logits(model))
    headless = AutoModel.from_pretrained(tmp_path)
    assert len(folded_ffns(headless)) == LAYERS
    assert position_limit(headless.config) == POSITIONS
    assert vocabulary(headless) == VOCAB


def test_a_loaded_fold_is_saved_again_and_an_edited_family_is_refused(tmp_path: Path) -> None:
    model, first, again = unknown_model("nanochat"), tmp_path / "first", tmp_path / "again"
    save_folded(model, fold(model, text(), SETTINGS, family=NANOCHAT), first)
    load_model(str(first)).save_pretrained(again)
    assert torch.equal(logits(load_model(str(again))), logits(model))
    edits = (
        {"up": "self_attn.q_proj", "down": "self_attn.o_proj"},
        {"ffn": "self_attn"},
        {"layers": "h"},
        {"gate": "mlp.fc1"},
        {"gate": "self_attn.q_proj"},
    )
    for edit in edits:
        for directory in (first, again):
            config = json.loads((directory / "config.json").read_text())
            changed = {**config, NAMED: {**config[NAMED], **edit}}
            (directory / "config.json").write_text(json.dumps(changed))
            with pytest.raises(TardisError):
                load_model(str(directory))
            (directory / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def test_a_named_model_decodes_prepared_and_compiled() -> None:
    model = unknown_model("nanochat").to(torch.bfloat16)
    fold(model, text(), SETTINGS, family=NANOCHAT)
    before = logits(model)
    prepare_decoding(model)
    torch.testing.assert_close(logits(model), before, rtol=0.05, atol=0.05)
    assert compiled(model)["cache_implementation"] == "static"


@long
def test_an_interrupted_fold_resumes_with_the_same_family_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("folding layers", 1):
            raise KeyboardInterrupt

    work, whole = tmp_path / "work", unknown_model("nanochat")
    expected = fold(whole, text(), SETTINGS, family=NANOCHAT)
    with pytest.raises(KeyboardInterrupt):
        fold(unknown_model("nanochat"), text(), SETTINGS, work, progress=stop, family=NANOCHAT)
    with pytest.raises(InvalidInputError, match=r"different fold. model.family"):
        fold(unknown_model("nanochat"), text(), SETTINGS, work, True, family=replace(NANOCHAT, positions=""))
    calls = []
    fold_layer = pipeline._fold_layer
    monkeypatch.setattr(pipeline, "_fold_layer", lambda *args: calls.append(args) or fold_layer(*args))
    model = unknown_model("nanochat")
    assert fold(model, text(), SETTINGS, work, True, family=NANOCHAT) == expected
    assert len(calls) == LAYERS - 1
    assert torch.equal(logits(model), logits(whole))


@long
def test_the_table_may_be_overruled_and_folds_by_it_say_nothing_of_families(tmp_path: Path) -> None:
    model, known = tiny_model("gpt2"), tiny_model("gpt2")
    report = fold(known, text(), SETTINGS)
    assert fold(model, text(), SETTINGS, family=replace(FAMILIES["gpt2"], positions="")) == report
    assert position_limit(model.config) is None
    save_folded(known, report, tmp_path)
    assert NAMED not in json.loads((tmp_path / "config.json").read_text())


def test_commands_take_a_model_whose_config_names_its_family(tardis: Tardis, tiny_text: Path, tmp_path: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    unknown_model("nanochat").save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    refused = tardis("fold", dense, "-o", out, "--text", tiny_text, *QUICK_TINY)
    assert_refused(refused, f"write the fields of one as '{NAMED}' into config.json")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, NAMED: NANOCHAT.as_config()}))
    assert tardis("fold", dense, "-o", out, "--text", tiny_text, *QUICK_TINY).code == 0
    assert tardis("fold", dense, "-o", out, "--text", tiny_text, *QUICK_TINY, "--resume").code == 0
    for directory in (dense, out):
        assert tardis("inspect", directory, *(["--text", tiny_text] if directory is dense else [])).code == 0
        assert tardis("eval", directory, "--text", tiny_text).code == 0
        assert tardis("generate", directory, "Over the hills", "--max-new-tokens", 4).code == 0
    quick = ("--prompt", 16, "--steps", 2, "--rounds", 2, "--batch", 1)
    assert tardis("bench", out, "--against", dense, *quick).code == 0
    assert load_dense(str(dense)).config.model_type == "nanochat"


def test_vllm_says_that_it_does_not_serve_a_named_family(tmp_path: Path) -> None:
    model = unknown_model("gpt_neo")
    save_folded(model, fold(model, text(), SETTINGS, family=NAMES["gpt_neo"]), tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"vLLM serves families of TARDIS' table only; use transformers"):
        check_served(load_config(str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": "mlp.fc3"}, r"model.layers.0 has no module 'mlp.fc3': model.layers.0.mlp has .*fc1, fc2.*correct the"),
        ({"layers": "decoder.layers"}, r"no module 'model.decoder.layers': .*model has embed_tokens, .*layers"),
        ({"layers": "embed_tokens"}, r"model.embed_tokens is a .*, not a ModuleList"),
        ({"up": "self_attn"}, r"self_attn is a NanoChatAttention, not a linear layer"),
        ({"down": "mlp.fc1"}, r"do not fit: .*fc1 is \[256, 64\] and .*fc1 is \[256, 64\].*correct the parts"),
        ({"activation": "mlp"}, r"activation NanoChatMLP.* is none of those that TARDIS folds: gelu"),
        ({"gate": "mlp.fc1"}, r"do not fit: .*fc1 is \[256, 64\] and .*fc2 is \[64, 256\].*\[512, 64\] is wanted"),
        ({"merged": True}, r"do not fit: .*fc1 is \[256, 64\] and .*fc2 is \[64, 256\].*\[512, 64\] is wanted"),
        ({"model_type": "gpt2"}, r"the Family is that of 'gpt2' models, and this model is a 'nanochat'"),
        (
            {"up": "self_attn.q_proj", "down": "self_attn.o_proj"},
            r"activation_fn does not get what .*q_proj returns.*not down\(activation\(up\(x\)\)\)",
        ),
    ],
)
def test_a_family_that_does_not_fit_is_refused_and_leaves_the_model(change: dict[str, Any], message: str) -> None:
    assert_fits_not(NANOCHAT, change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "mlp.up_proj", "up": "mlp.gate_proj"}, "mlp.act_fn does not get what .*up_proj returns, so these"),
        ({"gate": "mlp.up_proj"}, r"do not fit: .*up_proj is \[172, 64\].*\[344, 64\] is wanted"),
        ({"gate": "mlp.gate"}, "has no module 'mlp.gate': .*mlp has gate_proj, up_proj, down_proj, act_fn"),
        ({"gate": ""}, r"act_fn does not get what .*up_proj returns.*with a gate, give its `gate` or `merged=True`"),
    ],
)
def test_a_gated_family_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    assert_fits_not(SEED_OSS, change, message)


def assert_fits_not(family: Family, change: dict[str, Any], message: str) -> None:
    """With a change, the family is refused and the model left as it is; without, it is taken."""
    model = unknown_model(family.model_type)
    before = model.config.to_dict()
    with pytest.raises(TardisError, match=re.compile(message, re.DOTALL)):
        fold(model, text(), SETTINGS, family=replace(family, **change))
    assert model.config.to_dict() == before
    fold(model, text(), replace(SETTINGS, split="uniform", layers=(0,)), family=family)


@pytest.mark.parametrize("name", ["seed_oss", "modernbert"])
@pytest.mark.parametrize("where", ["input", "output"])
def test_a_module_that_does_more_than_its_gated_ffn_is_refused(name: str, where: str) -> None:
    model = unknown_model(name)
    mlp = model.base_model.layers[1].mlp
    if where == "input":  # behind what the module gets, which a fold would get
        mlp.forward = lambda x, inner=mlp.forward: inner(2 * x)
    else:
        mlp.forward = lambda x, inner=mlp.forward: 2 * inner(x)
    message = r"does not get what .*layers\.1\.mlp gets" if where == "input" else r"layers\.1\.mlp does not return what"
    with pytest.raises(InvalidInputError, match=message):
        fold(model, text(), SETTINGS, family=NAMES[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn": ""}, "'mlp.gate_proj' is no child of ffn, which is ''.*give its path as `ffn`"),
        ({"down": "mlp.inner.down_proj"}, "'mlp.inner.down_proj' is no child of ffn, which is 'mlp'"),
        ({"ffn": "", "gate": "g", "up": "u", "down": "d"}, "'g' is no child of ffn, which is ''"),
        ({"merged": True}, "has the gate 'mlp.gate_proj' and is merged, too"),
    ],
)
def test_the_parts_of_a_gated_family_are_children_of_one_module(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        replace(SEED_OSS, **change)


def test_a_known_gated_model_that_is_named_as_if_it_had_no_gate_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidInputError, match=r"act_fn does not get what .*up_proj returns.*with a gate, give"):
        fold(model, text(), SETTINGS, family=replace(FAMILIES["llama"], gate=""))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (3, "tardis_family in the model's config is 3; give it the fields"),
        ({}, "is no Family .*missing .*required"),
        ({**NANOCHAT.as_config(), "sideways": "x"}, "is no Family .*sideways"),
        ({**NANOCHAT.as_config(), "up": 1}, "up of a Family is 1, and str is wanted"),
        ({**NANOCHAT.as_config(), "causal": "no"}, "causal of a Family is 'no', and bool is wanted"),
        ({**NANOCHAT.as_config(), "refused_flags": [1]}, r"refused_flags of a Family is \(1,\)"),
    ],
)
def test_fields_in_a_config_that_are_no_family_are_refused(values: object, message: str) -> None:
    model = unknown_model("nanochat")
    setattr(model.config, NAMED, values)
    with pytest.raises(InvalidInputError, match=message):
        find_ffns(model)


def test_a_family_comes_back_from_its_fields() -> None:
    for family in (*FAMILIES.values(), *NAMES.values()):
        assert Family.from_config(json.loads(json.dumps(family.as_config()))) == family
