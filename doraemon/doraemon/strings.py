"""Packed texts: many str or bytes as two arrays, made of whatever users hand in, and what is done to them as a whole.

A str is packed as its UTF-8 bytes, whose order is that of its code points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Ints, Mask
from .engine import Engine, native
from .inputs import as_sequence

_ARROW_TYPES = {True: ("string", "large_string", "string_view"), False: ("binary", "large_binary", "binary_view")}
_VIEWS = {"string_view": "large_string", "binary_view": "large_binary"}


@dataclass(frozen=True, eq=False)
class Packed:
    """Texts one after the other.

    Attributes:
        data: uint8, their bytes.
        offsets: int64 [texts + 1], ascending: text i is from `offsets[i]` to `offsets[i + 1]`.
    """

    data: NDArray[np.uint8]
    offsets: Ints

    @property
    def count(self) -> int:
        """How many texts there are."""
        return len(self.offsets) - 1

    @property
    def nbytes(self) -> int:
        """The bytes of both arrays."""
        return self.data.nbytes + self.offsets.nbytes


@dataclass(frozen=True, eq=False)
class Listed:
    """Texts as a list has them, for questions: read where they lie, and not packed first.

    Attributes:
        items: str, or, unless `is_text`, bytes; whether they are is not known yet.
    """

    items: list[Any]
    is_text: bool
    engine: Engine

    @property
    def count(self) -> int:
        """How many texts there are."""
        return len(self.items)

    def packed(self) -> Packed:
        """The same texts, packed. Raises what `pack` does."""
        return pack(self.items, self.is_text, self.engine)


# ---- from users


def queried(given: Any, is_text: bool, engine: Engine) -> Packed | Listed:
    """The texts of what `pack` takes, of a list as they lie. Raises what `pack` does, but for what is in a list."""
    return Listed(given, is_text, engine) if type(given) is list else pack(given, is_text, engine)


def pack(given: Any, is_text: bool, engine: Engine) -> Packed:
    """The texts of a list, an array of strings, a Series or an Arrow column.

    Raises:
        TypeError: something is no str, or, unless `is_text`, no bytes.
        ValueError: something is missing, or a str has no UTF-8 as it holds half a surrogate pair.
    """
    if isinstance(given, Packed):
        return given
    columns = _arrow_columns(given, is_text)
    if columns is not None:
        return concatenated([_of_arrow(column, is_text) for column in columns])
    items = as_sequence(given)
    if isinstance(items, list):
        return _of_list(items, is_text, engine)
    if items.ndim != 1:
        raise ValueError(f"there are {items.ndim} dimensions: flatten them with ravel()")
    if items.dtype.kind == ("U" if is_text else "S") and items.dtype.itemsize:
        fixed = _of_fixed(items)
        if fixed is not None:
            return fixed
    return _of_list(items.tolist(), is_text, engine)


def column_is_text(given: Any) -> bool | None:
    """Whether an Arrow column is of str, False if it is of bytes; None if it is of something else or no such column."""
    kind = str(getattr(given, "type", None))
    return next((is_text for is_text, kinds in _ARROW_TYPES.items() if kind in kinds), None)


def encoded(item: Any, is_text: bool) -> bytes:
    """The bytes of one str, or, unless `is_text`, of bytes. Raises what `pack` does."""
    if not isinstance(item, str if is_text else bytes):
        raise _type_error(item, is_text)
    try:
        return item.encode() if isinstance(item, str) else bytes(item)
    except UnicodeEncodeError:
        raise ValueError(
            f"{item!r} holds half a surrogate pair, which UTF-8 has no bytes for: "
            'make an index of bytes with key.encode("utf-8", "surrogatepass")'
        ) from None


def _type_error(item: Any, is_text: bool) -> Exception:
    if item is None or item is np.ma.masked or (isinstance(item, float) and math.isnan(item)) or _is_na(item):
        return ValueError("a text is missing: drop such entries with dropna(), or fill them with fillna()")
    if isinstance(item, str | bytes):
        return TypeError(
            f"{item!r} is a str, and the keys are bytes: ask with key.encode()"
            if isinstance(item, str)
            else f"{item!r} is bytes, and the keys are str: ask with key.decode()"
        )
    kind = "str" if is_text else "bytes"
    return TypeError(f"{item!r} is no {kind}, as the keys are: convert it, or make the index of its own type")


def _is_na(item: Any) -> bool:
    return type(item).__name__ == "NAType"  # pandas' NA, which compares to nothing


def _of_list(items: list[Any], is_text: bool, engine: Engine) -> Packed:
    if engine == "native":
        offsets = np.empty(len(items) + 1, dtype=np.int64)
        data = native.pack(items, is_text, offsets)
        if isinstance(data, bytes):
            return Packed(np.frombuffer(data, dtype=np.uint8), offsets)
        encoded(items[data], is_text)  # which raises what is wrong with it
    return _joined([encoded(item, is_text) for item in items])


def _joined(texts: list[bytes]) -> Packed:
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    return Packed(np.frombuffer(b"".join(texts), dtype=np.uint8), _offsets_of(lengths))


def _offsets_of(lengths: Ints) -> Ints:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _of_fixed(items: NDArray[Any]) -> Packed | None:
    """Texts of an array whose items are of one size, ended by zeros; None for str that are not all ASCII."""
    items = np.ascontiguousarray(items.astype(items.dtype.newbyteorder("="), copy=False))
    width = np.uint8 if items.dtype.kind == "S" else np.uint32
    characters = items.view(width).reshape(len(items), -1)
    if width is np.uint32:
        if characters.size and int(characters.max()) > 127:
            return None
        characters = characters.astype(np.uint8)
    lengths = np.strings.str_len(items).astype(np.int64)
    inside = np.arange(characters.shape[1]) < lengths[:, None]
    return Packed(characters[inside].astype(np.uint8, copy=False), _offsets_of(lengths))


def _arrow_columns(given: Any, is_text: bool) -> list[Any] | None:
    """The parts of an Arrow column, or of a Series that has one; None for all else."""
    held = getattr(getattr(given, "array", given), "__arrow_array__", None)
    try:
        column = given if held is None else held()
    except ImportError:  # pandas has its texts without Arrow
        return None
    if not hasattr(column, "null_count") or not hasattr(column, "type"):
        return None
    if column.null_count:
        raise ValueError("a text is missing: drop such entries with drop_null(), or fill them with fill_null()")
    if str(column.type).startswith("dictionary"):
        return None
    kind = str(column.type)
    if kind not in _ARROW_TYPES[is_text]:
        raise TypeError(f"a column of {kind}, and the keys are {'str' if is_text else 'bytes'}: cast it")
    if is_text:
        column.validate(full=True)  # that it is UTF-8
    column = column.cast(_VIEWS[kind]) if kind in _VIEWS else column
    return list(column.chunks) if hasattr(column, "chunks") else [column]


def _of_arrow(column: Any, is_text: bool) -> Packed:
    """The texts of an Arrow array, sharing its memory where its offsets are of 64 bits."""
    _, offsets, data = column.buffers()
    wide = str(column.type).startswith("large")
    if len(column) == 0 or offsets is None:
        return Packed(np.zeros(0, dtype=np.uint8), np.zeros(len(column) + 1, dtype=np.int64))
    at = np.frombuffer(offsets, dtype=np.int64 if wide else np.int32)[column.offset :][: len(column) + 1]
    raw = np.zeros(0, dtype=np.uint8) if data is None else np.frombuffer(data, dtype=np.uint8)
    return Packed(raw, at.astype(np.int64, copy=False))


# ---- as a whole


def concatenated(parts: list[Packed]) -> Packed:
    """The texts of all parts; those of one part share its memory."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Packed(np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64))
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    data = [part.data[part.offsets[0] : part.offsets[-1]] for part in parts]
    return Packed(np.concatenate(data), _offsets_of(lengths))


