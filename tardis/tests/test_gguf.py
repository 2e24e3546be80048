"""GGUF files as dense models: loaded, folded and loaded again, and what every unusable file is answered with."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
import transformers
from conftest import QUICK_TINY, Result, assert_refused
from gguf_files import write_gguf
from models import END, VOCAB, tiny_model, tokens

from tardis_llm import sample
from tardis_llm.checkpoint import gguf as reading
from tardis_llm.checkpoint.config_file import load_config
from tardis_llm.checkpoint.gguf import find_gguf
from tardis_llm.checkpoint.loading import load_dense, load_model, load_report, load_tokenizer
from tardis_llm.errors import CheckpointError, InvalidInputError, UnsupportedModelError


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GPT-2 in Q8_0, alone in its directory."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-q8_0.gguf")


@pytest.mark.parametrize(("kind", "dtype", "error"), [("f16", torch.float16, 1e-3), ("q8_0", torch.bfloat16, 5e-3)])
def test_weights_are_those_of_the_model_in_a_dtype_that_fits_their_format(
    kind: str, dtype: torch.dtype, error: float, tmp_path: Path
):
    path = write_gguf(tmp_path / "tiny.gguf", kind)
    model, own = load_dense(str(path), "float32"), tiny_model("gpt2").state_dict()
    found = model.state_dict()
    assert found.keys() == own.keys()
    assert max(float((found[name] - own[name]).abs().max()) for name in own) < error
    assert load_dense(str(path)).dtype == dtype
    assert find_gguf(str(path)).rounded == (kind == "q8_0")


@torch.no_grad()
def test_a_directory_with_one_file_is_that_model(file: Path):
    model, same = load_model(str(file)), load_model(str(file.parent))
    assert torch.equal(model(tokens()).logits, same(tokens()).logits)
    assert load_report(str(file)) is None


def test_the_tokenizer_is_that_of_the_file_whatever_lies_beside_it(file: Path, tmp_path: Path):
    load_tokenizer(str(sample.model_dir())).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(shutil.copy(file, tmp_path)))
    assert len(tokenizer) == VOCAB
    assert tokenizer.decode(tokenizer.encode("in the end")) == "in the end"
    assert tokenizer.encode("in")[0] != END


def test_texts_begin_as_the_file_says(tmp_path: Path):
    path = write_gguf(tmp_path / "begun.gguf", change=lambda writer: writer.add_add_bos_token(True))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode("in")[0] == END
    tokenizer.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).encode("in")[0] == END


def test_weights_are_written_out_where_transformers_could_leave_them_packed(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    found, config = find_gguf(str(file)), load_config(str(file))
    if hasattr(transformers, "GgufConfig"):
        assert found.arguments(config, None)["quantization_config"].dequantize
    monkeypatch.setattr(reading, "transformers", SimpleNamespace())  # as before 5.19
    assert "quantization_config" not in found.arguments(config, None)


def test_a_file_folds_to_a_checkpoint_that_knows_nothing_of_gguf_but_its_source(
    file: Path, tiny_text: Path, tmp_path: Path, tardis: Callable[..., Result]
):
    out = tmp_path / "out"
    done = tardis("fold", file, "-o", out, "--text", tiny_text, *QUICK_TINY, "--json")
    assert done.code == 0, done.err
    assert "rounded to Q8_0" in done.err
    config = json.loads((out / "config.json").read_text())
    assert "gguf" not in json.dumps(config).lower()
    assert not {"n_ctx", "feed_forward_length", "_model_name_or_path"} & config.keys()
    assert load_report(str(out)).source == {"format": "gguf", "file": file.name, "quantisation": "Q8_0"}
    assert load_model(str(out)).dtype == torch.bfloat16
    assert json.loads(tardis("generate", out, "Once upon", "--json").out)["text"]
    assert f"folded from {file.name}" in tardis("inspect", out).out


def test_every_command_on_a_dense_model_takes_a_file(file: Path, tiny_text: Path, tardis: Callable[..., Result]):
    for command in (
        ("eval", file, "--text", tiny_text, "--window", 32),
        ("inspect", file),
        ("generate", file, "Once upon", "--max-new-tokens", 4),
    ):
        done = tardis(*command)
        assert done.code == 0, done.err


def test_a_directory_with_weights_of_its_own_is_an_ordinary_model(tiny_dir: Path, file: Path, tmp_path: Path):
    both = shutil.copytree(tiny_dir, tmp_path / "both")
    shutil.copy(file, both)
    assert find_gguf(str(both)) is None
    assert load_model(str(both)).dtype == torch.float32
    (both / "model.safetensors").unlink()
    assert find_gguf(str(both)).path.name == file.name


def test_a_projector_beside_the_model_is_passed_over(file: Path, tmp_path: Path):
    for name in ("model.gguf", "mmproj-model.gguf"):
        shutil.copy(file, tmp_path / name)
    assert find_gguf(str(tmp_path)).path.name == "model.gguf"


def test_several_files_are_named(file: Path, tmp_path: Path, tardis: Callable[..., Result]):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    assert_refused(tardis("inspect", tmp_path), "has several GGUF files (a.gguf, b.gguf); give one of them")


def test_parts_of_a_model_are_to_be_joined(file: Path, tmp_path: Path):
    for number in (1, 2):
        shutil.copy(file, tmp_path / f"tiny-0000{number}-of-00002.gguf")
    for name in (tmp_path, tmp_path / "tiny-00001-of-00002.gguf"):
        with pytest.raises(InvalidInputError, match="one part of a model in several files; join them first"):
            load_model(str(name))


def _as_projector(writer: gguf.GGUFWriter) -> None:
    writer.kv_data[0]["general.type"].value = "mmproj"


def _as_adapter(writer: gguf.GGUFWriter) -> None:
    writer.kv_data[0]["general.type"].value = "adapter"


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("clip", id, "is the vision projector of a model"),
        ("gpt2", _as_projector, "is the vision projector of a model"),
        ("gpt2", _as_adapter, "of the type 'adapter', and no model"),
        ("gpt2", lambda writer: writer.add_uint16("split.count", 2), "one part of a model"),
    ],
)
def test_what_is_no_whole_language_model_is_refused(
    architecture: str, change: Callable[[gguf.GGUFWriter], None], message: str, tmp_path: Path
):
    path = write_gguf(tmp_path / "file.gguf", change=change, architecture=architecture)
    with pytest.raises(InvalidInputError, match=message):
        load_model(str(path))


def test_an_architecture_that_transformers_cannot_read_is_named(tmp_path: Path):
    path = write_gguf(tmp_path / "file.gguf", architecture="mpt")
    with pytest.raises(UnsupportedModelError, match=r"of the architecture 'mpt'.*directory with safetensors"):
        load_model(str(path))


def test_weights_that_do_not_fit_the_metadata_are_refused(tmp_path: Path):
    def widen(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["gpt2.embedding_length"].value = 128

    path = write_gguf(tmp_path / "file.gguf", change=widen)
    with pytest.raises(CheckpointError, match=r"transformer.wte.weight is \[320, 64\], and .* ask for \[320, 128\]"):
        load_model(str(path))


def test_weights_that_transformers_cannot_write_out_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        raise NotImplementedError("Dequantization for NVFP4 is not yet implemented")

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(CheckpointError, match=r"transformers cannot load the weights of .*NVFP4.*another quantisation"):
        load_model(str(file))


def test_tensors_that_the_file_lacks_are_named(tmp_path: Path):
    path = write_gguf(tmp_path / "file.gguf", change=lambda writer: writer.tensors[0].pop("output_norm.weight"))
    with pytest.raises(CheckpointError, match=r"ln_f.weight"):
        load_model(str(path))


def test_a_truncated_file_is_refused_wherever_it_ends(file: Path, tmp_path: Path):
    content, path = file.read_bytes(), tmp_path / "cut.gguf"
    for size in (0, 3, 10, 30, 200, 5_000):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="is no GGUF file, or a damaged one"):
            load_model(str(path))
    path.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="is truncated"):
        load_model(str(path))


def test_a_file_of_another_kind_is_refused(tiny_text: Path, tmp_path: Path):
    path = shutil.copy(tiny_text, tmp_path / "text.gguf")
    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        load_model(str(path))
    with pytest.raises(InvalidInputError, match="there is no file"):
        load_model("nothing.gguf")


def test_weights_of_an_unknown_type_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf, "GGMLQuantizationType", [])
    reading._checked.cache_clear()
    with pytest.raises(CheckpointError, match="which the installed package gguf does not know"):
        load_model(str(file))


def test_without_the_package_the_error_says_how_to_install_it(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match=r"pip install 'tardis-llm\[gguf\]'"):
        load_model(str(file))
