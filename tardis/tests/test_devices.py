"""Commands compute on the device that is asked for, to the same numbers, and a model larger than it is folds there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, assert_refused
from filelock import FileLock
from folds import SETTINGS, text
from marks import long, mostly_long
from models import tiny_model

from tardis_llm import FoldConfig, fold
from tardis_llm.devices import device_named
from tardis_llm.errors import DeviceMemoryError, InvalidInputError
from tardis_llm.pipeline import fold as folding

MODELS, QUICK = ("gpt2", "llama", "gemma3_text"), "llama"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def printed(script: str, *arguments: str) -> Any:
    """What a script of tests prints, in a process of its own: torch keeps the device that it makes up."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def kept(path: Path, script: str, *arguments: str) -> Any:
    """What a script of tests prints, which one process of a run of the tests asks it for."""
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_text(json.dumps(printed(script, *arguments)), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quick(shared: Path) -> Any:
    """What tests/on_device.py finds with `QUICK`."""
    return kept(shared / "on-device.json", "on_device.py", QUICK)


@pytest.fixture(scope="module")
def commands(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What commands found on the CPU and on the device that tests make up, by their names."""
    folder = str(tmp_path_factory.mktemp("commands"))
    return kept(shared / "commands-on-device.json", "commands_on_device.py", folder)


def alike(one: Any, other: Any) -> bool:
    """Whether what two commands print is the same, but for the last digits of numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(each, other[key]) for key, each in one.items())
    if isinstance(one, list):
        return all(alike(*pair) for pair in zip(one, other, strict=True))
    return bool(other == (pytest.approx(one, rel=1e-5) if isinstance(one, float) else one))


@long
@pytest.mark.parametrize("config", ["plain", "stacked"])
@pytest.mark.parametrize("name", mostly_long(MODELS, [QUICK]))
def test_a_fold_on_another_device_is_the_same(name: str, config: str, quick: Any) -> None:
    found = quick if name == QUICK else printed("on_device.py", name)
    assert found["differing"][name][config] == []


@long
def test_one_block_at_a_time_is_on_the_device(quick: Any) -> None:
    assert quick["crowd"] == 1


@long
@pytest.mark.parametrize("mistake", ["tokens stay on the CPU", "numbers of bins are on the CPU"])
def test_tensors_that_stay_behind_are_found(mistake: str, quick: Any) -> None:
    assert "tensors of two devices" in quick["mistakes"][mistake]


@long
@pytest.mark.parametrize("name", ["eval", "eval of tasks", "generate", "generate, sampled"])
def test_a_command_finds_the_same_on_another_device(commands: Any, name: str) -> None:
    on_cpu, there = commands[name]
    assert there == on_cpu


@long
def test_compare_finds_the_same_on_another_device_by_every_kind_of_method(commands: Any) -> None:
    on_cpu, there = commands["compare"]
    assert len(on_cpu["rows"]) > 10
    assert alike(on_cpu, there)


def test_devices_by_name() -> None:
    assert device_named("cpu") == torch.device("cpu")
    assert device_named("auto").type in ("cpu", "cuda", "xpu")


@without_gpu
@pytest.mark.parametrize(
    ("name", "message"),
    [("cuda", "cannot compute on it here.*build of torch"), ("meta", "cannot compute"), ("gpu", "none of torch's")],
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"device is '{name}'.*{message}"):
        FoldConfig(device=name)


@without_gpu
@pytest.mark.parametrize(
    "command",
    [
        ("fold", "none", "-o", "out"),
        ("eval", "none", "--text", "none.txt"),
        ("generate", "none", "Once"),
        ("compare", "none", "-o", "out", "--text", "none.txt", "--eval-text", "none.txt"),
    ],
    ids=lambda command: command[0],
)
def test_commands_refuse_it_before_anything_is_read(
    tardis: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(tardis(*command, "--device", "cuda"), "device is 'cuda', and torch cannot compute on it here")
    assert not list(tmp_path.iterdir())


def test_a_full_memory_loses_no_layer_and_the_fold_goes_on_in_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    stock = folding._fold_layer

    def until_full(session: Any, site: Any, *others: Any) -> Any:
        if done and session.config.batch_tokens == SETTINGS.batch_tokens:
            raise torch.OutOfMemoryError("no room for 8 GiB")
        done.append(site.index)
        return stock(session, site, *others)

    monkeypatch.setattr(folding, "_fold_layer", until_full)
    settings = replace(SETTINGS, split="uniform")
    with pytest.raises(DeviceMemoryError, match=r"memory of cpu is full.*--batch-tokens.*--resume"):
        fold(tiny_model("gpt2"), text(), settings, work=tmp_path)
    report = fold(tiny_model("gpt2"), text(), replace(settings, batch_tokens=96), work=tmp_path, resume=True)
    assert done == [0, 1] and len(report.layers) == 2
    assert report.config["batch_tokens"] == 96
