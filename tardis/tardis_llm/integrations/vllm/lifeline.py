"""Every process of a server ends when the command `tardis serve` does, even if that was killed.

Each waits in a thread for the lock that the command holds: the operating system frees it however the command ends, and
before or after the process was started makes no difference. The first process then clears up after all.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from pathlib import Path

from . import session
from .rundir import RunDirectory

#: environment variable with the run directory of the server that a process belongs to
RUN_DIRECTORY = "TARDIS_RUN_DIRECTORY"
_tied = False


def tie() -> None:
    """End this process when its server's command ends; nothing outside of a server. Idempotent.

    Forked children are tied with it; others call this themselves.
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
    """Wait for the end that the thread makes, where it is due: the main thread may end as it sees others end."""
    if RunDirectory(path).owner_has_ended():
        thread.join()


def _end_with_owner(path: Path) -> None:
    RunDirectory(path).owner_has_ended(wait=True)
    _end(path)


def _end(path: Path) -> None:
    """End this process at once; if it is the server's first, all others before it, and clear up after them."""
    directory, me = RunDirectory(path), os.getpid()
    try:
        if os.getsid(me) == me and path.exists():
            directory.record(me)
            session.kill(me)
            directory.clear()
    finally:
        os.kill(me, signal.SIGKILL)
