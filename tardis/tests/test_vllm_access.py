"""API keys: every route of vLLM's server asks for one, and none is seen where it should not be."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Result, assert_refused
from engines import needs_vllm
from served import FEW, PROMPT, STOP_SECONDS, Client, httpx, processes_of, running, start

from tardis_llm.integrations.vllm import access

pytestmark = needs_vllm
KEY = "a-key-that-nobody-has-seen"
HEADER = {"Authorization": f"Bearer {KEY}"}
#: with which options and tasks vLLM has which routes: as a folded model is served, and all that there are
APPS = {
    "served": ([], ("generate",)),
    "everything": (
        ["--enable-tokenizer-info-endpoint", "--enable-scale-out", "--enable-offline-docs", "--tokens-only"],
        ("generate", "render", "transcription", "realtime", "embed", "classify", "token_embed"),
    ),
}


@pytest.fixture(params=APPS)
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of vLLM's application with our middleware and a key, and no engine."""
    from starlette.testclient import TestClient
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv(access.DIGESTS, access.digest(KEY))
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", str(int(request.param == "everything")))
    options, tasks = APPS[request.param]
    middleware = ["--middleware", f"{access.__name__}.RequireKey"]
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([*options, *middleware])
    return TestClient(build_app(arguments, tasks), raise_server_exceptions=False)


def test_every_route_needs_the_key_but_for_those_listed(client: Any):
    found = {path for path, methods in routes(client.app) for method in methods if not refused(client, method, path)}
    assert found == access.OPEN
    assert len(routes(client.app)) > 30


def routes(app: Any) -> list[tuple[str, set[str]]]:
    """Paths and methods of all routes; a mounted application is asked for a path of its own."""
    found = []
    for route in app.routes:
        path = route.path.replace("{response_id}", "1")
        kind = type(route).__name__
        methods = {"MOUNT"} if kind == "Mount" else {"WEBSOCKET"} if "WebSocket" in kind else route.methods
        found.append((f"{path}/x" if kind == "Mount" else path, methods))
    return found


def refused(client: Any, method: str, path: str) -> bool:
    """Whether a request without a key is, and one with a key is not."""
    if method == "WEBSOCKET":
        from starlette.websockets import WebSocketDisconnect

        with pytest.raises(WebSocketDisconnect), client.websocket_connect(path):
            pass
        return True
    method = "GET" if method == "MOUNT" else method
    assert client.request(method, path, headers=HEADER).status_code != 401
    return bool(client.request(method, path).status_code == 401)


def test_routes_that_only_tell_how_the_server_is_are_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("Open without a key"))
    assert {part for part in line.split("`") if part.startswith("/")} == access.OPEN


@pytest.fixture(scope="module")
def server(sample_folded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The folded sample behind a key that is on the command line; it stops when its streams have ended."""
    log, patient = tmp_path_factory.mktemp("access") / "log", ("--shutdown-timeout", 300)
    with running(start(sample_folded, log, "--api-key", KEY, *patient, *FEW)) as client:
        yield client


def test_no_process_shows_the_key(server: Client):
    assert len(processes_of(server)) >= 3
    assert not [line for line in processes_of(server) if KEY in line]
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert not [child for child in children if any(KEY in value for value in child.environ().values())]
    log = server.log.read_text()
    assert KEY not in log
    assert "use --api-key-file or VLLM_API_KEY" in log


@pytest.mark.parametrize("path", ["/invocations", "/v1/completions"])
def test_who_has_no_key_generates_nothing(server: Client, path: str):
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    assert httpx.post(server.url + path, json=body).status_code == 401
    assert httpx.post(server.url + path, json=body, headers={"Authorization": "Bearer wrong"}).status_code == 401
    answer = httpx.post(server.url + path, json=body, headers=HEADER, timeout=60)
    assert answer.json()["choices"][0]["text"]


def test_a_second_server_on_its_port_is_refused(server: Client, tardis: Callable[..., Result], sample_folded: Path):
    port = server.url.rpartition(":")[2]
    assert_refused(tardis("serve", sample_folded, "--port", port), f"port {port} of host '127.0.0.1' is taken")
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_streams_finish_when_the_terminal_is_closed(server: Client):
    """The last test of its server."""
    begun: set[int] = set()

    async def read_all() -> list[list[str]]:
        async with httpx.AsyncClient(timeout=120, headers=HEADER) as http:
            streams = [asyncio.create_task(read(http, number)) for number in range(20)]
            while len(begun) < len(streams):
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGHUP)
            return await asyncio.gather(*streams)

    async def read(http: httpx.AsyncClient, number: int) -> list[str]:
        body = {"prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": True, "ignore_eos": True}
        lines = []
        async with http.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                begun.add(number)
                lines.append(line)
        return [line for line in lines if line]

    for lines in asyncio.run(read_all()):
        assert '"finish_reason":"length"' in lines[-2]
        assert lines[-1] == "data: [DONE]"
    assert server.process.wait(STOP_SECONDS) == 0
