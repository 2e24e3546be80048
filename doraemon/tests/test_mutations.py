"""Changed files with right checksums are refused, or are indexes whose answers are right: `mutations.py` for long."""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest

from doraemon import CorruptFileError, Index, storage

files = functools.cache(mutations.originals)


@pytest.mark.parametrize("file", range(5))
@pytest.mark.parametrize("verify", [True, False])
def test_files_that_nobody_changed_are_opened(file: int, verify: bool, engine: str, tmp_path: Path) -> None:
    raw = mutations.joined(*mutations.split(files(engine)[file]))
    assert raw == files(engine)[file]
    assert mutations.outcome(raw, tmp_path / "index", engine, mmap=True, verify=verify) == "opened"


def test_changed_files_are_refused_or_right(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """`--mutations 5000` for longer."""
    for seed in range(request.config.getoption("--mutations")):
        mutations.run(seed, files(engine), tmp_path / "index", engine)


def everywhere(value: Any) -> Any:
    return lambda array: np.full_like(array, value)


def field(name: str, value: Any) -> Any:
    def change(array: Any) -> Any:
        array = array.copy()
        array[name][:-1] = value
        return array

    return change


#: array, what is done to it, what the error says: each was once read out of bounds, or allocated, or computed with
CHANGES: list[tuple[str, Any, str]] = [
    ("model.buckets", field("scale", -1.0), "scales"),
    ("model.buckets", field("scale", np.nan), "scales"),
    ("model.buckets", field("start", -(2**63)), "divide"),
    ("model.buckets", lambda array: array[::-1].copy(), "divide"),
    ("model.buckets", field("low", 1), "bounds"),
    ("model.buckets", field("place", 2**40), "places"),
    ("model.bits", everywhere(20), "numbers of leaves"),
    ("model.bits", everywhere(255), "numbers of leaves"),
    ("model.where", everywhere(2**38), "leads out"),
    ("model.where", everywhere(-2), "leads out"),
    ("model.where", everywhere(2**63 - 1), "leads out"),
    ("model.where", everywhere(-1), "places"),
    ("model.rows", everywhere(np.nan), "finite"),
    ("model.rows", everywhere(-np.inf), "finite"),
    ("model.rows", everywhere(-1.0), "below zero"),
    ("run.heat", everywhere(np.nan), "counts"),
    ("run.heat", everywhere(-1.0), "counts"),
    ("run.heat", everywhere(1e300), "counts"),
    ("run.trained", everywhere(0.0), "shares"),
    ("run.trained", everywhere(np.inf), "shares"),
    ("memory.signatures", everywhere(np.nan), "shares"),
    ("memory.bits", everywhere(20), "numbers of leaves"),
    ("memory.bits", lambda array: np.repeat(array, 50, axis=0), "memory"),
    ("delta.codes", lambda array: array[::-1].copy(), "order"),
    ("delta.net", everywhere(2**40), "changes that cannot be"),
    ("delta.net", everywhere(-(2**62)), "not there"),
    ("delta.net", everywhere(0), "changes that cannot be"),
    ("delta.present", everywhere(2**62), "counts"),
    ("delta.stamps", everywhere(2**63 - 1), "writes"),
    ("delta.stamps", everywhere(-1), "writes"),
    ("run.codes", lambda array: array[:-1], "divide"),
    ("run.codes", lambda array: array.astype(np.int64), "instead of uint64"),
    ("run.codes", lambda array: array.reshape(-1, 2), "instead of uint64"),
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_what_is_wrong_with_a_file_is_named(number: int, verify: bool, tmp_path: Path) -> None:
    name, change, message = CHANGES[number]
    path = tmp_path / "index"
    path.write_bytes(files("numpy")[0])
    header, arrays = storage.read(path, mmap=False, verify=True)
    storage.write(path, header, {**arrays, name: change(arrays[name])})
    with pytest.raises(CorruptFileError, match=message) as caught:
        Index.open(path, mmap=True, verify=verify)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("run.codes", lambda array: np.append(array[:10], np.sort(array[10:])[::-1]), "order|bounds|scales"),
        ("run.codes", lambda array: np.append(array[:3], [array[4], array[3], *array[5:]]).astype(np.uint64), "order"),
        ("delta.present", lambda array: array + 1, "counts"),
        ("model.rows", lambda array: array * np.float32([1, 1, 0]), "lead"),
        ("model.rows", lambda array: array + np.float32([9, 0, 0]), "lead"),
    ],
)
def test_verifying_checks_what_only_the_keys_can_tell(
    name: str, change: Any, message: str, engine: str, tmp_path: Path
) -> None:
    path = tmp_path / "index"
    path.write_bytes(files(engine)[0])
    header, arrays = storage.read(path, mmap=False, verify=True)
    storage.write(path, header, {**arrays, name: change(arrays[name])})
    with pytest.raises(CorruptFileError, match=message):
        Index.open(path, engine=engine)


