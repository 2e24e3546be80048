"""Processes of a server end when the command `tardis serve` does, even if the command was killed.

The command holds a lock, which the operating system frees however the command ends. Each process of the server waits
for that lock in a thread, and ends when it gets it. The server's first process also clears up what all have left.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from pathlib import Path

from . import session
from .rundir import RunDirectory

#: environment variable with the run directory of the server to which a process belongs
RUN_DIRECTORY = "TARDIS_RUN_DIRECTORY"
_tied = False


def tie() -> None:
    """From now on, end this process when the command `tardis serve` that it belongs to ends. Idempotent.

    Nothing happens in a process that belongs to none. Forked children are tied, too; other children must call this.
    """
    global _tied
    path = os.environ.get(RUN_DIRECTORY)
    if path is None or _tied:
        return
    _tied = True
    os.register_at_fork(after_in_child=lambda: _watch(Path(path)))
    _watch(Path(path))


def _watch(path: Path) -> None:
    if RunDirectory(path).owner_has_ended():
        _end(path)
    thread = threading.Thread(target=_end_with_owner, args=(path,), name="lifeline", daemon=True)
    thread.start()
    atexit.register(_let_end, thread, path)


def _let_end(thread: threading.Thread, path: Path) -> None:
    """At exit, let the thread end the process if the command has ended. The main thread may be first to notice."""
    if RunDirectory(path).owner_has_ended():
        thread.join()


def _end_with_owner(path: Path) -> None:
    RunDirectory(path).owner_has_ended(wait=True)
    _end(path)


def _end(path: Path) -> None:
    """Kill this process. The server's first process kills all others before that, and clears up after them."""
    directory, me = RunDirectory(path), os.getpid()
    try:
        if os.getsid(me) == me and path.exists():
            directory.record(me)
            session.kill(me)
            directory.clear()
    finally:
        os.kill(me, signal.SIGKILL)
