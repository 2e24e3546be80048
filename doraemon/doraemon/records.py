"""Keys that are records: a few numbers or times each, in the order of the first field, then of the second, and so on.

Where the fields' codes fit into 64 bits, they are the record's code. Else they become bytes, most significant first,
which a lexicon has codes for. Either way a query is a tuple, and one of fewer fields is below all records that begin
with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arrays import Codes
from .dtypes import Described, described
from .engine import Engine
from .inputs import as_scalar, as_sequence, is_batch
from .keys import NumberType
from .keytype import Cut, Cuts, KeyType
from .lexicon import ABOVE, Lexicon
from .strings import Packed
from .texts import LexiconType

Columns = list[Codes]


class Whole(NamedTuple):
    """Where one query cuts the records, their fields' codes one after the other: None if it is above all."""

    bits: int | None
    exact: bool


class Fields:
    """The fields of records.

    Attributes:
        dtype: of the records, in native byte order and without padding.
        types: of the fields.
        bits: of all fields' codes.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        fields = [(name, dtype[name]) for name in dtype.names or ()]
        wrong = [name for name, field in fields if field.names or field.subdtype]
        if wrong:
            raise TypeError(f"field {wrong[0]!r} has parts of its own: give each of them a field")
        self.types = [NumberType.of(field) for _, field in fields]
        self.names = [name for name, _ in fields]
        self.dtype = np.dtype([(name, kind.dtype) for name, kind in zip(self.names, self.types, strict=True)])
        self.bits = sum(kind.bits for kind in self.types)

    def cut(self, query: Any) -> Whole:
        """Where a tuple or record cuts the records. Raises TypeError if it is neither, or has too many fields."""
        parts, left, bits = self._parts(query), self.bits, 0
        for kind, part in zip(self.types, parts, strict=False):
            code, exact = kind.cut_one(part)
            left -= kind.bits
            if code is None:
                after = (bits + 1) << (left + kind.bits)
                return Whole(after if after >> self.bits == 0 else None, False)
            bits = bits << kind.bits | code
            if not exact:
                return Whole(bits << left, False)
        return Whole(bits << left, len(parts) == len(self.types))

    def _parts(self, query: Any) -> list[Any]:
        query = as_scalar(query)
        if isinstance(query, np.void) and query.dtype.names:
            query = tuple(query[name] for name in query.dtype.names)
        if not isinstance(query, tuple):
            raise TypeError(f"{query!r} is no record: ask with a tuple of up to {len(self.types)} fields")
        if len(query) > len(self.types):
            raise TypeError(f"{query!r} has {len(query)} fields: records of this index have {len(self.types)}")
        return list(query)

    def columns(self, records: NDArray[Any] | list[Any]) -> Columns | None:
        """The codes of each field, if all records are ones of this type."""
        if isinstance(records, list):
            rows = [self._parts(record) for record in records]
            if any(len(row) < len(self.types) for row in rows):
                return None
            columns: list[Any] = [[row[place] for row in rows] for place in range(len(self.types))]
        else:
            if records.dtype.names is None and (records.dtype == object or len(records) == 0):
                return self.columns(records.tolist())
            if records.ndim != 1 or len(records.dtype.names or ()) != len(self.types):
                raise TypeError(f"an array of {records.dtype} for records of {self.dtype}: give a structured array")
            columns = [records[name] for name in records.dtype.names or ()]
        cuts = [kind.cuts(column) for kind, column in zip(self.types, columns, strict=True)]
        if all(cut.exact is None or cut.exact.all() for cut in cuts):
            return [cut.codes for cut in cuts]
        return None

    def each(self, records: NDArray[Any] | list[Any]) -> list[Whole]:
        """Where each of many queries cuts the records."""
        return [self.cut(record) for record in records]

    def decode(self, columns: Columns) -> NDArray[Any]:
        """The records of their fields' codes."""
        records = np.zeros(len(columns[0]), dtype=self.dtype)
        for name, kind, codes in zip(self.names, self.types, columns, strict=True):
            records[name] = kind.decode(codes)
        return records

    def items(self, records: NDArray[Any]) -> list[Any]:
        """Records as tuples of Python numbers and NumPy's times."""
        columns = [kind.items(records[name]) for name, kind in zip(self.names, self.types, strict=True)]
        return list(zip(*columns, strict=True))

    def have_codes(self, columns: Columns) -> bool:
        """Whether all fields have codes of keys."""
        return all(kind.has_codes(codes) for kind, codes in zip(self.types, columns, strict=True))


class _OfFields(KeyType):
    """Records, whose items are tuples."""

    fields: Fields

    def items(self, keys: NDArray[Any]) -> list[Any]:
        return self.fields.items(keys)

    def is_batch(self, given: Any) -> bool:
        return not isinstance(given, tuple) and is_batch(given)

    @property
    def description(self) -> Described:
        return described(self.dtype.newbyteorder("<"))


