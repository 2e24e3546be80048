"""Loading models and tokenizers: what comes back, and what every kind of broken input is answered with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from models import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from tardis_llm import sample
from tardis_llm.calibration.limits import token_limit, window_length
from tardis_llm.checkpoint.config_file import load_config
from tardis_llm.checkpoint.loading import load_dense, load_model, load_report, load_tokenizer
from tardis_llm.errors import CheckpointError, InvalidInputError, UnsupportedModelError
from tardis_llm.runtime.placing import folded_ffns


@pytest.fixture
def copy(tiny_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to damage."""
    return shutil.copytree(tiny_dir, tmp_path / "copy")


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_a_dense_model_keeps_its_dtype_unless_another_is_asked_for():
    directory = str(sample.model_dir())
    assert load_dense(directory).dtype == torch.bfloat16
    model = load_dense(directory, "float32")
    assert model.dtype == torch.float32
    assert not model.training


def test_a_folded_model_loads_folded_with_its_report(sample_folded: Path):
    model, report = load_model(str(sample_folded)), load_report(str(sample_folded))
    assert report is not None
    assert list(folded_ffns(model)) == [layer.prefix for layer in report.layers]


def test_a_dense_model_has_no_report(tiny_dir: Path):
    assert load_report(str(tiny_dir)) is None
    assert not folded_ffns(load_model(str(tiny_dir)))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoder_loads_as_the_class_named_in_its_config(name: str, tmp_path: Path):
    tiny_model(name).save_pretrained(tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert [type(load_dense(str(tmp_path))).__name__] == named


@pytest.mark.parametrize("architectures", [None, ["BertForPreTraining"], ["NoSuchModel"]])
def test_an_encoder_class_that_cannot_be_used_is_refused(architectures: list[str] | None, tmp_path: Path):
    tiny_model("bert").save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=architectures)
    with pytest.raises(UnsupportedModelError, match=r"architectures.*such as BertModel"):
        load_dense(str(tmp_path))


def test_a_family_with_experts_is_refused_before_its_weights_are_read(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(UnsupportedModelError, match=r"experts.*TARDIS folds these families: apertus"):
        load_dense(str(tmp_path))


@pytest.mark.parametrize("content", ['{"model_type": "nonsense"}', "{}"])
def test_an_unknown_family_gets_the_list_of_those_supported(copy: Path, content: str):
    (copy / "config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"does not know this kind.*TARDIS folds these families: apertus"):
        load_dense(str(copy))


def test_a_folded_model_is_not_dense(sample_folded: Path):
    with pytest.raises(InvalidInputError, match=r"folded already; give the dense model"):
        load_dense(str(sample_folded))


def test_a_quantised_model_is_refused(copy: Path):
    edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InvalidInputError, match=r"quantised \(gptq\); give the model in"):
        load_model(str(copy))


@pytest.mark.parametrize("name", ["{tmp}/nothing", "./nothing", "a/b/c"])
def test_a_directory_that_is_not_there_is_named(name: str, tmp_path: Path):
    with pytest.raises(InvalidInputError, match=r"no directory .*; give a model's directory, or its name on the hub"):
        load_dense(name.format(tmp=tmp_path))


def test_a_directory_without_config_is_no_model(copy: Path):
    (copy / "config.json").unlink()
    with pytest.raises(InvalidInputError, match=r"has no config\.json; give"):
        load_dense(str(copy))


def test_a_damaged_config_is_named(copy: Path):
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read .*copy it anew"):
        load_dense(str(copy))


def test_a_name_that_the_hub_cannot_give_says_what_to_check(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInputError, match=r"'nobody/nothing' is no directory.*check the name, the network"):
        load_config("nobody/nothing")


def test_weights_that_are_missing_are_an_error(copy: Path):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights .*copy or download"):
        load_dense(str(copy))


def test_a_truncated_weight_file_is_named(copy: Path):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing, truncated or damaged.*anew"):
        load_dense(str(copy))


def test_a_shard_that_is_missing_is_named(tmp_path: Path):
    tiny_model("gpt2").save_pretrained(tmp_path, max_shard_size="200KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing"):
        load_dense(str(tmp_path))


def test_a_tensor_that_the_file_lacks_is_an_error_and_never_random(copy: Path):
    lost = "transformer.h.1.mlp.c_fc.weight"
    edit_weights(copy, lambda tensors: tensors.pop(lost))
    with pytest.raises(CheckpointError, match=rf"lack 1 tensors, the first is {lost}"):
        load_dense(str(copy))


def test_weights_of_another_shape_than_the_config_are_an_error(copy: Path):
    name = "transformer.h.1.mlp.c_fc.weight"
    edit_weights(copy, lambda tensors: tensors.update({name: tensors[name][:, :100].contiguous()}))
    with pytest.raises(CheckpointError, match=r"do not fit its config\.json"):
        load_dense(str(copy))


def test_an_unknown_dtype_is_refused(tiny_dir: Path):
    with pytest.raises(InvalidInputError, match=r"dtype is 'int4'; give one of float32, bfloat16, float16"):
        load_dense(str(tiny_dir), "int4")


@pytest.mark.parametrize("lost", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_missing_tokenizer_is_an_error_and_never_made_up(copy: Path, lost: list[str]):
    for name in lost:
        (copy / name).unlink()
    with pytest.raises(InvalidInputError, match=r"has no tokenizer.*Put the model's tokenizer files"):
        load_tokenizer(str(copy))


def test_windows_are_as_long_as_model_and_tokenizer_allow():
    model = tiny_model("gpt2")  # 128 positions, and so the tokenizer
    assert token_limit(model, tiny_tokenizer()) == 128
    assert window_length(model, tiny_tokenizer(), None) == 128
    assert window_length(model, None, 64) == 64
    for wanted in (1, 129):
        with pytest.raises(InvalidInputError, match="choose from 2 to 128"):
            window_length(model, tiny_tokenizer(), wanted)


def test_a_model_without_positions_of_its_own_goes_by_the_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30  # what transformers writes for "no limit"
    assert token_limit(tiny_model("bloom"), tokenizer) is None
    assert window_length(tiny_model("bloom"), tokenizer, None) == 1024


@pytest.mark.parametrize(
    "index", ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": 3}', "\xff"]
)
def test_a_damaged_index_is_named(copy: Path, index: str):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(index, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json .*copy"):
        load_model(str(copy))
