"""What tests of processes share: free ports, and waiting for what another process does."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable

import psutil
import pytest


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Return as soon as something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def skip_where_ignored(number: signal.Signals) -> None:
    """Skip a test of a signal that processes started here ignore, as those behind nohup do."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as behind nohup")


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
