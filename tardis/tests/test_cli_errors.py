"""The command line on wrong input and on a full disk: one clear line on stderr, and nothing of the user's lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Result, assert_refused
from marks import long
from models import LAYERS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from tardis_llm.checkpoint.folded import holds_fold
from tardis_llm.runtime.placing import folded_ffns

Tardis = Callable[..., Result]


def test_a_model_with_experts_is_refused_as_such(fold: Callable[..., Result], tmp_path: Path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=8)).save_pretrained(
        tmp_path / "mixtral"
    )
    assert_refused(fold(model=tmp_path / "mixtral"), "'mixtral' has experts, and mixtures of experts cannot be folded")


def test_folding_without_text_says_what_text_to_give(tardis: Tardis, tiny_dir: Path, tmp_path: Path):
    assert_refused(tardis("fold", tiny_dir, "-o", tmp_path / "out"), "give --text FILE")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "calibration text is empty"),
        (b"Hello", "less than two windows of 32"),
        (b"Hello " * 30, "too few for a model of width 64"),
        ("Zürich".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_text_that_is_empty_short_or_no_text_is_refused(
    fold: Callable[..., Result], tmp_path: Path, content: bytes, message: str
):
    (tmp_path / "text.txt").write_bytes(content)
    assert_refused(fold(text=tmp_path / "text.txt"), message)


def test_text_that_is_not_there_is_refused(fold: Callable[..., Result], tmp_path: Path):
    assert_refused(fold(text=tmp_path / "nothing.txt"), "no text file")


def test_a_missing_tokenizer_is_refused(fold: Callable[..., Result], tiny_dir: Path, tmp_path: Path):
    bare = shutil.copytree(tiny_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert_refused(fold(model=bare), "has no tokenizer")


def test_weights_with_nan_are_refused(fold: Callable[..., Result], tiny_dir: Path, tmp_path: Path):
    model = tiny_model("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data[3, 5] = torch.nan
    broken = shutil.copytree(tiny_dir, tmp_path / "broken")
    model.save_pretrained(broken)
    assert_refused(fold(model=broken), "NaN or infinite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reduction", "1.2"), "reduction is 1.2; give a number between 0 and 1"),
        (("--reduction", "0"), "reduction is 0.0; give"),
        (("--reduction", "0.95"), "a reduction of 0.95 is not feasible: with nothing fixed at all the largest is 0.8"),
        (("--predictor-bits", "5"), "predictor_bits is 5"),
        (("--sequence-length", "500"), "choose from 2 to 128"),
        (("--layers", "0,x"), "--layers is '0,x'; give numbers such as 0,1,5"),
        (("--layers", "7"), "choose from 0 to 1"),
        (("--dtype", "int8"), "give one of float32, bfloat16, float16"),
    ],
)
def test_settings_out_of_range_are_refused(
    fold: Callable[..., Result], tmp_path: Path, arguments: tuple[str, ...], message: str
):
    assert_refused(fold(*arguments), message)
    assert not (tmp_path / "out").exists()


def test_wrong_usage_is_refused(tardis: Tardis, tiny_dir: Path, tmp_path: Path):
    assert tardis("fold", tiny_dir).code == 2
    assert tardis("fold", tiny_dir, "-o", tmp_path, "--policy", "nonsense").code == 2


def test_a_folded_model_is_not_folded_again(fold: Callable[..., Result], sample_folded: Path):
    assert_refused(fold(model=sample_folded), "is folded already")


def test_an_output_below_a_file_is_refused(fold: Callable[..., Result], tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    assert_refused(fold(out=tmp_path / "file" / "out"), "is no directory. Choose another -o")
    assert_refused(fold(out=tmp_path / "file"), "is no directory. Choose another -o")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission_is_refused(fold: Callable[..., Result], tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_refused(fold(out=tmp_path / "locked" / "out"), "no permission")


def test_an_output_in_use_is_refused_and_forcing_deletes_nothing(fold: Callable[..., Result], tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert_refused(fold(), "is not empty (it holds notes.txt)")
    assert fold("--force").code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert holds_fold(out)


def test_the_model_is_never_overwritten_by_its_fold(fold: Callable[..., Result], tiny_dir: Path):
    assert_refused(fold("--force", out=tiny_dir), "holds the model to fold itself")


def test_the_demo_leaves_a_directory_of_others_alone(tardis: Tardis, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(tardis("demo", "-o", tmp_path), "not from a demo; choose another directory")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_eval_refuses_text_that_is_missing_or_short(tardis: Tardis, tiny_dir: Path, tmp_path: Path):
    assert_refused(tardis("eval", tiny_dir, "--text", tmp_path / "nothing.txt"), "no text file")
    (tmp_path / "short.txt").write_text("Hello")
    assert_refused(tardis("eval", tiny_dir, "--text", tmp_path / "short.txt"), "less than two windows of 128")


def test_inspect_refuses_what_it_cannot_draw(tardis: Tardis, tiny_dir: Path, sample_folded: Path, tmp_path: Path):
    assert_refused(tardis("inspect", tiny_dir, "--plot", tmp_path / "a.png"), "needs text to measure on")
    assert_refused(tardis("inspect", sample_folded, "--text", "a.txt"), "to measure on a text: tardis eval")
    (tmp_path / "file").write_text("mine")
    assert_refused(tardis("inspect", sample_folded, "--plot", tmp_path / "file" / "a.png"), "is no directory")
    for place in (tmp_path, tmp_path / "a.docx"):
        assert_refused(tardis("inspect", sample_folded, "--plot", place), "no picture can be drawn to")


def test_generate_refuses_an_empty_prompt_and_an_encoder(tardis: Tardis, tiny_dir: Path, tmp_path: Path):
    assert_refused(tardis("generate", tiny_dir, " "), "the prompt is empty")
    tiny_model("bert").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert_refused(tardis("generate", tmp_path, "Hello"), "is an encoder")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs of a given size, or change its size."""
    directory = tmp_path / "disk"
    directory.mkdir()

    def resize(size: str) -> Path:
        options = f"size={size}" if not os.path.ismount(directory) else f"remount,size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"mounting a tmpfs is not permitted here: {error}")
        return directory

    yield resize
    if os.path.ismount(directory):
        subprocess.run(["umount", str(directory)], check=True)


