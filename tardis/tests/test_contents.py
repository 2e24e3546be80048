"""Weight files are those that config.json and tardis.json describe, in every family and form: names, dtypes, shapes."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result
from marks import mostly_long
from models import ENCODER_NAMES, FAMILY_NAMES, LAYOUTS, tiny_tokenizer, tokens
from mutations import read_header, write_header
from quick_folds import FORMS, save_quick
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from tardis_llm.checkpoint.loading import load_model, load_report
from tardis_llm.checkpoint.manifest import MANIFEST
from tardis_llm.errors import CheckpointError, TardisError
from tardis_llm.ffn.weights import FoldFormat
from tardis_llm.runtime.placing import folded_ffns

every_layout = pytest.mark.parametrize("name", list(LAYOUTS))
#: every family in as few bits as there are, those that name tensors in their own way plain too, and every other form
every_form = pytest.mark.parametrize(
    ("name", "form"),
    [
        *mostly_long(
            ((name, "all in few bits") for name in FAMILY_NAMES), {(name, "all in few bits") for name in LAYOUTS}
        ),
        *((name, "plain") for name in ("gpt2", "gpt_neox", "bert", "roberta", "llama", "phi3")),
        *(("phi", form) for form in FORMS if form != "all in few bits"),
    ],
)
#: of a folded FFN of each form of storage; none is the model's dtype
FORMAT = ("planes", "scale", "low", "high", "slope", "offset", "codes")


def auto(name: str) -> Any:
    return AutoModelForMaskedLM if name in ENCODER_NAMES else AutoModelForCausalLM


@torch.no_grad()
def output(model: PreTrainedModel) -> Tensor:
    return model(tokens())[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folded GPT-2."""
    directory = tmp_path_factory.mktemp("gpt2")
    save_quick(directory, "gpt2")
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to edit."""
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folded GPT-2 in shards."""
    save_quick(tmp_path / "shards", "gpt2", shard="150KB")
    return tmp_path / "shards"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_settings(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(directory / "config.json", lambda config: change(config["quantization_config"]))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_entry(directory: Path, ending: str, **changes: Any) -> None:
    """Edit the header's entries of all tensors whose names end so."""
    file = directory / "model.safetensors"
    header, data = read_header(file)
    for name, entry in header.items():
        if name.endswith(ending):
            entry.update(changes)
    write_header(file, header, data)


def refused(directory: Path, message: str) -> None:
    """It loads neither by transformers nor by us."""
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(CheckpointError, match=message):
        load_model(str(directory))


@every_form
def test_a_fold_saved_anew_is_the_same_and_loads_in_the_dtype_that_is_asked_for(name: str, form: str, tmp_path: Path):
    expected = output(save_quick(tmp_path / "first", name, form))
    loaded = auto(name).from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "again")
    named = json.loads((tmp_path / "again" / "config.json").read_text())["architectures"]
    assert named == [f"Tardis{type(loaded).__name__}"]
    whole = load_model(str(tmp_path / "again"))
    assert torch.equal(output(whole), expected)
    for load in (auto(name), AutoModel):
        assert_in_bf16(load.from_pretrained(tmp_path / "again", dtype=torch.bfloat16), whole)


def assert_in_bf16(model: PreTrainedModel, stored: PreTrainedModel) -> None:
    """Every tensor is in bf16 but those of the format, which are as stored; and the model runs."""
    prefix = stored.base_model_prefix + "."
    kept = {key.removeprefix(prefix): value for key, value in stored.state_dict().items()}
    for key, value in model.state_dict().items():
        if key.rpartition(".")[2] in FORMAT:
            assert value.dtype == kept[key.removeprefix(prefix)].dtype
            assert torch.equal(value, kept[key.removeprefix(prefix)])
        else:
            assert value.dtype == torch.bfloat16, key
    assert output(model).dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_fold_in_half_precision_loads_in_every_dtype(form: str, stored: torch.dtype, tmp_path: Path):
    save_quick(tmp_path / "first", "gpt2", form)
    AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=stored).save_pretrained(tmp_path / "half")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=dtype)
        assert loaded.transformer.wte.weight.dtype == loaded.lm_head.weight.dtype == dtype


