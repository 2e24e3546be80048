"""`tardis serve` as a process of its own, with clients of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from engines import environment
from processes import free_port

from tardis_llm.integrations.vllm.lifeline import RUN_DIRECTORY
from tardis_llm.integrations.vllm.rundir import SHARED, segments_of

httpx = pytest.importorskip("httpx", reason="httpx is not installed; it comes with vLLM: make venv-vllm")

PROMPT = "In the beginning of the year the city"
FEW = ("--max-num-seqs", 64, "--enforce-eager")
START_SECONDS, STOP_SECONDS = 300, 60
LAUNCH = "tardis_llm.integrations.vllm.launch"


class Client(NamedTuple):
    """A running server and its log."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def post(self, **fields: Any) -> httpx.Response:
        body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def text(self, **fields: Any) -> str:
        answer = self.post(**fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def requests(self) -> float:
        """Requests that the engine has, running or waiting."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names))

    def assert_idle(self) -> None:
        deadline = time.monotonic() + 60
        while self.requests() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert self.requests() == 0


def start(directory: Path, log: Path, *options: object) -> Client:
    """`tardis serve` as a process of its own, not yet ready."""
    port = free_port()
    command = [sys.executable, "-m", "tardis_llm", "serve", directory, "--port", port, *options]
    variables = environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_LOGGING_LEVEL="INFO")
    with log.open("wb") as file:
        process = subprocess.Popen([*map(str, command)], stdout=file, stderr=file, env=variables)
    return Client(f"http://127.0.0.1:{port}", log, process)


def wait_for(client: Client, message: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while message not in client.log.read_text():
        assert client.process.poll() is None, client.log.read_text()[-3000:]
        assert time.monotonic() < deadline, client.log.read_text()[-3000:]
        time.sleep(0.2)


def processes_of(client: Client) -> list[str]:
    """Command lines of our command and of all in the session of vLLM's server, which names the port."""
    port = client.url.rpartition(":")[2]
    running = {process.pid: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    named = {pid for pid, command in running.items() if port in command}
    sessions = {_session(pid) for pid in named if LAUNCH in running[pid]}
    return [" ".join(command) for pid, command in running.items() if pid in named or _session(pid) in sessions]


def session_of(client: Client) -> list[int]:
    """The processes of vLLM that a running client's command has started."""
    (leader,) = (pid for pid in psutil.pids() if _parent(pid) == client.process.pid)
    return [pid for pid in psutil.pids() if _session(pid) == leader]


def shared_by(client: Client) -> list[Path]:
    """What a running server has of the machine beside processes: shared memory, and the directory of its sockets."""
    session = session_of(client)
    directory = psutil.Process(session[0]).environ()[RUN_DIRECTORY]
    return [Path(directory), *(SHARED / name for name in segments_of(session))]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:  # it has just ended
        return None


def _parent(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).ppid())
    except psutil.NoSuchProcess:
        return None


@contextmanager
def running(client: Client) -> Iterator[Client]:
    """Within the context the server is ready; at its end nothing of it is left."""
    try:
        wait_for(client, "ready:")
        files = shared_by(client)
        yield client
    finally:
        client.process.terminate()
        code = client.process.wait(STOP_SECONDS)
    assert code == 0, client.log.read_text()[-3000:]
    assert processes_of(client) == []
    assert not [file for file in files if file.exists()]


async def stream(http: httpx.AsyncClient, server: Client, **fields: Any) -> AsyncIterator[str]:
    """The parts of a text as they come."""
    body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0, "stream": True, **fields}
    async with http.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))["choices"][0]["text"]
