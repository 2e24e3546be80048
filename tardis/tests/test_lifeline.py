"""Processes of a server end with the command that started it, and what they share is cleared; without vLLM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import shared_memory
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from processes import alive, wait_until

import tardis_llm
from tardis_llm.integrations.vllm.lifeline import RUN_DIRECTORY
from tardis_llm.integrations.vllm.rundir import SHARED, RunDirectory, clear_dead, segments_of

#: a command whose server has an engine, started in one of multiprocessing's ways, and memory that both share
SCRIPT = f"""
import multiprocessing, os, subprocess, sys, time, types
from multiprocessing import shared_memory
from pathlib import Path
for name in ("tardis_llm", "tardis_llm.integrations", "tardis_llm.integrations.vllm"):  # the real ones take seconds
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(Path({str(Path(tardis_llm.__file__).parents[1])!r}, *name.split(".")))]
from tardis_llm.integrations.vllm import lifeline, rundir, session

def tell(*words):
    draft = Path(sys.argv[-1], f"draft-{{os.getpid()}}")
    draft.write_text(" ".join(words))
    draft.rename(Path(sys.argv[-1], str(os.getpid())))

def engine(name):
    lifeline.tie()  # as vLLM's plugins are loaded; a forked process has done so before
    memory = shared_memory.SharedMemory(name)
    tell()
    time.sleep(600)

def server(method):
    lifeline.tie()
    memory = shared_memory.SharedMemory(create=True, size=4096)
    process = multiprocessing.get_context(method).Process(target=engine, args=(memory.name,))
    process.start()
    tell(memory.name)
    process.join()

def command(method, under):
    directory = rundir.RunDirectory.create(Path(under))
    environment = {{**os.environ, lifeline.RUN_DIRECTORY: str(directory.path)}}
    process = subprocess.Popen(
        [sys.executable, __file__, "server", *sys.argv[2:]], start_new_session=True, env=environment
    )
    tell(str(directory.path))
    while True:
        directory.record(process.pid)
        time.sleep(0.05)

if __name__ == "__main__":
    server(sys.argv[2]) if sys.argv[1] == "server" else command(sys.argv[2], sys.argv[3])
"""


class Running(NamedTuple):
    """What runs, and what there is of it."""

    command: int
    server: int
    engine: int
    directory: Path
    memory: Path

    @property
    def pids(self) -> list[int]:
        return [self.command, self.server, self.engine]


@contextmanager
def running(method: str, under: Path) -> Iterator[Running]:
    """The script's command, with its server and engine running."""
    # a fork server has its socket there, whose name must be short
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        yield from _running(Path(scratch), method, under)


def _running(scratch: Path, method: str, under: Path) -> Iterator[Running]:
    (script := scratch / "script.py").write_text(SCRIPT)
    (told := scratch / "told").mkdir()
    variables = {**os.environ, "TMPDIR": str(scratch)}
    process = subprocess.Popen([sys.executable, script, "command", method, under, told], env=variables)
    try:
        wait_until(lambda: len(list(told.glob("[0-9]*"))) == 3)
        words = {int(each.name): each.read_text() for each in told.iterdir()}
        directory = Path(words.pop(process.pid))
        server, memory = next((pid, SHARED / word) for pid, word in words.items() if word)
        words.pop(server)
        found = Running(process.pid, server, *words, directory, memory)
        record = directory / "segments.json"
        wait_until(lambda: record.exists() and memory.name in record.read_text())
        yield found
    finally:
        process.kill()
        process.wait()


linux = pytest.mark.skipif(not SHARED.is_dir(), reason="named shared memory is no file here")


@linux
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_killing_the_command_ends_every_process_and_clears_what_they_shared(method: str, tmp_path: Path):
    with running(method, tmp_path) as server:
        session = [process.pid for process in psutil.process_iter() if sid(process.pid) == server.server]
        os.kill(server.server, signal.SIGSTOP)
        os.kill(server.command, signal.SIGKILL)
        wait_until(lambda: not alive(server.engine))  # by itself, not by the server that is stopped
        os.kill(server.server, signal.SIGCONT)
        wait_until(lambda: not any(map(alive, [*server.pids, *session])))
        assert not server.memory.exists()
        assert not server.directory.exists()


def sid(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@linux
def test_what_a_wholly_killed_server_left_is_cleared_and_a_living_ones_is_not(tmp_path: Path):
    with running("spawn", tmp_path) as dead, running("spawn", tmp_path) as living:
        assert clear_dead(tmp_path) == 0
        os.kill(dead.server, signal.SIGSTOP)  # so that it does not clear up itself
        for process in psutil.process_iter():
            if process.pid != dead.server and sid(process.pid) == dead.server:
                process.kill()
        os.kill(dead.command, signal.SIGKILL)
        os.kill(dead.server, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, dead.pids)))
        assert dead.memory.exists()
        assert dead.directory.exists()
        assert clear_dead(tmp_path) == 1
        assert not dead.memory.exists()
        assert not dead.directory.exists()
        assert living.memory.exists()
        assert living.directory.exists()
        assert all(map(alive, living.pids))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("cleared", [True, False])
def test_a_process_that_starts_after_its_command_has_ended_ends(cleared: bool, first: bool, tmp_path: Path):
    directory = RunDirectory.create(tmp_path)
    os.close(directory._lock)  # as if this process had ended
    directory._lock = None
    if cleared:
        directory.clear()
    (script := tmp_path / "script.py").write_text(SCRIPT)
    variables = {**os.environ, RUN_DIRECTORY: str(directory.path)}
    command = [sys.executable, script, "server", "spawn", tmp_path]
    done = subprocess.run(command, env=variables, timeout=20, start_new_session=first)
    assert done.returncode == -signal.SIGKILL
    assert directory.path.exists() == (not cleared and not first)


@linux
def test_shared_memory_that_a_living_process_has_is_not_cleared(tmp_path: Path):
    memory = shared_memory.SharedMemory(create=True, size=4096)
    try:
        assert memory.name in segments_of([os.getpid()])
        directory = RunDirectory.create(tmp_path)
        directory.record(os.getsid(0))
        directory.clear()
        assert (SHARED / memory.name).exists()
        assert not directory.path.exists()
    finally:
        memory.close()
        memory.unlink()


@linux
def test_a_name_that_has_gone_to_another_is_not_cleared(tmp_path: Path):
    memory = shared_memory.SharedMemory(create=True, size=4096)
    directory = RunDirectory.create(tmp_path)
    directory.record(os.getsid(0))
    memory.close()
    other = SHARED / f"{memory.name}.other"
    other.write_text("of another server")
    other.rename(SHARED / memory.name)
    try:
        directory.clear()
        assert (SHARED / memory.name).read_text() == "of another server"
    finally:
        memory.unlink()


def test_a_directory_of_another_kind_is_left_alone(tmp_path: Path):
    (tmp_path / "tardis-serve-draft").mkdir()  # without a lock it is none of a server's
    (tmp_path / "other").mkdir()
    assert clear_dead(tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 2
