"""A server's run directory: what the server leaves on the machine lies in it, or is named in it.

vLLM's processes share memory under names that say nothing of their owner, and make sockets. The directory holds the
sockets and a list of the names, and a lock that the command `tardis serve` holds as long as it lives, however it ends.
So a directory whose lock is free belongs to a dead server, and all that it names can go.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from . import session

#: where the operating system keeps named shared memory, on Linux
SHARED = Path("/dev/shm")
_PREFIX = "tardis-serve-"
_LOCK, _SEGMENTS = "lock", "segments.json"


def base() -> Path:
    """Where run directories are: beside the shared memory that they name, which ends with the machine as they do."""
    return SHARED if os.access(SHARED, os.W_OK) else Path(tempfile.gettempdir())


def segments_of(pids: Iterable[int]) -> dict[str, int]:
    """Names and inodes of the shared memory that processes have mapped; processes that cannot be read have none."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            lines = [line.split() for line in maps if f" {SHARED}/" in line]
            found.update({Path(line[5]).name: int(line[4]) for line in lines if len(line) == 6})  # 7: unlinked already
    return found


class RunDirectory:
    """A run directory that is there.

    Args:
        path: of the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._recorded: dict[str, int] = {}
        self._listed: set[str] = set()

    @classmethod
    def create(cls, under: Path) -> RunDirectory:
        """Make a new one whose lock this process holds."""
        made = cls(Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=under)))
        made._take(fcntl.LOCK_EX)
        visible = under / made.path.name.removeprefix(".")  # only now: without its lock it would pass for a dead one's
        made.path.rename(visible)
        made.path = visible
        return made

    def wait_for_owner(self) -> None:
        """Return when the process that made the directory has ended, in whatever way."""
        with contextlib.suppress(FileNotFoundError):  # the owner has cleared it
            self._take(fcntl.LOCK_SH)

    def record(self, number: int) -> None:
        """Write down the shared memory of a session's processes, if any has come or gone since the last time."""
        listed = set(os.listdir(SHARED)) if SHARED.is_dir() else set()
        if listed == self._listed:
            return
        self._listed = listed
        self._recorded.update(segments_of(process.pid for process in session.members(number)))
        draft = self.path / f"{_SEGMENTS}.new"
        draft.write_text(json.dumps(self._recorded), encoding="utf-8")
        draft.replace(self.path / _SEGMENTS)

    def clear(self) -> None:
        """Remove the directory and the shared memory that it names, but for what a living process has mapped."""
        path = self.path / _SEGMENTS
        recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        used = segments_of(int(name) for name in os.listdir("/proc") if name.isdigit()) if recorded else {}
        for name, inode in recorded.items():
            if name not in used:
                _unlink(SHARED / Path(name).name, inode)
        shutil.rmtree(self.path, ignore_errors=True)  # another process may be at it
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear_if_dead(self) -> bool:
        """Clear the directory if the process that made it has ended, and all that wait for its end; whether so."""
        try:
            self._take(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):
            return False
        self.clear()
        return True

    def _take(self, kind: int) -> None:
        create = os.O_CREAT if kind == fcntl.LOCK_EX else 0
        lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | create, 0o600)
        try:
            fcntl.flock(lock, kind)
        except BlockingIOError:
            os.close(lock)
            raise
        self._lock = lock


def _unlink(path: Path, inode: int) -> None:
    """Unlink a file unless its name has gone to another since."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat(follow_symlinks=False).st_ino == inode:
            path.unlink()


def clear_dead(under: Path) -> int:
    """Clear what dead servers of this user have left; returns of how many."""
    mine = [path for path in under.glob(f"{_PREFIX}*") if _is_mine(path)]
    return sum(RunDirectory(path).clear_if_dead() for path in mine)


def _is_mine(path: Path) -> bool:
    try:
        return path.stat(follow_symlinks=False).st_uid == os.getuid()
    except FileNotFoundError:
        return False