class RecordType(_OfFields):
    """Records whose fields' codes fit into one of 64 bits."""

    def __init__(self, fields: Fields) -> None:
        self.fields, self.dtype = fields, fields.dtype

    def cut_one(self, query: Any) -> Cut:
        return Cut(*self.fields.cut(query))

    def cuts(self, queries: ArrayLike) -> Cuts:
        items = as_sequence(queries)
        columns = self.fields.columns(items)
        if columns is not None:
            return Cuts(self._joined(columns), None, None)
        wholes = self.fields.each(items)
        above = np.array([whole.bits is None for whole in wholes], dtype=np.bool_)
        codes = np.array([whole.bits or 0 for whole in wholes], dtype=np.uint64)
        codes[above] = ABOVE
        return Cuts(codes, np.array([whole.exact for whole in wholes], dtype=np.bool_), above)

    def _joined(self, columns: Columns) -> Codes:
        codes = np.zeros(len(columns[0]), dtype=np.uint64)
        for kind, column in zip(self.fields.types, columns, strict=True):
            codes = (codes << np.uint64(kind.bits) if kind.bits < 64 else codes) | column
        return codes

    def _columns(self, codes: Codes) -> Columns:
        columns = []
        for kind in reversed(self.fields.types):
            columns.append(codes & np.uint64(kind.top))
            codes = codes >> np.uint64(kind.bits) if kind.bits < 64 else codes
        return columns[::-1]

    def decode(self, codes: Codes) -> NDArray[Any]:
        return self.fields.decode(self._columns(codes))

    def has_codes(self, codes: Codes) -> bool:
        return self.fields.have_codes(self._columns(codes))


class WideRecordType(_OfFields, LexiconType):
    """Records of more than 64 bits."""

    def __init__(self, fields: Fields, engine: Engine, lexicon: Lexicon | None = None) -> None:
        super().__init__(fields.dtype, engine, lexicon)
        self.fields, self.size = fields, fields.bits // 8

    def _with(self, lexicon: Lexicon) -> Self:
        return type(self)(self.fields, self.engine, lexicon)

    def _packed(self, keys: Any) -> Packed:
        columns = self.fields.columns(as_sequence(keys))
        if columns is None:
            raise self._not_a_key("a key")
        return self._joined(columns)

    def _joined(self, columns: Columns) -> Packed:
        data = np.empty((len(columns[0]), self.size), dtype=np.uint8)
        for (first, last), column in zip(self._places(), columns, strict=True):
            data[:, first:last] = column.astype(">u8").view(np.uint8).reshape(-1, 8)[:, first - last :]
        return Packed(data.reshape(-1), np.arange(len(data) + 1) * self.size)

    def _columns(self, data: NDArray[np.uint8]) -> Columns:
        columns = []
        for first, last in self._places():
            wide = np.zeros((len(data), 8), dtype=np.uint8)
            wide[:, first - last :] = data[:, first:last]
            columns.append(wide.view(">u8")[:, 0].astype(np.uint64))
        return columns

    def _places(self) -> list[tuple[int, int]]:
        """Where each field's bytes begin and end."""
        ends = np.cumsum([kind.bits // 8 for kind in self.fields.types]).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def cut_one(self, query: Any) -> Cut:
        bits, exact = self.fields.cut(query)
        if bits is None:
            return Cut(None, False)
        code = self.lexicon.code_of(bits.to_bytes(self.size, "big"))
        return Cut(code, exact and code & 1 == 0) if exact else Cut(code - 1 | 1, False)

    def cuts(self, queries: ArrayLike) -> Cuts:
        """All exact, as an odd code is no key's."""
        items = as_sequence(queries)
        columns = self.fields.columns(items)
        if columns is not None:
            return Cuts(self.lexicon.codes_of(self._joined(columns)), None, None)
        cuts = [self.cut_one(record) for record in items]
        return Cuts(np.array([ABOVE if cut.code is None else cut.code for cut in cuts], dtype=np.uint64), None, None)

    def decode(self, codes: Codes) -> NDArray[Any]:
        texts: list[bytes] = self.lexicon.texts_of(codes, False)
        data = np.frombuffer(b"".join(texts), dtype=np.uint8).reshape(len(texts), self.size)
        return self.fields.decode(self._columns(data))

    def _check_texts(self, texts: list[bytes]) -> None:
        if any(len(text) != self.size for text in texts):
            raise ValueError("a record has not the size of its fields")
        data = np.frombuffer(b"".join(texts), dtype=np.uint8).reshape(len(texts), self.size)
        if not self.fields.have_codes(self._columns(data)):
            raise ValueError("a field has no value")


def record_type(dtype: np.dtype[Any], engine: Engine) -> RecordType | WideRecordType:
    """The key type of a structured dtype. Raises TypeError if a field's dtype is not supported."""
    fields = Fields(dtype)
    return RecordType(fields) if fields.bits <= 64 else WideRecordType(fields, engine)
