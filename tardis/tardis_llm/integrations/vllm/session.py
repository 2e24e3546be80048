"""The processes of a server: all those in the session that its first process leads."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import psutil

_TRACKER = "multiprocessing.resource_tracker"
_GONE_SECONDS = 5.0  # the longest wait for killed processes to vanish and for resource trackers to clear up


def members(session: int) -> list[psutil.Process]:
    """The living processes of a session."""
    return [process for process in psutil.process_iter() if _is_in(process, session)]


def _is_in(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
        return False


def kill(session: int) -> None:
    """Kill all processes of a session, except this one and Python's resource trackers.

    A tracker ends by itself when the processes that it serves have ended, and unlinks their shared memory and
    semaphores.
    """
    for living in _until_gone(session):
        for process in living:
            if not _is_spared(process):
                _kill(process)
        if all(map(_is_spared, living)):
            return


def end(session: int) -> None:
    """Kill a session that this process is not in, and wait until its trackers have cleared up."""
    kill(session)
    for _ in _until_gone(session):
        pass
    for process in members(session):
        _kill(process)


def _until_gone(session: int) -> Iterator[list[psutil.Process]]:
    """The living processes of a session, again and again: one that was killed may just have started another."""
    deadline = time.monotonic() + _GONE_SECONDS
    while (living := members(session)) and time.monotonic() < deadline:
        yield living
        time.sleep(0.02)


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def _is_spared(process: psutil.Process) -> bool:
    if process.pid == os.getpid():
        return True
    with contextlib.suppress(psutil.Error):
        return any(_TRACKER in part for part in process.cmdline())
    return False