def test_too_little_space_is_found_before_the_work_starts(
    fold: Callable[..., Result], small_disk: Callable[[str], Path]
):
    result = fold(out=small_disk("512k") / "out")
    assert_refused(result, "512.00 KiB free, and this fold needs about")
    assert "Free space, or choose another -o" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((), marks=long),
        ("--fold-dtype", "int8", "--fallback", "int8"),
        pytest.param(("--memory-limit", "0"), marks=long),
    ],
)
def test_the_space_asked_for_is_what_the_fold_takes(
    fold: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
):
    with monkeypatch.context() as patch:
        patch.setattr("tardis_llm.cli.fold.discard", lambda _: None)
        assert fold(*arguments, out=tmp_path / "whole").code == 0
    taken = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*.safetensors"))
    if "--memory-limit" in arguments:
        # tokens x width x float32: hidden states and inputs, dense and folded, and outputs
        taken += 4_096 * 64 * 4 * 5
    monkeypatch.setattr("tardis_llm.cli.fold._fold_and_check", interrupted)
    for share, code in ((0.9, 1), (1.1, 130)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=share * taken: SimpleNamespace(free=free))
        assert fold(*arguments, out=tmp_path / str(share)).code == code


def interrupted(*_: object) -> None:
    """Folding has begun."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("size", ["32k", "512k"])  # full at the first layers; full at the checkpoint
def test_a_disk_that_fills_up_is_named_and_the_fold_resumes_when_there_is_space(
    fold: Callable[..., Result], small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, size: str
):
    out = small_disk(size) / "out"
    with monkeypatch.context() as patch:
        patch.setattr("tardis_llm.cli.fold.check_space", lambda *_: None)  # something else filled it meanwhile
        result = fold(out=out)
    assert_refused(result, "the disk is full")
    assert "Free space and run again: `tardis fold` with --resume" in " ".join(result.err.split())
    assert not holds_fold(out)
    small_disk("8m")
    assert fold("--resume", out=out).code == 0
    assert len(folded_ffns(AutoModelForCausalLM.from_pretrained(out))) == LAYERS
