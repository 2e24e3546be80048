"""The header of a GGUF file: its metadata, and where each tensor lies.

The reader of the package `gguf` takes 6 to 9 seconds for a large vocabulary, because it makes an array of every token;
here they are skipped. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
#: what a value of metadata is, by the number of its type; strings and arrays are 8 and 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
        kind: number of its type, as in `gguf.GGMLQuantizationType`.
        elements: number of its elements.
        dimensions: how many it has.
        offset: where its bytes begin in the file.
    """

    kind: int
    elements: int
    dimensions: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What the header of a file says.

    Attributes:
        metadata: numbers and strings by their keys; arrays are left out.
        tensors: in the order of the file.
    """

    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]

    @classmethod
    def read(cls, path: Path) -> Header:
        """Read the header of a file.

        Raises:
            ValueError, struct.error: the file is no GGUF file, of another version, or ends within the header.
        """
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parsed(_Cursor(data))


class _Cursor:
    """Reads one value behind the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return value

    def string(self) -> bytes:
        start = self.place + 8
        self.place = start + self.number("Q")
        if self.place > len(self.data):
            raise ValueError("a string ends behind the end of the file")
        return self.data[start : self.place]

    def value(self, kind: int) -> Any:
        """A value of metadata; None for an array, which is skipped."""
        if kind == _STRING:
            return self.string().decode("utf-8", "replace")
        if kind == _ARRAY:
            self._skip_array()
            return None
        if kind not in _SCALARS:
            raise ValueError(f"there is no metadata of type {kind}")
        return self.number(_SCALARS[kind])

    def _skip_array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            self.place += count * struct.calcsize(f"<{_SCALARS[kind]}")
            return
        for _ in range(count):
            self.value(kind)


def _parsed(cursor: _Cursor) -> Header:
    if cursor.data[:4] != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    cursor.place = 4
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"it is GGUF version {version}, and {_VERSIONS[0]} or {_VERSIONS[1]} is wanted")
    count, entries = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(entries):
        key = cursor.string().decode("utf-8", "replace")
        metadata[key] = cursor.value(cursor.number("I"))
    tensors = [_tensor(cursor) for _ in range(count)]
    alignment = metadata.get("general.alignment") or _ALIGNMENT
    start = -(-cursor.place // alignment) * alignment
    placed = (Tensor(each.kind, each.elements, each.dimensions, start + each.offset) for each in tensors)
    return Header({key: value for key, value in metadata.items() if value is not None}, tuple(placed))


def _tensor(cursor: _Cursor) -> Tensor:
    """The next entry of the table of tensors; its offset counts from the end of the header."""
    cursor.string()  # its name
    shape = [cursor.number("Q") for _ in range(cursor.number("I"))]
    kind, offset = cursor.number("I"), cursor.number("Q")
    return Tensor(kind, prod(shape), len(shape), offset)
