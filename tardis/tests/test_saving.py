"""Saving a fold: sizes of files, settings that transformers would not save, and what a stop at any moment leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, assert_refused
from folds import SETTINGS as FOLDING
from folds import folded_tiny, logits, text
from marks import mostly_long
from models import END, LAYERS, tiny_model, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from tardis_llm import fold as fold_model
from tardis_llm.checkpoint.folded import save_folded
from tardis_llm.checkpoint.loading import load_model
from tardis_llm.checkpoint.saving import STAGING, publish, shard_bytes
from tardis_llm.errors import CheckpointError, InvalidInputError
from tardis_llm.evaluation.generation import generate
from tardis_llm.runtime.placing import folded_ffns

Tardis = Callable[..., Result]

#: settings of a generation_config.json that are well-formed and yet stop transformers at saving, or at generating
SETTINGS = [
    {"temperature": 0.9},
    {"top_p": 0.6},
    {"top_k": 10},
    {"early_stopping": True},
    {"length_penalty": 2.0},
    {"pad_token_id": -1},
    {"stop_strings": ["User:"]},
    {"return_dict_in_generate": True},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"forced_eos_token_id": 5_000},
    {"eos_token_id": "end"},
    {"bad_words_ids": []},
    {"repetition_penalty": -1.0},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"token_healing": True},
]
#: what transformers does not load
UNUSABLE = [{"max_new_tokens": 0}, {"num_return_sequences": 2}, {"early_stopping": "sometimes"}, [], None]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *(("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("200kb", 200_000), ("1 TB", 10**12), (" 1.5GB ", 15 * 10**8)),
        *(("5GiB", 5 * 2**30), ("1MiB", 2**20), ("2000000000", 2 * 10**9), (123, 123)),
    ],
)
def test_sizes_of_files_are_read_as_transformers_reads_them_and_more(size: str | int, expected: int):
    assert shard_bytes(size) == expected


@pytest.mark.parametrize("size", ["5XB", "", "GB", "-5GB", "0GB", "1e9", "five", "0.1"])
def test_other_sizes_are_refused(size: str):
    with pytest.raises(InvalidInputError, match="give a size such as 5GB, 500MB, 5GiB or 2000000000"):
        shard_bytes(size)


@pytest.fixture
def no_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding fails: what has to be refused is refused before."""

    def started(*_: object) -> None:
        raise AssertionError("folding has begun")

    monkeypatch.setattr("tardis_llm.cli.fold._fold_and_check", started)


class Unsavable:
    """A tokenizer that works and cannot be saved."""

    def __init__(self) -> None:
        self._tokenizer = tiny_tokenizer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def save_pretrained(self, directory: str) -> None:
        raise ValueError("no vocabulary file")


@pytest.mark.usefixtures("no_fold")
def test_a_wrong_size_is_refused_before_anything_is_folded(fold: Callable[..., Result], tmp_path: Path):
    assert_refused(fold("--max-shard-size", "5XB"), "max_shard_size is '5XB'")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_fold")