@every_layout
def test_every_tensor_is_needed_and_none_is_drawn_at_random(name: str, tmp_path: Path):
    save_quick(tmp_path, name)
    (tmp_path / MANIFEST).unlink()
    file = tmp_path / "model.safetensors"
    header, data = read_header(file)
    lost = [key for key in header if key != "__metadata__"]
    for key in lost[:: len(lost) // 3]:
        rest = {each: value for each, value in load_file(file).items() if each != key}
        save_file(rest, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match="lack 1 tensors"):
            auto(name).from_pretrained(tmp_path)
        write_header(file, header, data)


@pytest.mark.parametrize(
    ("ending", "change"),
    [
        ("predictor.planes", {"shape": [256, 4, 4]}),
        ("predictor.planes", {"dtype": "I8"}),
        ("predictor.scale", {"dtype": "BF16"}),
        ("tardis.low", {"dtype": "BF16"}),
        ("tardis.fold.weight", {"shape": [32, 128]}),
        ("tardis.fold.weight", {"dtype": "I32"}),
        ("tardis.fold.bias", {"shape": [64, 1]}),
        ("h.1.ln_1.weight", {"dtype": "I32"}),
        ("h.1.mlp.c_fc.weight", {"shape": [256, 64]}),
        ("h.1.attn.c_attn.weight", {"shape": [192, 64]}),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_headers_of_other_dtypes_and_shapes_are_refused(copy: Path, ending: str, change: dict, recorded: bool):
    edit_entry(copy, ending, **change)
    if not recorded:
        (copy / MANIFEST).unlink()
    refused(copy, rf"{ending} is \w+ \[.*\], and \w+ \[.*\] is what config\.json describes")


def test_a_half_precision_header_of_the_other_kind_is_refused(copy: Path, tmp_path: Path):
    AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load_model(str(tmp_path / "half")).dtype == torch.bfloat16
    edit_entry(tmp_path / "half", "h.1.ln_1.weight", dtype="F16")
    refused(tmp_path / "half", r"h\.1\.ln_1\.weight is float16 \[64\], and bfloat16 \[64\] is what config\.json")
    edit(tmp_path / "half" / "config.json", lambda config: config.update(dtype="float32"))
    refused(tmp_path / "half", "a model has one dtype of 16 bits")


@pytest.mark.parametrize("added", ["transformer.h.1.mlp.tardis.extra", "transformer.h.9.ln_1.weight", "lm_head.weight"])
def test_tensors_that_the_model_does_not_have_are_refused(copy: Path, added: str):
    (copy / MANIFEST).unlink()
    edit_tensors(copy, lambda tensors: tensors.update({added: tensors["transformer.wte.weight"].clone()}))
    refused(copy, added)


def test_a_tensor_under_two_names_or_in_two_files_is_refused(copy: Path, shards: Path):
    (copy / MANIFEST).unlink()
    edit_tensors(copy, lambda tensors: tensors.update({"wpe.weight": tensors["transformer.wpe.weight"].clone()}))
    refused(copy, "are the same tensor")
    first, second = sorted(shards.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    refused(shards, "both .* have the tensor")


@pytest.mark.parametrize("key", [field.name for field in fields(FoldFormat)])
@pytest.mark.parametrize("value", [True, -1, 3.0, 10**30, "relu", None, []])
def test_formats_that_cannot_be_are_refused(copy: Path, key: str, value: object):
    (copy / MANIFEST).unlink()
    edit_settings(copy, lambda settings: [layer.update({key: value}) for layer in settings["layers"].values()])
    if value is None and key in ("fold_bits", "fallback_bits", "remainder_bits"):
        assert folded_ffns(load_model(str(copy)))
    else:
        refused(copy, r"config\.json")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"layers": {"transformer.h.1.mlp": 3}},
        {"format_version": True},
        {"format_version": "1"},
        {"calibration": 3},
        {"linears": {"lm_head": 8.0}},
        {"linears": [1]},
        {"crossover": -1},
        {"crossover": "many"},
        {"rotation": 1},
        {"load_in_8bit": True},
    ],
)
def test_settings_that_cannot_be_are_refused(copy: Path, change: dict):
    (copy / MANIFEST).unlink()
    edit_settings(copy, lambda settings: settings.update(change))
    with pytest.raises(CheckpointError, match=r"config\.json|format version"):
        load_model(str(copy))


@pytest.mark.parametrize(("name", "value"), [("n_layer", 1), ("n_layer", 4), ("n_layer", 10**9), ("n_embd", 128)])
def test_a_config_of_another_size_is_refused_at_once(copy: Path, name: str, value: int):
    (copy / MANIFEST).unlink()
    edit(copy / "config.json", lambda config: config.update({name: value}))
    refused(copy, r"config\.json")


def test_a_table_that_would_take_all_memory_is_refused(tmp_path: Path):
    save_quick(tmp_path, "gptj")
    (tmp_path / MANIFEST).unlink()
    edit(tmp_path / "config.json", lambda config: config.update(n_positions=10**9))
    refused(tmp_path, r"embed_positions \[1000000000, 8\], which takes")


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_head", 2), ("layer_norm_epsilon", 0.1), ("activation_function", "gelu"), ("scale_attn_weights", False)],
)
def test_the_record_binds_what_config_json_says(copy: Path, name: str, value: object):
    edit(copy / "config.json", lambda config: config.update({name: value}))
    refused(copy, r"config\.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(dtype="bfloat16"),
        lambda config: config.update(eos_token_id=3, use_cache=False, transformers_version="5"),
        lambda config: config["quantization_config"].update(crossover=7),
    ],
)
def test_what_changes_no_model_may_be_edited(copy: Path, change: Callable):
    edit(copy / "config.json", change)
    assert folded_ffns(load_model(str(copy)))


