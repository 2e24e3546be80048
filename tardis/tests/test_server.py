"""The watch over a server: signals, what it calls ready, and what it refuses; a stub stands for vLLM's server."""

from __future__ import annotations

import http.server
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from processes import free_port, skip_where_ignored, wait_until
from stub_server import Answer

from tardis_llm.errors import InvalidInputError, TardisError
from tardis_llm.integrations.vllm import rundir, server

SECONDS = 15.0


class Watched(NamedTuple):
    """A command that watches the stub."""

    process: multiprocessing.Process
    directory: Path
    port: int

    @property
    def said(self) -> str:
        """What the command said on ready and at its end."""
        return read(self.directory / "said")

    @property
    def log(self) -> str:
        """What the stub wrote."""
        return read(self.directory / "log")

    def end(self, *numbers: signal.Signals) -> float:
        """Send signals, one after the other; returns after how many seconds the command ended."""
        started = time.monotonic()
        for number in numbers:
            os.kill(self.process.pid, number)
            time.sleep(0.2)  # the same signal twice at once would be one
        self.process.join(SECONDS)
        assert self.process.exitcode == 0
        assert not list(self.directory.glob("tardis-serve-*"))
        return time.monotonic() - started


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Servers of this module are stubs, and all that they leave lies in tmp_path."""
    monkeypatch.setattr(server, "_LAUNCH", "stub_server")
    monkeypatch.setattr(server, "base", lambda: tmp_path)
    monkeypatch.setattr(server, "_POLL_SECONDS", 0.05)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))


@contextmanager
def watched(directory: Path, wait_for: str = "ready", **options: object) -> Iterator[Watched]:
    """A command that watches the stub, as a process of its own that has said or been told something."""
    port = free_port()

    def command() -> None:
        with (directory / "said").open("w", buffering=1) as said:
            server.Server("model", "127.0.0.1", port, **options).run(lambda url: said.write(f"ready {url}\n"))
            said.write("stopped\n")

    found = Watched(multiprocessing.get_context("fork").Process(target=command), directory, port)
    found.process.start()
    try:
        wait_until(lambda: wait_for in found.said + found.log)
        yield found
    finally:
        found.process.kill()
        found.process.join()
        for each in psutil.process_iter(["cmdline"]):
            if "stub_server" in (each.info["cmdline"] or []) and str(port) in each.info["cmdline"]:
                each.kill()


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_requests_in_flight_finish(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    skip_where_ignored(number)
    monkeypatch.setenv("STUB_SECONDS", "0.5")
    with watched(tmp_path) as command:
        assert command.end(number) > 0.5
        assert command.log.endswith("finished\n")
        assert command.said == f"ready http://127.0.0.1:{command.port}\nstopped\n"


def test_a_second_signal_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STUB_SECONDS", "60")
    with watched(tmp_path) as command:
        assert command.end(signal.SIGTERM, signal.SIGINT) < 3
        assert "finished" not in command.log


def test_requests_that_take_longer_than_they_may_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STUB_SECONDS", "60")
    monkeypatch.setattr(server, "_GRACE_SECONDS", 0.5)
    with watched(tmp_path, shutdown_timeout=1) as command:
        assert 1.5 < command.end(signal.SIGTERM) < 4
        assert "finished" not in command.log


def test_a_hangup_that_nohup_ignores_is_ignored(tmp_path: Path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watched(tmp_path) as command:
            os.kill(command.process.pid, signal.SIGHUP)
            time.sleep(0.5)
            assert command.process.is_alive()
            assert "stopped" not in command.said
            command.end(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_requests_in_flight_have_20_seconds_unless_told_otherwise(tmp_path: Path):
    with watched(tmp_path) as command:
        assert "shutdown_timeout='20'" in command.log
        command.end(signal.SIGTERM)


def test_a_server_elsewhere_is_not_called_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STUB_DEAF", "1")
    with watched(tmp_path, wait_for="Namespace") as command:
        other = http.server.ThreadingHTTPServer(("127.0.0.1", command.port), Answer)
        threading.Thread(target=other.serve_forever, daemon=True).start()
        time.sleep(1)
        command.end(signal.SIGTERM)
        other.shutdown()
        other.server_close()
        assert command.said == "stopped\n"


def test_a_proxy_is_not_asked_whether_the_server_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with watched(tmp_path) as command:
        command.end(signal.SIGTERM)


def test_a_taken_port_is_refused_before_anything_is_started(tmp_path: Path):
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as other,
        pytest.raises(InvalidInputError, match=f"port {other.server_port} .* is taken"),
    ):
        server.Server("model", "127.0.0.1", other.server_port)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--uds=/a"], "cannot take --uds"),
        (["--model", "b"], "cannot take --model"),
        (["--api_key", "k"], "--api_key is not spelled out; write --api-key"),
        (["--api-k=k"], "--api-k is not spelled out; write --api-key or --api-key-file"),
        (["--shutdown_timeout", "3"], "write --shutdown-timeout"),
        (["second-key", "--enforce-eager"], "'second-key' belongs to no option"),
        (["--additional-config", "{}"], "--prefill, and not both"),
    ],
)
def test_options_that_it_has_to_know_of_are_refused(options: list[str], message: str):
    with pytest.raises(InvalidInputError, match=message):
        server.Server("model", "127.0.0.1", free_port(), "exact", options)


def test_a_server_that_ends_by_itself_is_an_error_and_leaves_nothing(tmp_path: Path):
    made = server.Server("model", "127.0.0.1", free_port(), options=["--what-is-this"])
    with pytest.raises(TardisError, match="ended by itself with exit code 2"):
        made.run(lambda url: None)
    assert not list(tmp_path.iterdir())


def test_what_a_dead_server_left_is_cleared_at_the_start_of_another(tmp_path: Path):
    dead = rundir.RunDirectory.create(tmp_path)
    os.close(dead._lock)
    with watched(tmp_path) as command:
        assert not dead.path.exists()
        command.end(signal.SIGTERM)
