"""Files: whole or refused, and a killed writer damages nothing."""

from __future__ import annotations

import json
import os
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

from doraemon import CorruptFileError, Index, storage


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