def test_a_tokenizer_that_cannot_be_saved_is_found_before_anything_is_folded(
    fold: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tardis_llm.cli.fold.load_tokenizer", lambda _: Unsavable())
    assert_refused(fold(), "the tokenizer of this model cannot be saved (no vocabulary file)")


@pytest.mark.usefixtures("no_fold")
@pytest.mark.parametrize("arguments", [("--reduction", "0.95"), ("--layers", "7"), ("--fold-dtype", "bf16")])
def test_settings_that_cannot_be_met_are_refused_before_the_dense_model_is_measured(
    fold: Callable[..., Result], arguments: tuple[str, ...]
):
    assert "error:" in fold(*arguments).err


def test_a_tokenizer_that_fails_at_the_end_does_not_cost_the_fold(tmp_path: Path):
    model, report = folded_tiny("gpt2")
    with pytest.warns(UserWarning, match="tokenizer could not be saved"):
        save_folded(model, report, tmp_path, Unsavable())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def with_settings(source: Path, directory: Path, settings: object) -> Path:
    """A copy of a model with these settings in its generation_config.json."""
    shutil.copytree(source, directory)
    path = directory / "generation_config.json"
    whole = {**json.loads(path.read_text()), **settings} if isinstance(settings, dict) else settings
    path.write_text(json.dumps(whole))
    return directory


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_of_generation_neither_stop_saving_nor_generating(
    settings: dict, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dense = load_model(str(with_settings(tiny_dir, tmp_path / "dense", settings)))
    plain = load_model(str(tiny_dir))
    assert continued(dense) == continued(plain)
    model, report = folded_tiny("gpt2")
    given = dense.generation_config
    monkeypatch.setattr(model, "generation_config", given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_folded(model, report, tmp_path / "out")
    assert model.generation_config is given
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert all(written[name] == value for name, value in settings.items())
    assert continued(load_model(str(tmp_path / "out"))) == continued(model)


def continued(model: PreTrainedModel) -> str:
    return generate(model, tiny_tokenizer(), tokens(1, 8), 6)


@pytest.mark.parametrize("settings", UNUSABLE, ids=str)
def test_settings_that_transformers_does_not_load_are_left_out_with_a_warning(
    settings: object, tiny_dir: Path, tmp_path: Path
):
    directory = with_settings(tiny_dir, tmp_path / "dense", settings)
    with pytest.warns(UserWarning, match=r"generation_config\.json of .* cannot be used"):
        model = load_model(str(directory))
    assert continued(model) == continued(load_model(str(tiny_dir)))


def test_wrong_settings_are_saved_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, report = folded_tiny("gpt2")
    monkeypatch.setattr(model, "generation_config", GenerationConfig(temperature=0.9))
    with pytest.warns(UserWarning, match=r"generation_config\.json has settings that transformers finds wrong"):
        save_folded(model, report, tmp_path)


@pytest.mark.parametrize(
    "settings",
    mostly_long(
        [{"stop_strings": ["User:"], "temperature": 0.9}, {"num_return_sequences": 2}], [{"num_return_sequences": 2}]
    ),
)
def test_a_fold_ends_well_whatever_is_set_for_generation(
    fold: Callable[..., Result], tardis: Tardis, settings: dict, tiny_dir: Path, tmp_path: Path
):
    directory = with_settings(tiny_dir, tmp_path / "dense", settings)
    result = fold("--max-shard-size", "5GiB", model=directory)
    assert result.code == 0
    assert "sample: " in result.out
    assert "warning: the" in result.err
    assert tardis("generate", tmp_path / "out", "Hello", "--max-new-tokens", 2).code == 0


def test_a_sample_that_fails_does_not_decide(
    fold: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object) -> None:
        raise RuntimeError("no sample today")

    monkeypatch.setattr("tardis_llm.cli.fold.generate", fails)
    result = fold()
    assert result.code == 0
    assert "no sample of text could be generated (RuntimeError: no sample today)" in result.err
    assert len(folded_ffns(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) == LAYERS


def test_a_text_ends_where_the_settings_of_the_model_say():
    model = tiny_model("gpt2", blocks=3)  # whose text begins with a whole character
    first = continued(model)[:1]
    model.generation_config = GenerationConfig(eos_token_id=[END, tiny_tokenizer().encode(first)[0]])
    assert continued(model) in ("", first)  # the end itself is a word here
    model.generation_config = GenerationConfig(eos_token_id=END, stop_strings=[first])
    assert continued(model) == first


# Old and new: every way in which one checkpoint can take the place of another.


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of different models: dense and folded, in one file, in shards, and as loaders of old had it."""
    root = tmp_path_factory.mktemp("checkpoints")
    for seed, size in enumerate(("1GB", "100KB")):
        tiny_model("gpt2", seed=seed).save_pretrained(root / f"dense-{size}", max_shard_size=size)
        model = tiny_model("gpt2", seed=10 + seed)
        save_folded(model, fold_model(model, text(), FOLDING), root / f"folded-{size}", tiny_tokenizer(), size)
    old = shutil.copytree(root / "dense-1GB", root / "dense-bin")
    (old / "model.safetensors").unlink()
    torch.save(tiny_model("gpt2", seed=20).state_dict(), old / "pytorch_model.bin")
    for name in ("tf_model.h5", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"):
        (old / name).write_text("old")
    (old / "chat_template.jinja").write_text("of another model")
    (old / "notes.txt").write_text("mine")
    return {path.name: path for path in sorted(root.iterdir())}


PAIRS = [
    *(("folded-1GB", "folded-100KB"), ("folded-100KB", "folded-1GB"), ("dense-1GB", "folded-100KB")),
    *(("dense-100KB", "folded-1GB"), ("dense-bin", "folded-1GB"), ("dense-bin", "folded-100KB")),
]
pairs = pytest.mark.parametrize(("old", "new"), PAIRS)


def staged(checkpoints: dict[str, Path], old: str, new: str, directory: Path) -> Path:
    """A directory with an old checkpoint, and a new one ready to be published."""
    shutil.copytree(checkpoints[old], directory)
    shutil.copytree(checkpoints[new], directory / STAGING)
    return directory / STAGING


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pairs
def test_a_new_checkpoint_is_alone_in_its_directory(checkpoints: dict[str, Path], old: str, new: str, tmp_path: Path):
    directory = tmp_path / "out"
    staging = staged(checkpoints, old, new, directory)
    publish(staging, directory)
    staging.rmdir()
    assert names(directory) - {"notes.txt"} == names(checkpoints[new])
    assert (directory / "notes.txt").exists() == (old == "dense-bin")
    assert torch.equal(logits(load_model(str(directory))), logits(load_model(str(checkpoints[new]))))


class Killed(BaseException):
    """Stands in for the end of the process."""


@contextmanager
def killed_at(moment: int) -> Iterator[None]:
    """Within the context, the process ends before it changes a name for the `moment`-th time."""
    with pytest.MonkeyPatch.context() as patch:
        left = [moment]

        def until_killed(change: Callable[..., Any], *args: Any, **options: Any) -> Any:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return change(*args, **options)

        for name in ("replace", "unlink", "rename", "rmdir"):
            patch.setattr(os, name, partial(until_killed, getattr(os, name)))
        yield


@pairs
def test_a_process_killed_at_any_moment_leaves_the_old_the_new_or_a_refusal(
    checkpoints: dict[str, Path], old: str, new: str, tmp_path: Path
):
    expected = {name: logits(load_model(str(checkpoints[name]))) for name in (old, new)}
    seen = []
    for moment in range(100):
        directory = tmp_path / str(moment)
        staging = staged(checkpoints, old, new, directory)
        try:
            with killed_at(moment):
                publish(staging, directory)
        except Killed:
            seen.append(state(directory, expected))
        else:
            break
    assert seen[0] == old
    assert set(seen[1:]) == {"refused"}
    assert state(directory, expected) == new


def state(directory: Path, expected: dict[str, torch.Tensor]) -> str:
    """Which of the checkpoints a directory holds, or that it is refused; anything else is an error."""
    try:
        found = logits(load_model(str(directory)))
    except CheckpointError as error:
        assert "was interrupted" in str(error)
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            AutoModelForCausalLM.from_pretrained(directory)
        return "refused"
    [name] = [name for name, value in expected.items() if torch.equal(found, value)]
    return name


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = tmp_path / "out"
    shutil.copytree(checkpoints["folded-100KB"], directory)
    monkeypatch.setattr(
        "tardis_llm.checkpoint.folded.write_manifest", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    model, report = folded_tiny("gpt2")
    with pytest.raises(OSError, match="full"):
        save_folded(model, report, directory)
    assert names(directory) == names(checkpoints["folded-100KB"])


@pytest.mark.parametrize(("number", "saves"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_sync_folders_is_no_reason_to_lose_a_fold(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, saves: bool
):
    staging = staged(checkpoints, "folded-1GB", "folded-100KB", tmp_path / "out")

    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if saves else pytest.raises(OSError, match=os.strerror(number)):
        publish(staging, tmp_path / "out")
    left = checkpoints["folded-100KB" if saves else "folded-1GB"]
    assert (tmp_path / "out" / "config.json").read_bytes() == (left / "config.json").read_bytes()


def test_a_fold_into_a_folder_of_the_model_leaves_both_whole(
    fold: Callable[..., Result], tiny_dir: Path, tmp_path: Path
):
    source = shutil.copytree(tiny_dir, tmp_path / "model")
    assert fold(model=source, out=source / "folded").code == 0
    assert torch.equal(logits(load_model(str(source))), logits(load_model(str(tiny_dir))))
    assert len(folded_ffns(load_model(str(source / "folded")))) == LAYERS


def test_the_model_is_not_overwritten_through_a_link(fold: Callable[..., Result], tiny_dir: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(tiny_dir)
    assert_refused(fold("--force", out=tmp_path / "link"), "holds the model to fold itself")
