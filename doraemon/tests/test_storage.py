"""Files: whole or refused, and a killed writer damages nothing."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doraemon import CorruptFileError, Index, Snapshot, replacing, storage

DATA = Path(__file__).parent / "data"


def written(path: Path, **options: Any) -> Path:
    index = Index(np.arange(0, 90_000, 3), np.arange(30_000) * 0.5, **options)
    index.update(1, -1.0)
    index.discard(3)
    index.save(path)
    return path


@pytest.mark.parametrize("mmap", [False, True])
def test_everything_comes_back(tmp_path: Path, engine: str, mmap: bool) -> None:
    path = written(tmp_path / "index.dora", engine=engine)
    index = Index.open(path, mmap, engine=engine)
    assert (len(index), index[1], index[6], 3 in index) == (30_000, -1.0, 1.0, False)
    assert index.explain().delta_entries == 2
    index.update(7, 7.0)
    index.compact()
    index.save(path)  # over the file that is mapped
    assert Index.open(path, mmap, engine=engine).items()[1].tolist() == index.values().tolist()
    assert index[7] == 7.0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["index.dora"]


def test_arrays_are_aligned_and_the_header_is_json(tmp_path: Path) -> None:
    raw = written(tmp_path / "index.dora").read_bytes()
    assert raw[:8] == b"DORAEMON"
    version, length = np.frombuffer(raw[8:16], dtype="<u4")
    header = json.loads(raw[20 : 20 + length])
    assert version == 1
    assert header["dtype"] == "<i8"
    assert all(entry["offset"] % 64 == 0 for entry in header["arrays"])


@pytest.mark.parametrize("mmap", [False, True])
def test_files_and_pickles_of_the_first_version_open(engine: str, mmap: bool) -> None:
    """`tests/data` has what was written before states held everything."""
    opened = Index.open(DATA / "version1.dora", mmap, engine=engine)
    unpickled, frozen = pickle.loads((DATA / "version1.pickle").read_bytes())
    for index in (opened, unpickled, frozen):
        assert index.items()[0].tolist() == [1, 5, 7, 9]
        assert index.items()[1].tolist() == [1.0, 2.4, 3.0, 4.0]
        assert index.explain().delta_entries == 3
    for index in (opened, unpickled):
        index.update(12, 9.0)
        index.compact()
        assert index.items()[1].tolist() == [1.0, 2.4, 3.0, 4.0, 9.0]
    assert type(frozen) is Snapshot


def test_a_damaged_byte_anywhere_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "index.dora")
    whole = path.read_bytes()
    index = Index.open(path)
    rng = random.Random(1)
    for at in [0, 8, 12, 16, 20, 40, *(rng.randrange(len(whole)) for _ in range(40))]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            opened = Index.open(path)
        except CorruptFileError:
            continue
        np.testing.assert_array_equal(opened.values(), index.values())  # it was padding between arrays


def test_a_file_cut_off_anywhere_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "index.dora")
    whole = path.read_bytes()
    for length in (0, 7, 19, 20, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        for verify in (True, False):
            with pytest.raises(CorruptFileError, match=r"cut off|not an index|damaged"):
                Index.open(path, verify=verify)


def test_a_later_format_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = written(tmp_path / "index.dora")
    raw = bytearray(path.read_bytes())
    raw[8] = 99
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match="update doraemon-index"):
        Index.open(path)


def test_a_model_of_other_keys_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "index.dora")
    header, arrays = storage.read(path, mmap=False, verify=True)
    keys, places = arrays["run.codes"].copy(), arrays["model.buckets"].copy()
    keys[0] += np.uint64(1)
    places["place"][0] = 1 << 40
    for change in ({"run.codes": keys}, {"model.buckets": places}, {"model.bits": arrays["model.bits"] + np.uint8(1)}):
        storage.write(path, header, {**arrays, **change})
        with pytest.raises(CorruptFileError, match="save it anew"):
            Index.open(path)
    del arrays["delta.net"]
    storage.write(path, header, arrays)
    with pytest.raises(CorruptFileError, match="save it anew"):
        Index.open(path)


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "index.dora")
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        Index([1]).save(path)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["index.dora"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "other", written(tmp_path / "index.dora"))]
    assert modes[0] == modes[1]


WRITER = """
import sys, numpy as np
from doraemon import Index
path, number = sys.argv[1], int(sys.argv[2])
while True:
    number += 1
    Index(np.arange(20_000) * number, np.full(20_000, number)).save(path)
    print(number, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_a_killed_writer_loses_nothing_that_it_saved(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """`--crashes 200` for long. After each kill the file is whole: the last one reported, or the one after."""
    path, rng, number = tmp_path / "index.dora", random.Random(7), 0
    for _ in range(request.config.getoption("--crashes")):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(number)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            saved = [int(writer.stdout.readline())]  # it has begun
            time.sleep(rng.uniform(0, 0.03))
            os.kill(writer.pid, signal.SIGKILL)
            saved += [int(line) for line in writer.stdout if line.endswith("\n")]
        index = Index.open(path)
        number = int(index.values()[0])
        assert number in (saved[-1], saved[-1] + 1)
        np.testing.assert_array_equal(index.keys(), np.arange(20_000) * number)
        assert (index.values() == number).all()
        assert [entry.name for entry in tmp_path.iterdir()] == ["index.dora"]


# ---- the place of a file

fcntl: Any = sys.modules.get("fcntl")  # not everywhere
posix = pytest.mark.skipif(os.name != "posix", reason="links, modes and locks are POSIX's")


@posix
@pytest.mark.parametrize("kind", ["relative", "absolute", "of a link", "to a folder", "to nothing"])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, kind: str) -> None:
    (tmp_path / "years").mkdir()
    target, link = tmp_path / "years" / "2024.dora", tmp_path / "current.dora"
    if kind != "to nothing":
        Index([1, 2]).save(target)
    if kind == "of a link":
        (tmp_path / "middle").symlink_to("years/2024.dora")
    if kind == "to a folder":
        (tmp_path / "folder").symlink_to("years")
        link = tmp_path / "folder" / "2024.dora"
    else:
        link.symlink_to({"absolute": target, "of a link": "middle"}.get(kind, "years/2024.dora"))
    Index([1, 2, 3]).save(link)
    assert link.is_symlink() == (kind != "to a folder")
    assert len(Index.open(target)) == len(Index.open(link)) == 3
    assert [entry.name for entry in (tmp_path / "years").iterdir()] == ["2024.dora"]


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o660, 0o444, 0o400])
def test_a_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "index"
    Index([1]).save(path)
    path.chmod(mode)
    seen = []
    original = os.fsync

    def look(number: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(number).st_mode))
        original(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", look)
        Index([1, 2]).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == seen[0] == mode
    assert len(Index.open(path)) == 2


@posix
def test_another_group_gets_none_of_the_old_one_s_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    Index([1]).save(path)
    path.chmod(0o664)

    def refuse(number: int, owner: int, group: int) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "fchown", refuse)
    real = os.fstat
    monkeypatch.setattr(replacing, "_owner", lambda status: (status.st_uid, status.st_gid, status.st_ino))
    Index([1, 2]).save(path)
    assert stat.S_IMODE(real(os.open(path, os.O_RDONLY)).st_mode) == 0o604


