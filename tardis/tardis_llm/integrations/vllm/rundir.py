"""A server's run directory, by which everything that the server leaves on the machine can be cleared up.

vLLM's processes make sockets, and shared memory under names that do not tell their owner. The directory contains the
sockets, a list of those names, and a lock that the command `tardis serve` holds until it ends, however it ends. So a
directory whose lock is free belongs to a dead server, and what it contains and lists can be removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from . import session

#: where Linux keeps named shared memory
SHARED = Path("/dev/shm")
_PREFIX = "tardis-serve-"
_LOCK, _SEGMENTS = "lock", "segments.json"


def base() -> Path:
    """The folder of all run directories: that of shared memory, or another where paths of sockets stay short enough."""
    short = [path for path in (SHARED, Path("/tmp")) if os.access(path, os.W_OK)]
    return short[0] if short else Path(tempfile.gettempdir())


def segments_of(pids: Iterable[int]) -> dict[str, int]:
    """Names and inodes of the shared memory that processes have mapped; those that cannot be inspected are skipped."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            lines = [line.split() for line in maps if f" {SHARED}/" in line]
            found.update({Path(line[5]).name: int(line[4]) for line in lines if len(line) == 6})  # 7 if unlinked
    return found


class RunDirectory:
    """An existing run directory.

    Args:
        path: of the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._listings: deque[set[str]] = deque(maxlen=3)

    @classmethod
    def create(cls, under: Path) -> RunDirectory:
        """Make a run directory in the folder `under`, and hold its lock."""
        made = cls(Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=under)))
        made._take(fcntl.LOCK_EX)
        # hidden until here: without a lock it would pass for the directory of a dead server
        visible = under / made.path.name.removeprefix(".")
        made.path.rename(visible)
        made.path = visible
        return made

    def owner_has_ended(self, wait: bool = False) -> bool:
        """Whether the process that made the directory has ended.

        Args:
            wait: wait until it has.
        """
        try:
            self._take(fcntl.LOCK_SH if wait else fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except FileNotFoundError:  # the process has cleared the directory
            pass
        return True

    def record(self, number: int) -> None:
        """List the shared memory of a session's processes in the directory, if any has come or gone lately.

        Args:
            number: of the session.
        """
        self._listings.append(set(os.listdir(SHARED)) if SHARED.is_dir() else set())
        if self._listings.count(self._listings[-1]) == self._listings.maxlen:
            return  # unchanged three times: after two, shared memory may exist that no process has mapped yet
        found = self._recorded() | segments_of(process.pid for process in session.members(number))
        draft = self.path / f"{_SEGMENTS}.new"
        draft.write_text(json.dumps(found), encoding="utf-8")
        draft.replace(self.path / _SEGMENTS)

    def _recorded(self) -> dict[str, int]:
        path = self.path / _SEGMENTS
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def clear(self) -> None:
        """Remove the directory and the shared memory that it lists, except what a living process has mapped."""
        recorded = self._recorded()
        used = segments_of(int(name) for name in os.listdir("/proc") if name.isdigit()) if recorded else {}
        for name, inode in recorded.items():
            if name not in used:
                _unlink(SHARED / Path(name).name, inode)
        shutil.rmtree(self.path, ignore_errors=True)  # another process may be removing it, too
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear_if_dead(self) -> bool:
        """Clear the directory if the process that made it, and all that waited for its end, have ended.

        Returns:
            Whether it was cleared.
        """
        try:
            self._take(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):
            return False
        self.clear()
        return True

    def _take(self, kind: int) -> None:
        """Get the lock, in one of the ways of `flock`; raises BlockingIOError where that must not wait."""
        create = os.O_CREAT if kind == fcntl.LOCK_EX else 0
        lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | create, 0o600)
        try:
            fcntl.flock(lock, kind)
        except BlockingIOError:
            os.close(lock)
            raise
        self._lock = lock


def _unlink(path: Path, inode: int) -> None:
    """Unlink a file, unless its name now belongs to a file with another inode."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat(follow_symlinks=False).st_ino == inode:
            path.unlink()


def clear_dead(under: Path) -> int:
    """Clear the run directories of this user's dead servers; returns how many there were."""
    mine = [path for path in under.glob(f"{_PREFIX}*") if _is_mine(path)]
    return sum(RunDirectory(path).clear_if_dead() for path in mine)


def _is_mine(path: Path) -> bool:
    try:
        return path.stat(follow_symlinks=False).st_uid == os.getuid()
    except FileNotFoundError:
        return False