def gathered(texts: Packed, numbers: Ints, engine: Engine) -> Packed:
    """A copy of the texts of some numbers, in their order."""
    offsets = _offsets_of(np.diff(texts.offsets)[numbers])
    if engine == "numpy":
        return Packed(np.frombuffer(b"".join(slices(texts, numbers)), dtype=np.uint8), offsets)
    data = np.empty(int(offsets[-1]), dtype=np.uint8)
    native.gather(texts.data, texts.offsets, numbers, data)
    return Packed(data, offsets)


def ordered(texts: Packed, engine: Engine) -> tuple[Ints, Mask]:
    """The numbers of the texts in their order, and whether each equals the one before it there."""
    if engine == "native":
        order, again = np.empty(texts.count, dtype=np.int64), np.empty(texts.count, dtype=np.bool_)
        native.order(texts.data, texts.offsets, order, again)
        return order, again
    items = slices(texts, np.arange(texts.count))
    order = np.array(sorted(range(len(items)), key=items.__getitem__), dtype=np.int64)
    again = np.array([i > 0 and items[order[i]] == items[order[i - 1]] for i in range(len(items))], dtype=np.bool_)
    return order, again


def unpacked(texts: Packed, numbers: Ints, is_text: bool, engine: Engine) -> list[Any]:
    """The str or bytes of some numbers. O(numbers)."""
    if engine == "native":
        return native.unpack(texts.data, texts.offsets, numbers, is_text)
    found = slices(texts, numbers)
    return [text.decode() for text in found] if is_text else found


def slices(texts: Packed, numbers: Ints) -> list[bytes]:
    """The bytes of some texts."""
    data, offsets = memoryview(texts.data), texts.offsets
    ends = zip(offsets[numbers].tolist(), offsets[numbers + 1].tolist(), strict=True)
    return [bytes(data[begin:end]) for begin, end in ends]