@posix
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(OSError, match="not a file"):
        Index([1]).save(path)
    assert not path.is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127, "a b", ".hidden", "[1]*?", "a.dora.unfinished"])
def test_names_of_any_kind(tmp_path: Path, name: str) -> None:
    Index([1]).save(tmp_path / name)
    Index([1, 2]).save(tmp_path / name)
    assert len(Index.open(tmp_path / name)) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


# ---- what killed writers leave

STOPS = """
import os, sys, time
from doraemon import Index
os.fsync = lambda number: (print("written", flush=True), time.sleep(100))
Index(range(1000)).save(sys.argv[1])
"""


def begun(path: Path) -> subprocess.Popen[str]:
    """A writer that has written all of a file and not yet renamed it."""
    writer = subprocess.Popen([sys.executable, "-c", STOPS, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "written\n"
    return writer


def unfinished(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".unfinished"))


@posix
@pytest.mark.parametrize("how", ["open", "save", "save to a link"])
def test_what_dead_writers_left_is_cleared_and_nothing_else(tmp_path: Path, how: str) -> None:
    path, other, link = tmp_path / "index.dora", tmp_path / "index.dora.old", tmp_path / "link"
    Index([1]).save(path)
    link.symlink_to(path)
    writers = [begun(path), begun(path), begun(other)]
    assert len(unfinished(tmp_path)) == 3
    (tmp_path / ".index.dora.notes.unfinished").touch()
    try:
        Index.open(path)
        Index([1, 2]).save(path)
        assert len(unfinished(tmp_path)) == 4  # their writers live
        writers[0].kill()
        writers[0].wait()
        if how == "open":
            Index.open(path)
        else:
            Index([1, 2]).save(path if how == "save" else link)
        assert len(unfinished(tmp_path)) == 3
        writers[2].kill()
        writers[2].wait()
        Index.open(path)
        assert len(unfinished(tmp_path)) == 3  # another path's
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            if writer.stdout is not None:
                writer.stdout.close()
    Index.open(path)
    assert len(unfinished(tmp_path)) == 2


@posix
def test_writers_on_other_machines_are_given_a_day(tmp_path: Path) -> None:
    path = tmp_path / "index"
    Index([1]).save(path)
    names = [f".index.{boot}0123456789abcdef.unfinished" for boot in ("", "00000000.")]
    for name in names:
        (tmp_path / name).touch()
    Index.open(path)
    assert unfinished(tmp_path) == sorted(names)
    for name in names:
        os.utime(tmp_path / name, (time.time() - 90_000,) * 2)
    Index.open(path)
    assert unfinished(tmp_path) == []


@posix
def test_a_file_that_was_cleared_before_it_was_locked_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tries = tmp_path / "index", []
    original = fcntl.flock

    def late(number: int, operation: int) -> None:
        if not tries:
            for entry in tmp_path.glob(".*.unfinished"):
                entry.unlink()
        tries.append(operation)
        original(number, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    Index([1, 2]).save(path)
    assert len(tries) == 2
    assert len(Index.open(path)) == 2


@posix
def test_opening_does_not_need_to_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    Index([1]).save(path)
    (tmp_path / ".index.00000000.01234567.unfinished").touch()
    os.utime(tmp_path / ".index.00000000.01234567.unfinished", (0, 0))

    def refuse(*given: Any) -> None:
        raise PermissionError("not yours")

    for name in ("unlink", "scandir"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            assert len(Index.open(path)) == 1


def test_a_file_that_is_replaced_while_it_is_opened_is_still_one_file(tmp_path: Path) -> None:
    """Its size is that of what was opened, not of what has the name a moment before."""
    path = tmp_path / "index"
    Index(range(10_000)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        original = Path.open

        def late(self: Path, *given: Any, **options: Any) -> Any:
            if self == path:
                patch.undo()
                Index([1]).save(path)
            return original(self, *given, **options)

        patch.setattr(Path, "open", late)
        assert len(Index.open(path)) == 1