def test_names_of_like_tensors_that_are_exchanged_are_found(copy: Path):
    file = copy / "model.safetensors"
    header, data = read_header(file)
    one, other = "transformer.h.0.ln_1.weight", "transformer.h.1.ln_1.weight"
    header[one], header[other] = header[other], header[one]
    write_header(file, header, data)
    refused(copy, "is not the one that was written")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(tensors={}),
        lambda record: record.pop("tensors"),
        lambda record: record["tensors"].popitem(),
        lambda record: record.update(format_version=1),
        lambda record: record.update(format_version=None),
        lambda record: record.update(config=None),
        lambda record: record.update(config={}),
        lambda record: record["tensors"].update(x={"sha256": "", "dtype": "float32", "shape": []}),
    ],
)
def test_an_edited_record_switches_no_check_off(copy: Path, change: Callable):
    edit(copy / MANIFEST, change)
    refused(copy, r"tardis\.json|lacks 1 tensors")


def test_a_checkpoint_of_the_first_format_loads_with_every_check_of_structure(copy: Path):
    def first(record: dict[str, Any]) -> None:
        record.update(format_version=1, tensors={key: seal["sha256"] for key, seal in record["tensors"].items()})
        del record["config"]

    expected = output(load_model(str(copy)))
    edit(copy / MANIFEST, first)
    edit_settings(copy, lambda settings: settings.update(format_version=1))
    assert torch.equal(output(load_model(str(copy))), expected)
    shutil.copytree(copy, copy.parent / "edited")
    edit_entry(copy.parent / "edited", "predictor.scale", dtype="BF16")
    refused(copy.parent / "edited", "is what config.json describes")
    edit(copy / MANIFEST, lambda record: record["tensors"].update({"transformer.wpe.weight": "0"}))
    refused(copy, "is not the one that was written")


@pytest.mark.parametrize("place", ["../outside/{}", "{outside}/{}", "sub/{}", "./{}", ".."])
def test_every_file_of_an_index_lies_in_the_directory(shards: Path, place: str):
    outside = shards.parent / "outside"
    shutil.copytree(shards, outside)
    shutil.copytree(outside, shards / "sub")
    index = shards / "model.safetensors.index.json"

    def move(values: dict[str, Any]) -> None:
        values["weight_map"] = {key: place.format(name, outside=outside) for key, name in values["weight_map"].items()}

    edit(index, move)
    refused(shards, "lies in the directory")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"x": 1}}']
)
def test_a_damaged_index_is_an_error_of_ours(shards: Path, text: str):
    (shards / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_model(str(shards))


def test_files_may_be_links_as_in_the_cache_of_the_hub(shards: Path):
    expected = output(load_model(str(shards)))
    blobs = shards.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(shards.iterdir())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(f"../blobs/{number}")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(shards)), expected)


