"""Folds that are killed, stopped, started twice or started again: the bytes that come out are those of a whole one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK_TINY, Result, assert_refused
from folds import SETTINGS, folded_tiny, text
from marks import long
from models import LAYERS, tiny_model
from processes import skip_where_ignored

from tardis_llm import fold as fold_model
from tardis_llm.checkpoint.manifest import MANIFEST
from tardis_llm.checkpoint.saving import CONFIG
from tardis_llm.cli import stopping
from tardis_llm.cli.main import run
from tardis_llm.errors import InvalidInputError
from tardis_llm.pipeline import fold as pipeline
from tardis_llm.pipeline.workspace import FOLDER, LOCK, Workspace, discard, only_one

Tardis = Callable[..., Result]
KILLS = 3

#: processes that have imported TARDIS already, and are forked without threads
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["tardis_llm.cli.main"])


def run_alone(arguments: list[str], log: Path, pause: tuple[str, int] | None = None) -> None:
    """Run the command line in a process of its own, on one thread.

    Args:
        log: where its stderr goes.
        pause: stage of the fold and steps done, at which it waits to be stopped.
    """
    from tardis_llm.cli import output
    from tardis_llm.cli.main import run

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    if pause:
        bars = output.progress_bars

        def waiting(prefix: str = "") -> Any:
            return _pausing(bars(prefix), prefix, pause, log)

        output.progress_bars = waiting
    sys.exit(run(arguments))


class _pausing:  # noqa: N801 - stands for a function
    """Progress bars that write a file beside the log, and wait, once a stage has come so far."""

    def __init__(self, bars: Any, prefix: str, pause: tuple[str, int], log: Path) -> None:
        self.bars, self.prefix, self.pause, self.log = bars, prefix, pause, log

    def __enter__(self) -> Callable[..., None]:
        show = self.bars.__enter__()

        def step(stage: str, done: int, total: int) -> None:
            show(stage, done, total)
            if (self.prefix + stage, done) == self.pause:
                self.log.with_suffix(".paused").touch()
                time.sleep(60)

        return step

    def __exit__(self, *error: Any) -> Any:
        return self.bars.__exit__(*error)


@pytest.fixture
def start(tiny_dir: Path, tiny_text: Path, tmp_path: Path) -> Iterator[Callable[..., ForkServerProcess]]:
    """Start a fold of the tiny model into tmp_path/out in a process of its own."""
    started: list[ForkServerProcess] = []
    ready = server.Process(target=int)  # the first one waits for the imports
    ready.start()
    ready.join()

    def call(*args: str, out: Path = tmp_path / "out", **options: Any) -> ForkServerProcess:
        arguments = ["fold", str(tiny_dir), "-o", str(out), "--text", str(tiny_text), *QUICK_TINY, *args]
        process = server.Process(target=run_alone, args=(arguments, tmp_path / "log"), kwargs=options)
        process.start()
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def whole(tiny_dir: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fold that was not interrupted, on one thread as those in processes of their own."""
    directory, threads = tmp_path_factory.mktemp("whole") / "out", torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(["fold", str(tiny_dir), "-o", str(directory), "--text", str(tiny_text), *QUICK_TINY]) == 0
    torch.set_num_threads(threads)
    return directory


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished fold, where `fold` writes to."""
    return shutil.copytree(whole, tmp_path / "out")


def finished(process: ForkServerProcess) -> int | None:
    process.join(60)
    return process.exitcode


def await_pause(tmp_path: Path, process: ForkServerProcess) -> None:
    while not (tmp_path / "log.paused").exists():
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.01)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@long
def test_a_fold_killed_at_random_moments_resumes_to_the_same_bytes(
    start: Callable[..., ForkServerProcess], whole: Path, tmp_path: Path
):
    seconds, kills, moments, expected = 2.0, 0, random.Random(0), contents(whole)
    while kills < KILLS:
        process = start("--resume")
        process.join(moments.uniform(0.1, 0.9) * seconds)
        if process.is_alive():
            process.kill()
            kills += finished(process) == -signal.SIGKILL
        else:  # it was quicker: kill one from the beginning on
            assert contents(tmp_path / "out") == expected, (tmp_path / "log").read_text()
            shutil.rmtree(tmp_path / "out")
            seconds *= 0.7
    assert finished(start("--resume")) == 0, (tmp_path / "log").read_text()
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 129, marks=long)])
def test_a_fold_that_is_asked_to_end_says_how_to_go_on(
    start: Callable[..., ForkServerProcess], tmp_path: Path, number: signal.Signals, code: int
):
    skip_where_ignored(number)
    process = start(pause=("folding layers", 1))
    await_pause(tmp_path, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert finished(process) == code
    said = " ".join((tmp_path / "log").read_text().split())
    assert "interrupted. Finished layers are kept: run the same command with --resume" in said
    assert "Traceback" not in said
    kept = sorted(path.name for path in (tmp_path / "out" / FOLDER).iterdir())
    assert [name for name in kept if name.endswith(".safetensors")] == ["layer-0000.safetensors"]
    assert not [name for name in kept if name.startswith("scratch-")]


def test_what_the_process_was_told_to_ignore_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.stoppable(lambda: ""):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_handlers_of_signals_are_put_back():
    former = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SystemExit) as ended, stopping.stoppable(lambda: ""):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert ended.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == former


def test_two_folds_at_a_time_into_one_directory_are_one_too_many(
    start: Callable[..., ForkServerProcess], fold: Callable[..., Result], tmp_path: Path
):
    process = start(pause=("folding layers", 1))
    await_pause(tmp_path, process)
    for arguments in ((), ("--resume",), ("--force",)):
        assert_refused(fold(*arguments), "another process is folding into")
    assert process.is_alive()
    process.kill()
    finished(process)
    assert (tmp_path / "out" / LOCK).exists()
    assert fold("--resume").code == 0
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_folder_is_held_once(tmp_path: Path):
    with only_one(tmp_path), pytest.raises(InvalidInputError, match="another process"), only_one(tmp_path):
        pass
    with only_one(tmp_path), only_one(tmp_path / "below"):
        pass
    with Workspace.open(tmp_path, {}, False), pytest.raises(InvalidInputError, match="another process"):
        fold_model(tiny_model("gpt2"), text(), SETTINGS, tmp_path, resume=True)


def test_a_finished_fold_is_complete(fold: Callable[..., Result], out: Path):
    before = contents(out)
    result = fold("--resume")
    assert result.code == 0
    assert "is complete: this fold was finished there" in " ".join(result.err.split())
    assert json.loads(fold("--resume", "--json").out)["output"] == str(out)
    assert fold("--resume", "--force").code == 0
    assert contents(out) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reduction", "0.4"), "config.reduction was 0.5 and is now 0.4"),
        (("--tokens", "2048"), "calibration.text_sha256 was"),
        (("--dtype", "bfloat16"), "calibration.model_sha256 was"),
    ],
)
def test_a_finished_fold_of_something_else_is_not_complete(
    fold: Callable[..., Result], out: Path, arguments: tuple[str, ...], message: str
):
    before = contents(out)
    result = fold("--resume", *arguments)
    assert_refused(result, "holds a finished fold, and a different one")
    assert message in result.err
    assert_refused(fold(), "is not empty")
    assert contents(out) == before


def test_a_finished_fold_with_damaged_files_is_not_complete(fold: Callable[..., Result], out: Path):
    (out / "model.safetensors").write_bytes(b"")
    assert_refused(fold("--resume"), "model.safetensors is missing, truncated or damaged")


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@long
def test_layers_of_a_finished_fold_are_cleared_and_those_of_another_stay(
    fold: Callable[..., Result], tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr("tardis_llm.cli.fold.discard", lambda _: None)  # as if it had been killed there
        assert fold("--force").code == 0
    assert (out / FOLDER).is_dir()
    assert fold("--resume").code == 0
    assert not (out / FOLDER).exists()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_fold_layer", interrupted)
        assert fold("--force", "--reduction", "0.4").code == 130
        assert "is complete" in fold("--resume").err
        assert (out / FOLDER).is_dir()
        assert fold("--resume", "--reduction", "0.4").code == 130  # and goes on


def test_a_fold_interrupted_while_it_is_published_is_refused_and_resumes(
    fold: Callable[..., Result], tardis: Tardis, out: Path
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tardis_llm.checkpoint.saving._move", interrupted)
        assert fold("--force", "--reduction", "0.4").code == 130
    assert not (out / CONFIG).exists()
    assert_refused(tardis("generate", out, "Hello"), "was interrupted, and the model there is not complete")
    assert fold("--resume", "--reduction", "0.4").code == 0
    assert json.loads((out / MANIFEST).read_text())["report"]["config"]["reduction"] == 0.4


class Killed(BaseException):
    """Stands in for the end of the process."""


@long
def test_layers_whose_fold_is_not_known_are_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected, _ = folded_tiny("gpt2")
    fold_model(tiny_model("gpt2", seed=1), text(), SETTINGS, tmp_path / "kept")
    entries = len(list((tmp_path / "kept").iterdir()))
    assert entries == 2 + 2 * LAYERS  # state, plan, and two for each layer
    for moment in range(entries + 1):
        work = shutil.copytree(tmp_path / "kept", tmp_path / str(moment))
        with monkeypatch.context() as patch:
            kill_at_unlink(moment, patch)
            with pytest.raises(Killed) if moment < entries else nullcontext():
                discard(work)
        stateless = not (work / "state.json").exists()
        assert stateless == (moment == entries)
        assert work.exists() == (moment < entries)
    for moment in range(entries):  # without the state, as folds of old may have left it
        work = tmp_path / str(moment)
        (work / "state.json").unlink()
        (work / "notes.txt").write_text("mine")
    work = tmp_path / "3"
    model = tiny_model("gpt2")
    fold_model(model, text(), SETTINGS, work)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
    assert (work / "notes.txt").read_text() == "mine"


def kill_at_unlink(moment: int, patch: pytest.MonkeyPatch) -> None:
    real, left = os.unlink, [moment]

    def unlink(*args: Any, **options: Any) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        real(*args, **options)

    patch.setattr(os, "unlink", unlink)
