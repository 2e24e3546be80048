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
import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import Arrays
from .dtypes import Described, described, parsed
from .errors import CorruptFileError, damaged
from .replacing import clear_unfinished, replacing

MAGIC = b"DORAEMON"
VERSION = 1
ALIGNMENT = 64
_PREFIX = struct.Struct("<8sIII")
MAX_HEADER = 1 << 24  #: bytes; what is longer was not written by `write`

Header = dict[str, Any]


def write(path: str | os.PathLike[str], header: Header, arrays: Arrays) -> None:
    """Write a file, or leave what was there untouched.

    Raises TypeError, before anything is written, if an array cannot be saved.
    """
    kinds = {name: _described(name, array.dtype) for name, array in arrays.items()}
    with replacing(Path(path)) as file:
        entries: list[Header] = []
        offset = 0
        for name, array in arrays.items():
            raw = _bytes(array)
            offset = _aligned(offset)
            crc = zlib.crc32(raw)
            entries.append({"name": name, "dtype": kinds[name], "shape": array.shape, "offset": offset, "crc32": crc})
            offset += raw.nbytes
        text = json.dumps({**header, "arrays": entries}).encode()
        if len(text) > MAX_HEADER:
            raise TypeError("the values have too many fields to be saved: split them into several maps, or pickle")
        file.write(_PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text)
        begin = _aligned(_PREFIX.size + len(text))
        for entry, array in zip(entries, arrays.values(), strict=True):
            file.write(bytes(begin + entry["offset"] - file.tell()))
            file.write(_bytes(array))


def read(path: str | os.PathLike[str], mmap: bool, verify: bool) -> tuple[Header, Arrays]:
    """Header and arrays of a file; types and sizes are always checked, checksums of the arrays if `verify`.

    Args:
        mmap: map the arrays into memory, to be read when they are used, instead of copying them.

    Raises:
        CorruptFileError: something is wrong with it; the message goes on from the file's name.
    """
    path = Path(path)
    clear_unfinished(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, begin = _read_header(file, size)
        entries = header.pop("arrays")
        end = max([begin + entry.offset + entry.nbytes for entry in entries], default=0)
        if end > size:
            raise CorruptFileError(f"is cut off after {size} of {end} bytes: copy it again or save it anew")
        if mmap:
            raw: NDArray[np.uint8] = np.memmap(file, dtype=np.uint8, mode="r").view(np.ndarray)
        else:
            file.seek(0)
            raw = np.fromfile(file, dtype=np.uint8)
    raw.flags.writeable = False
    return header, {entry.name: _array(raw[begin:], entry, verify) for entry in entries}


class _Entry(NamedTuple):
    """What the header says of one array."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    crc: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _read_header(file: IO[bytes], size: int) -> tuple[Header, int]:
    """The header, with its arrays as entries, and where the arrays begin."""
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
        raise CorruptFileError("is not an index: give a file that Index.save wrote")
    _, version, length, crc = _PREFIX.unpack(prefix)
    if version > VERSION:
        raise CorruptFileError(f"has format version {version}: update doraemon-index, which reads up to {VERSION}")
    text = file.read(length) if length <= min(MAX_HEADER, size) else b""
    if len(text) < length or zlib.crc32(text) != crc or version < 1:
        raise damaged("its header does not match its checksum")
    try:
        header = json.loads(text)
        entries = [_entry(entry, size) for entry in header["arrays"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(f"its header is not one that Index.save wrote, {type(error).__name__}: {error}") from None
    if len({entry.name for entry in entries}) < len(entries):
        raise damaged("its header names an array twice")
    if any(entry.offset != before for entry, before in zip(entries, _offsets(entries), strict=True)):
        raise damaged("its arrays do not follow each other")
    return {**header, "arrays": entries}, _aligned(_PREFIX.size + length)


def _entry(entry: Any, size: int) -> _Entry:
    name, shape, offset, crc = entry["name"], entry["shape"], entry["offset"], entry["crc32"]
    if not isinstance(name, str) or not isinstance(shape, list) or len(shape) > 2:
        raise TypeError("an array without a name or a shape")
    numbers = [*((length, size) for length in shape), (offset, size), (crc, 2**32)]
    if not all(type(number) is int and 0 <= number <= most for number, most in numbers):
        raise TypeError(f"array {name!r} has sizes that are no sizes")
    return _Entry(name, parsed(entry["dtype"]), tuple(shape), offset, crc)


def _offsets(entries: list[_Entry]) -> Iterator[int]:
    """Where the arrays begin, one after the other."""
    offset = 0
    for entry in entries:
        offset = _aligned(offset)
        yield offset
        offset += entry.nbytes


def _array(raw: NDArray[np.uint8], entry: _Entry, verify: bool) -> NDArray[Any]:
    part = raw[entry.offset : entry.offset + entry.nbytes]
    if verify and zlib.crc32(part) != entry.crc:
        raise damaged(f"array {entry.name!r} does not match its checksum")
    if len(part) == 0:
        return np.zeros(entry.shape, dtype=entry.dtype)
    return part.view(entry.dtype).reshape(entry.shape).astype(entry.dtype.newbyteorder("="), copy=False)


def _described(name: str, dtype: np.dtype[Any]) -> Described:
    if dtype.hasobject:
        raise TypeError(f"{name} of dtype {dtype} cannot be saved: give numbers or fixed-size strings, or pickle")
    return described(dtype.newbyteorder("<"))


def _bytes(array: NDArray[Any]) -> memoryview:
    """The array's bytes, little-endian."""
    raw = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return memoryview(raw.reshape(-1).view(np.uint8) if raw.nbytes else b"")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