def test_a_folder_of_a_repository_may_hold_a_checkpoint(copy: Path, shards: Path):
    expected = output(load_model(str(copy)))
    shutil.copytree(copy, shards / "folder")
    loaded = AutoModelForCausalLM.from_pretrained(shards, subfolder="folder")
    assert torch.equal(output(loaded), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.update(layers=3),
        lambda report: report["layers"][0].update(fix_rate="x"),
        lambda report: report["layers"][0].update(prefix=None),
        lambda report: report.update(calibration={"tokens": "x"}),
        lambda report: report.update(config=[]),
    ],
)
def test_a_report_whose_figures_are_none_is_damaged(copy: Path, change: Callable):
    edit(copy / MANIFEST, lambda record: change(record["report"]))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_report(str(copy))


def test_a_new_classifier_may_be_trained_on_a_fold_and_a_missing_head_may_not_be_random(copy: Path, tmp_path: Path):
    classifier = AutoModelForSequenceClassification.from_pretrained(copy, num_labels=3)
    assert classifier.score.weight.shape == (3, 64)
    save_quick(tmp_path / "phi", "phi")
    AutoModel.from_pretrained(tmp_path / "phi").save_pretrained(tmp_path / "base")
    assert folded_ffns(AutoModel.from_pretrained(tmp_path / "base"))
    with pytest.raises(CheckpointError, match=r"the first is lm_head\.bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("named", ["TardisGPT2LMHeadModel", "GPT2LMHeadModel"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_fold_whose_config_no_longer_says_so_is_not_loaded_as_dense(copy: Path, named: str, recorded: bool):
    if not recorded:
        (copy / MANIFEST).unlink()
    edit(copy / "config.json", lambda config: config.update(architectures=[named]))
    edit(copy / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(CheckpointError, match="has no quantization_config that says how"):
        load_model(str(copy))


def test_a_class_that_is_loaded_by_name_checks_too(copy: Path):
    (copy / MANIFEST).unlink()
    edit(copy / "config.json", lambda config: config.update(n_layer=10**9))
    with pytest.raises(CheckpointError, match=r"1000000000 blocks"):
        GPT2LMHeadModel.from_pretrained(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"num_labels": 10**9},
        {"n_layer": "3"},
        {"n_layer": -1},
        {"n_head": 0},
        {"vocab_size": 10**30},
        {"dtype": "float99"},
        {"architectures": 5},
        {"model_type": []},
        {"quantization_config": "x"},
        {"quantization_config": {"quant_method": "tardis"}},
        {"quantization_config": [1]},
    ],
)
def test_a_config_that_transformers_cannot_use_is_an_error_of_ours(copy: Path, change: dict):
    edit(copy / "config.json", lambda config: config.update(change))
    with pytest.raises(TardisError):
        load_model(str(copy))


def test_a_loaded_fold_is_gone_when_nothing_refers_to_it(copy: Path):
    gc.disable()
    try:
        model = AutoModelForCausalLM.from_pretrained(copy)
        seen = weakref.ref(model.transformer.wte.weight)
        del model
        assert seen() is None
    finally:
        gc.enable()


def test_eval_and_inspect_say_what_a_fold_saved_anew_does_not_tell(
    copy: Path, tmp_path: Path, tiny_text: Path, tardis: Callable[..., Result]
):
    AutoModelForCausalLM.from_pretrained(copy).save_pretrained(tmp_path / "again")
    tiny_tokenizer().save_pretrained(tmp_path / "again")
    found = tardis("eval", tmp_path / "again", "--text", tiny_text)
    assert found.code == 0
    assert "perplexity" in found.out
    assert "has no tardis.json" in " ".join(found.err.split())
    shown = tardis("inspect", tmp_path / "again")
    assert shown.code == 0
    assert "has no tardis.json" in " ".join(shown.out.split())
    assert json.loads(tardis("inspect", tmp_path / "again", "--json").out)["recorded"] is False