@pytest.mark.parametrize("dtype", ["float64", "float32", "int32", "uint32", "datetime64[s]"])
def test_codes_that_are_no_keys_are_refused(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "index"
    Index(np.zeros(3, dtype)).save(path)
    header, arrays = storage.read(path, mmap=False, verify=True)
    zero = int(arrays["run.codes"][0])
    wrong = {"f": [0, zero - 1, 2**64 - 1], "i": [2**32], "u": [2**32], "M": [0]}[np.dtype(dtype).kind]
    for code in wrong:
        codes, buckets = np.full(3, code, np.uint64), arrays["model.buckets"].copy()
        buckets["low"][:-1] = code
        storage.write(path, header, {**arrays, "run.codes": codes, "model.buckets": buckets})
        with pytest.raises(CorruptFileError, match="codes that no"):
            Index.open(path, verify=False)


@pytest.mark.parametrize("values", [np.array([True, False]), np.array(["a", "b"])])
def test_values_that_no_dtype_has_are_refused(values: Any, tmp_path: Path) -> None:
    path = tmp_path / "index"
    Index([1, 2], values).save(path)
    header, arrays = storage.read(path, mmap=False, verify=True)
    wrong = np.full(values.nbytes, 0x7F, np.uint8).view(values.dtype)
    storage.write(path, header, {**arrays, "run.values": wrong})
    with pytest.raises(CorruptFileError, match=r"run\.values"):
        Index.open(path)


def test_a_wrong_engine_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    Index([1]).save(tmp_path / "index")
    with pytest.raises(ValueError, match="'native' or 'numpy'") as caught:
        Index.open(tmp_path / "index", engine="gpu")
    assert not isinstance(caught.value, CorruptFileError)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{}", b"[]", b"5", b'{"arrays": 5}', b'{"arrays": [5]}', b"\xff"])
def test_headers_that_are_none_are_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(storage._PREFIX.pack(storage.MAGIC, 1, len(text), zlib.crc32(text)) + text)
    with pytest.raises(CorruptFileError, match=r"header|missing"):
        Index.open(path)
    path.write_bytes(storage._PREFIX.pack(storage.MAGIC, 1, 2**32 - 1, zlib.crc32(text)) + text)
    with pytest.raises(CorruptFileError, match="header"):
        Index.open(path)


def test_many_copies_of_few_keys_are_merged_before_they_are_saved(tmp_path: Path, engine: str) -> None:
    index = Index([1, 2], merging="manual", engine=engine)
    index.extend(np.full(2**20 + 100, 7))
    assert index.explain().run_keys == 2
    index.save(tmp_path / "index")
    opened = Index.open(tmp_path / "index", engine=engine)
    assert (len(opened), opened.count(7, 8), opened.explain().delta_entries) == (2**20 + 102, 2**20 + 100, 0)


@pytest.mark.usefixtures("leaves_alone")
def test_workloads_of_an_index_that_was_emptied_are_forgotten(tmp_path: Path, engine: str) -> None:
    keys = np.arange(6000)
    index = Index(keys, engine=engine)
    for part in (keys[:600], keys[5000:5600]):
        index.searchsorted(np.tile(part, 400))
        index.adapt()
    assert index.explain().remembered
    index.discard_many(keys)
    index.compact()
    index.save(tmp_path / "index")
    opened = Index.open(tmp_path / "index", engine=engine)
    opened.extend(keys)
    opened.compact()
    assert opened.adapt().changed == 0
    np.testing.assert_array_equal(opened.keys(), keys)
