"""Replacing a file in one step, and clearing away what writers left that were killed before that step.

A writer writes `.NAME.BOOT.TOKEN.unfinished` beside the file and holds a lock on it for as long as it lives, so a file
that can be locked has no writer. Where locks are not shared between machines, a file of another boot (which BOOT tells)
also has to have been left alone for a day. Systems without such locks clear nothing.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl

SUFFIX = ".unfinished"
FORGOTTEN = 24 * 3600  #: seconds without a write after which a writer on another machine is taken for dead


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path`, on the disk, when the block ends well, and vanishes when it does not.

    Links are followed. The new file has the permissions and, where the system allows it, the owner of the old one.

    Raises OSError if what is there is not a file.
    """
    path = Path(os.path.realpath(path))
    old = _status(path)
    clear_unfinished(path)
    unfinished, file = _begin(path, old)
    try:
        with file:
            _take_owner_and_mode(file.fileno(), old)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform != "win32":
                os.replace(unfinished, path)  # while the file is locked
        if sys.platform == "win32":
            os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def clear_unfinished(path: Path) -> None:
    """Delete what dead writers of this path left. What may not be deleted, or cannot be told to be dead, stays."""
    if sys.platform == "win32":
        return
    path = Path(os.path.realpath(path))
    name = re.compile(rf"\.{re.escape(_stem(path))}\.(?:([0-9a-f]{{8}})\.)?[0-9a-f]+\{SUFFIX}")
    with suppress(OSError), os.scandir(path.parent) as entries:  # opening needs no permission to list the directory
        for entry in entries:
            found = name.fullmatch(entry.name)
            if found is not None:
                with suppress(OSError):  # nor to delete
                    _delete_if_dead(entry.path, found[1])


def _delete_if_dead(unfinished: str, boot: str | None) -> None:
    number = os.open(unfinished, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(number)
        if stat.S_ISREG(status.st_mode) and (boot == _boot() or time.time() - status.st_mtime > FORGOTTEN):
            fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.unlink(unfinished)
    finally:
        os.close(number)


def _status(path: Path) -> os.stat_result | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a file, so nothing is saved in its place: give the path of a file", str(path))
    return status


def _begin(path: Path, old: os.stat_result | None) -> tuple[Path, IO[bytes]]:
    """A new unfinished file that is locked, and that nobody may read who could not read the old one."""
    while True:
        unfinished = path.with_name(f".{_stem(path)}.{_boot()}.{secrets.token_hex(4)}{SUFFIX}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(unfinished, flags, 0o666 if old is None else 0o600), "wb")
        if sys.platform == "win32":
            return unfinished, file
        with suppress(OSError):  # of a file system without locks, where nothing is cleared either
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return unfinished, file
        file.close()  # it was cleared before it was locked


def _stem(path: Path) -> str:
    """The file's name, or a short one in its place: a name may have 255 bytes."""
    name = os.fsencode(path.name)
    return path.name if len(name) <= 200 else f"{zlib.crc32(name):08x}"


def _take_owner_and_mode(number: int, old: os.stat_result | None) -> None:
    new = os.fstat(number)
    if old is None or sys.platform == "win32":
        return
    mode = stat.S_IMODE(old.st_mode)
    if _owner(new) != _owner(old):
        try:
            os.fchown(number, old.st_uid, old.st_gid)
        except PermissionError:
            mode &= ~stat.S_IRWXG  # what the old group might do is not for another one
    if mode != stat.S_IMODE(os.fstat(number).st_mode):
        os.fchmod(number, mode)


def _owner(status: os.stat_result) -> tuple[int, ...]:
    return status.st_uid, status.st_gid


@cache
def _boot() -> str:
    """Tells this running system from others, and from itself before it was started anew."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        text = os.uname().nodename if sys.platform != "win32" else ""
    return f"{zlib.crc32(text.encode()):08x}"


def _sync_directory(path: Path) -> None:
    """Make a rename survive a power cut, where the system lets directories be opened."""
    if os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
