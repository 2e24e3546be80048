"""`tardis serve`: the API, and what careless, broken and hostile clients do to it."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import needs_vllm, save_tiny
from processes import alive, wait_until
from served import (
    FEW,
    PROMPT,
    START_SECONDS,
    STOP_SECONDS,
    Client,
    httpx,
    processes_of,
    running,
    session_of,
    shared_by,
    start,
    stream,
    wait_for,
)

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def server(sample_folded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The folded sample, in float32 and all folded: greedy text depends on no rounding and on no other request."""
    log = tmp_path_factory.mktemp("server") / "log"
    with running(start(sample_folded, log, "--dtype", "float32", *FEW, "--prefill", "folded")) as client:
        yield client


def test_ready_is_said_with_the_address(server: Client):
    assert f"ready: {server.url}/v1" in server.log.read_text()


def generated(directory: Path, prompt: str, *options: str) -> str:
    """What `tardis generate` writes behind a prompt."""
    command = [sys.executable, "-m", "tardis_llm", "generate", str(directory), prompt, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return str(json.loads(done.stdout)["text"])


def test_greedy_text_is_that_of_tardis_generate_all_folded(server: Client, sample_folded: Path):
    options = ("--dtype", "float32", "--max-new-tokens", "48", "--prefill", "folded")
    assert server.text(max_tokens=48) == generated(sample_folded, PROMPT, *options)


def test_the_commands_of_the_tutorial_give_the_same_text(sample_folded: Path, tmp_path: Path):
    serve, curl, generate = tutorial_commands()
    options = [option for option in shlex.split(serve)[4:] if option not in ("--port", "8000")]
    body = json.loads(shlex.split(curl)[-1])
    command = shlex.split(generate)
    long = " ".join([PROMPT] * 5)  # more tokens than are folded at once
    with running(start(sample_folded, tmp_path / "log", *options, *FEW)) as client:
        for prompt in (body["prompt"], long):
            answer = httpx.post(f"{client.url}/v1/completions", json={**body, "prompt": prompt}, timeout=120)
            assert answer.json()["choices"][0]["text"] == generated(sample_folded, prompt, *command[4:])
    assert command[3] == body["prompt"]


def tutorial_commands() -> list[str]:
    """The commands to serve, to ask the server, and to generate without it."""
    page = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = page.split("## Serve it")[1].split("```console\n")[1:]
    return [block.split("```")[0].replace("\\\n", " ").strip() for block in blocks]


def test_a_stream_has_the_text_of_the_whole_answer(server: Client):
    async def read() -> str:
        async with httpx.AsyncClient(timeout=120) as http:
            return "".join([part async for part in stream(http, server)])

    assert asyncio.run(read()) == server.text()


def test_200_streams_at_once_each_get_their_text(server: Client):
    prompts = [PROMPT, "The river", "He was born in", "A small town"]
    expected = {prompt: server.text(prompt=prompt, max_tokens=16) for prompt in prompts}

    async def read_all() -> list[str]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(timeout=300, limits=limits) as http:
            return await asyncio.gather(*(read(http, prompts[number % 4]) for number in range(200)))

    async def read(http: httpx.AsyncClient, prompt: str) -> str:
        return "".join([part async for part in stream(http, server, prompt=prompt, max_tokens=16)])

    assert asyncio.run(read_all()) == [expected[prompts[number % 4]] for number in range(200)]
    server.assert_idle()


def test_clients_that_leave_mid_stream_leave_no_request_behind(server: Client):
    before = server.text()

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=120) as http:
            parts = stream(http, server, max_tokens=400, ignore_eos=True)
            await anext(parts)
            await parts.aclose()

    async def leave_all() -> None:
        await asyncio.gather(*(leave() for _ in range(40)))

    asyncio.run(leave_all())
    server.assert_idle()
    assert server.text() == before


def test_a_prompt_that_is_too_long_is_refused(server: Client):
    answer = server.post(prompt="word " * 5000)
    assert answer.status_code == 400
    assert "512" in answer.text  # the positions of the model
    server.assert_idle()


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"[]", b'{"prompt": "a", "max_tokens": "many"}', b'{"prompt": "a", "temperature": -1}', b"\xff\xfe{}"],
)
def test_malformed_requests_are_refused_and_later_ones_are_right(server: Client, body: bytes):
    before = server.text(max_tokens=4)
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers, timeout=60)
    assert 400 <= answer.status_code < 500, answer.text
    assert server.text(max_tokens=4) == before


def test_a_request_that_breaks_off_leaves_nothing_behind(server: Client):
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(20):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{")
    assert server.text()
    server.assert_idle()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts_ends_it_with_all_its_processes(number: signal.Signals, tmp_path: Path):
    save_tiny("gpt2", tmp_path / "model")
    client = start(tmp_path / "model", tmp_path / "log")
    while len(processes_of(client)) < 2 and client.process.poll() is None:  # ours and vLLM's
        time.sleep(0.1)
    client.process.send_signal(number)
    assert client.process.wait(STOP_SECONDS) == 0
    assert processes_of(client) == []


def test_a_server_that_fails_says_so_and_leaves_nothing(tiny_gpt2: tuple, tmp_path: Path):
    client = start(tiny_gpt2[0], tmp_path / "log", "--max-model-len", 10_000)  # the model has 128 positions
    assert client.process.wait(START_SECONDS) == 1
    assert "vLLM's server ended by itself" in client.log.read_text()
    assert processes_of(client) == []


def test_killing_the_command_ends_all_processes_and_leaves_nothing(tmp_path: Path):
    save_tiny("gpt2", tmp_path / "model")
    client = start(tmp_path / "model", tmp_path / "log", "--enforce-eager")
    wait_for(client, "ready:")
    session = session_of(client)
    files = shared_by(client)
    assert len(session) >= 3  # the server, its engine, and what starts for it
    assert files
    client.process.kill()
    client.process.wait()
    wait_until(lambda: not any(map(alive, session)))
    assert not [file for file in files if file.exists()]
