"""`tardis serve`: what it refuses before a server is started, with and without vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, assert_refused


def test_a_dense_model_is_refused(tardis: Callable[..., Result], tiny_dir: Path):
    assert_refused(tardis("serve", tiny_dir), "is not folded: fold it with `tardis fold`")


def test_a_missing_directory_is_refused(tardis: Callable[..., Result]):
    assert_refused(tardis("serve", "./nothing"), "there is no directory")


def test_a_missing_weight_file_is_named(tardis: Callable[..., Result], sample_folded: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((sample_folded / "config.json").read_bytes())
    assert_refused(tardis("serve", tmp_path), "has no weights")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_how_to_install_it(tardis: Callable[..., Result], sample_folded: Path):
    assert_refused(tardis("serve", sample_folded), "`make venv-vllm`")
