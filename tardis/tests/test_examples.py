"""Every function and class that the API reference shows has an example, and the examples are right."""

from __future__ import annotations

import doctest
import inspect
import re
import shutil
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import torch
from models import tiny_model, tiny_tokenizer, tokens

import tardis_llm
from tardis_llm import FoldConfig, fold, sample, save_folded

REFERENCE = Path(__file__).parents[2] / "docs/reference/tardis.md"
ITEM = '{"good": "The text is here.", "bad": "The text are here."}\n'
SHOWN = re.findall(r"^::: (tardis_llm\S+)$", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)
SHOWN.remove("tardis_llm.errors")  # a whole module: its classes are raised, not called


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples find around them: notes.txt, a dense model, its fold, and the items of a task."""
    place = tmp_path_factory.mktemp("examples")
    (place / "notes.txt").write_text(sample.calibration_text().read_text(encoding="utf-8")[:8_000], encoding="utf-8")
    (place / "tasks").mkdir()
    (place / "tasks/blimp.jsonl").write_text(ITEM * 8, encoding="utf-8")
    model = tiny_model("gpt2", blocks=2)
    model.save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    save_folded(
        model,
        fold(model, tokens(40, 32), FoldConfig(reduction=0.5, predictor_bits=1)),
        place / "folded",
        tiny_tokenizer(),
    )
    return place


@pytest.fixture
def names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What examples may use without making it, in a copy of the folder."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    ready = {"model": tiny_model("gpt2", blocks=2), "tokenizer": tiny_tokenizer(), "windows": tokens(40, 32)}
    return {**ready, "torch": torch, "Path": Path}


def test_the_reference_shows_all_that_the_package_exports() -> None:
    assert {f"tardis_llm.{name}" for name in tardis_llm.__all__} <= set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_the_example_is_right(name: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    shown = locate(name)
    assert shown is not None, f"{REFERENCE.name} shows {name}, which is not there"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    (found,) = doctest.DocTestFinder(recurse=False).find(shown, name, inspect.getmodule(shown), extraglobs=names)
    assert found.examples, f"{name} has no example"
    runner.run(found)
    assert not runner.failures, capsys.readouterr().out
