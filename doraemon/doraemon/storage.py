"""Files: a JSON header and raw aligned arrays, written so that a writer killed at any moment damages nothing.

    8 bytes   magic "DORAEMON"
    u32       format version
    u32       length of the header
    u32       CRC-32 of the header
    header    JSON: what the index is, and name, dtype, shape, offset and CRC-32 of each array
    arrays    each at a multiple of 64 bytes

All little-endian. A new file is written beside the old one, flushed to the disk, and then takes its name in one step.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"DORAEMON"
VERSION = 1
ALIGNMENT = 64
_PREFIX = struct.Struct("<8sIII")
_CHUNK = 1 << 24

Arrays = dict[str, NDArray[Any]]
Header = dict[str, Any]


class CorruptFileError(ValueError):
    """A file that is damaged, incomplete or not an index."""


def write(path: str | os.PathLike[str], header: Header, arrays: Arrays) -> None:
    """Write a file, or leave what was there untouched."""
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"{name} of dtype object cannot be saved: give numbers or fixed-size strings, or pickle")
    with _replacing(Path(path)) as file:
        entries: list[Header] = []
        offset = 0
        for name, array in arrays.items():
            raw = _little_endian(array)
            offset = _aligned(offset)
            crc = zlib.crc32(_bytes(raw))
            dtype = raw.dtype.descr if raw.dtype.names else raw.dtype.str
            entries.append({"name": name, "dtype": dtype, "shape": raw.shape, "offset": offset, "crc32": crc})
            offset += raw.nbytes
        text = json.dumps({**header, "arrays": entries}).encode()
        file.write(_PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text)
        begin = _aligned(_PREFIX.size + len(text))
        for entry, array in zip(entries, arrays.values(), strict=True):
            file.write(bytes(begin + entry["offset"] - file.tell()))
            file.write(_bytes(_little_endian(array)))


def read(path: str | os.PathLike[str], mmap: bool, verify: bool) -> tuple[Header, Arrays]:
    """Header and arrays of a file; sizes are always checked, checksums of the arrays if `verify`.

    Args:
        mmap: map the arrays into memory, to be read when they are used, instead of copying them.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        header, begin = _read_header(path, file, size)
        if mmap:
            raw: NDArray[np.uint8] = np.memmap(file, dtype=np.uint8, mode="r")
        else:
            file.seek(0)
            raw = np.fromfile(file, dtype=np.uint8)
    raw.flags.writeable = False
    arrays = {}
    for entry in header.pop("arrays"):
        arrays[entry["name"]] = _array(path, raw, begin, entry, verify)
    return header, arrays


def _read_header(path: Path, file: IO[bytes], size: int) -> tuple[Header, int]:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
        raise CorruptFileError(f"{path} is not an index: give a file that Index.save wrote")
    _, version, length, crc = _PREFIX.unpack(prefix)
    if version > VERSION:
        raise CorruptFileError(
            f"{path} has format version {version}: update doraemon-index, which reads up to {VERSION}"
        )
    text = file.read(length)
    if len(text) < length or zlib.crc32(text) != crc:
        raise _damaged(path, "its header")
    header: Header = json.loads(text)
    begin = _aligned(_PREFIX.size + length)
    ends = [begin + entry["offset"] + _nbytes(entry) for entry in header["arrays"]]
    if max(ends, default=0) > size:
        raise CorruptFileError(f"{path} is cut off after {size} of {max(ends)} bytes: copy it again or save it anew")
    return header, begin


def _array(path: Path, raw: NDArray[np.uint8], begin: int, entry: Header, verify: bool) -> NDArray[Any]:
    start = begin + entry["offset"]
    part = raw[start : start + _nbytes(entry)]
    if verify and zlib.crc32(part) != entry["crc32"]:
        raise _damaged(path, f"array {entry['name']!r}")
    dtype = _dtype(entry)
    array = part.view(dtype).reshape(entry["shape"])
    return array.view(np.ndarray).astype(dtype.newbyteorder("="), copy=False)


def _damaged(path: Path, part: str) -> CorruptFileError:
    return CorruptFileError(f"{path} is damaged: {part} does not match its checksum; copy it again or save it anew")


def _dtype(entry: Header) -> np.dtype[Any]:
    kind = entry["dtype"]
    return np.dtype(kind if isinstance(kind, str) else [tuple(field) for field in kind])


def _nbytes(entry: Header) -> int:
    count = 1
    for length in entry["shape"]:
        count *= length
    return count * _dtype(entry).itemsize


def _little_endian(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)


def _bytes(array: NDArray[Any]) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8) if array.size else b"")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the name `path`, on the disk, when the block ends well, and vanishes when it does not."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Make a rename survive a power cut, where the system lets directories be opened."""
    if os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
