"""API keys of a server: where they come from, and what is answered without one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tardis_llm.errors import InvalidInputError
from tardis_llm.integrations.vllm.access import (
    DIGESTS,
    KEYS,
    OPEN,
    RequireKey,
    digest,
    gather_digests,
    read_keys,
    without_keys,
)

CLOSED = ["/invocations", "/v1/models", "/v1/completions", "/tokenize", "/docs", "/load", "/", "", "/healthy"]
BESIDE_OPEN = [
    "/health/../invocations",
    "/metrics/",
    "/metrics/invocations",
    "//health",
    "/HEALTH",
    "/health;/v1/models",
]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """The key of the server in this environment."""
    monkeypatch.delenv(KEYS, raising=False)
    monkeypatch.setenv(DIGESTS, f"{digest('first')} {digest('key')}")
    return "key"


def answer(path: str, *headers: tuple[str, str], kind: str = "http", method: str = "POST", **scope: Any) -> int | str:
    """The status that a request gets, or "closed" for a socket of the web; the app behind answers 200."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    request = {"type": kind, "path": path, "method": method, "headers": raw, **scope}
    asyncio.run(RequireKey(app)(request, receive, send))
    return "closed" if sent[0]["type"] == "websocket.close" else int(sent[0]["status"])


def bearer(key: str) -> tuple[str, str]:
    return ("Authorization", f"Bearer {key}")


@pytest.mark.parametrize("path", sorted(OPEN))
def test_routes_that_tell_how_the_server_is_need_no_key(path: str):
    assert answer(path, method="GET") == 200
    assert answer(f"/behind/a/proxy{path}", root_path="/behind/a/proxy") == 200


@pytest.mark.parametrize("path", CLOSED + BESIDE_OPEN)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "DELETE"])
def test_every_other_route_needs_a_key(path: str, method: str):
    assert answer(path, method=method) == 401
    assert answer(path, bearer("key"), method=method) == 200
    assert answer(f"/root{path}", method=method, root_path="/root") == 401


@pytest.mark.parametrize(
    "header", ["Bearer", "Bearer ", "Bearer wrong", "Bearer keyy", "Bearer KEY", "Basic key", "key"]
)
def test_a_wrong_key_is_none(header: str):
    assert answer("/v1/models", ("Authorization", header)) == 401


def test_each_of_several_keys_serves():
    assert answer("/v1/models", bearer("first")) == answer("/v1/models", bearer("key")) == 200


def test_a_socket_of_the_web_needs_a_key_even_on_an_open_path():
    assert answer("/v1/realtime", kind="websocket") == answer("/health", kind="websocket") == "closed"
    assert answer("/v1/realtime", bearer("key"), kind="websocket") == 200


def test_what_a_browser_asks_first_needs_no_key():
    preflight = ("Origin", "https://a.example"), ("Access-Control-Request-Method", "POST")
    assert answer("/v1/completions", *preflight, method="OPTIONS") == 200
    assert answer("/v1/completions", *preflight, method="POST") == 401
    assert answer("/v1/completions", preflight[1], method="OPTIONS") == 401


def test_without_keys_everything_is_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(DIGESTS, "")
    assert answer("/invocations") == 200


@pytest.mark.parametrize("given", ["environment", "command line"])
def test_keys_of_vllm_itself_are_asked_for_too(given: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(DIGESTS)
    app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(api_key=None)))
    if given == "environment":
        monkeypatch.setenv(KEYS, "other")
    else:
        app.state.args.api_key = ["other"]
    assert answer("/invocations", app=app) == 401
    assert answer("/invocations", bearer("other"), app=app) == 200


def test_keys_come_from_the_command_line_and_a_file_else_from_the_environment(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("b\n\n  c\n")
    assert gather_digests(["a"], file, {KEYS: "d"}) == [digest("a"), digest("b"), digest("c")]
    assert gather_digests([], None, {KEYS: "d"}) == [digest("d")]
    assert gather_digests([], file, {DIGESTS: digest("e")}) == [digest("e"), digest("b"), digest("c")]
    assert gather_digests([], None, {}) == []


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_source_without_a_key_does_not_leave_the_server_open(text: str, tmp_path: Path):
    (tmp_path / "keys").write_text(text)
    for arguments in (([text], None, {}), ([], tmp_path / "keys", {}), ([], None, {KEYS: text})):
        with pytest.raises(InvalidInputError, match="no API key"):
            gather_digests(*arguments)


@pytest.mark.parametrize("key", ["two words", "schlüssel", "a\x07b"])
def test_a_key_that_cannot_be_sent_is_refused(key: str):
    with pytest.raises(InvalidInputError, match="openssl rand"):
        read_keys(key, "a file")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary", ""):
        with pytest.raises(InvalidInputError, match="cannot read --api-key-file"):
            gather_digests([], tmp_path / name, {})


def test_keys_are_taken_out_of_a_command_line():
    command = ["python", "-m", "tardis_llm", "serve", "--api-key", "--x", "m", "--api-key=y", "--api-key-file", "f"]
    assert without_keys(command) == ["python", "-m", "tardis_llm", "serve", "m", "--api-key-file", "f"]
