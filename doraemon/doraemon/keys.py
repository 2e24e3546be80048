"""Keys that are numbers or times: the order-preserving map between each dtype and the codes that all else works on.

A query need not be a key: 1.5 may be asked of an int32 index, -1 of a uint64 one, 2**70 of either. Each query is
therefore mapped to a `Cut`: the least code that is not below it, whether the query *is* that code, and whether it is
above every code. What is then counted is what exact comparison of the numbers would have counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import times
from .arrays import Codes, Mask
from .dtypes import Described
from .inputs import as_number, as_scalar, as_sequence, numpy_dtype
from .keytype import CODES, Cut, Cuts, KeyType

SUPPORTED = "uint64, int64, uint32, int32, float64, float32, datetime64 with a unit, str or bytes"
_SIGN = np.uint64(1 << 63)
_NUMBERS = frozenset({"uint64", "int64", "uint32", "int32", "float64", "float32"})


@dataclass(frozen=True)
class NumberType(KeyType):
    """The type of keys that are numbers or times.

    Attributes:
        dtype: one of the supported ones, in native byte order.
    """

    dtype: np.dtype[Any]

    @classmethod
    def of(cls, dtype: DTypeLike) -> NumberType:
        """The key type of a NumPy dtype; refuses those that are not supported."""
        dtype = as_dtype(dtype).newbyteorder("=")
        if dtype.str[1:] == "M8":
            raise TypeError("datetime64 keys need a unit: give dtype='datetime64[ns]', say")
        if dtype.kind == "M" and dtype.str[4].isdigit():
            raise TypeError(f"{dtype} counts in multiples of a unit: convert the keys to the unit itself")
        if dtype.kind != "M" and dtype.name not in _NUMBERS:
            raise TypeError(f"keys of dtype {dtype} are not supported: convert them to {SUPPORTED}")
        return cls(dtype)

    @property
    def is_float(self) -> bool:
        """Whether keys are floats."""
        return self.dtype.kind == "f"

    @property
    def bits(self) -> int:
        """The number of bits of a key, and of its code."""
        return self.dtype.itemsize * 8

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @cached_property
    def ends(self) -> tuple[int, int]:
        """The least and the largest code that a key can have: NaN and NaT have none."""
        if self.is_float:
            least, largest = self._encode_floats(np.array([-np.inf, np.inf], dtype=self.dtype)).tolist()
            return least, largest
        return int(self.dtype.kind == "M"), self.top

    # ---- keys, which must be in the type's domain

    def encode(self, keys: NDArray[Any]) -> Codes:
        """The codes of an array of this very dtype. NaN and NaT have no place in an order and are refused."""
        if keys.dtype != self.dtype:
            raise TypeError(f"keys of dtype {keys.dtype} for an index of {self.dtype}: convert them with astype")
        keys = np.ascontiguousarray(keys)
        if self.dtype.kind == "u":
            return keys.astype(np.uint64, copy=False)
        if self.is_float:
            return self._encode_floats(keys)
        if self.dtype.kind == "M":
            _refuse_missing(np.isnat(keys), "NaT", "np.isnat")
        if self.bits == 32:
            return (keys.astype(np.int64) + 2**31).astype(np.uint64)
        codes: Codes = keys.view(np.uint64) ^ _SIGN
        return codes

    def _encode_floats(self, keys: NDArray[Any]) -> Codes:
        _refuse_missing(np.isnan(keys), "NaN", "np.isnan")
        unsigned = np.uint64 if self.bits == 64 else np.uint32
        raw = (keys + self.dtype.type(0)).view(unsigned)  # adding makes -0.0, which equals 0.0, the same bits
        sign = unsigned(1 << (self.bits - 1))
        codes: Codes = np.where(raw & sign, ~raw, raw | sign).astype(np.uint64, copy=False)
        return codes

    def decode(self, codes: Codes) -> NDArray[Any]:
        """The keys of codes: what `encode` was given, but for the sign of zero."""
        kind, itemsize = self.dtype.kind, self.dtype.itemsize
        if kind == "u":
            return codes.astype(self.dtype)
        if kind == "f":
            sign = np.uint64(1 << (self.bits - 1))
            raw = np.where(codes & sign, codes ^ sign, ~codes)
            floats: NDArray[Any] = raw.astype(f"u{itemsize}").view(self.dtype)
            return floats
        if itemsize == 4:
            return (codes.astype(np.int64) - 2**31).astype(np.int32)
        return (codes ^ _SIGN).view(self.dtype)

    @property
    def scanned(self) -> np.dtype[Any]:
        return self.dtype if self.dtype.kind in "ui" and self.dtype.itemsize == 8 else CODES

    def decode_one(self, code: int) -> Any:
        """One key as users see it: a Python int or float, or a NumPy datetime64."""
        if self.dtype.kind in "ui":
            return code - (1 << (self.bits - 1)) if self.dtype.kind == "i" else code
        key = self.decode(np.array([code], dtype=np.uint64))[0]
        return key if self.dtype.kind == "M" else key.item()

    def items(self, keys: NDArray[Any]) -> list[Any]:
        """Python's numbers, or NumPy's times."""
        return list(keys) if self.dtype.kind == "M" else super().items(keys)

    @property
    def description(self) -> Described:
        """The dtype as little-endian."""
        return self.dtype.str.replace(">", "<")

    def has_codes(self, codes: Codes) -> bool:
        """Whether these are all codes of keys: NaN, NaT and -0.0, which is 0.0, have none."""
        least, largest = self.ends
        inside = (codes >= np.uint64(least)) & (codes <= np.uint64(largest))
        if self.is_float:
            inside &= codes != np.uint64(self.encode_one(0) - 1)
        return bool(inside.all())

    # ---- queries, which may be any number

    def cut_one(self, query: Any) -> Cut:
        """Where one query cuts the codes."""
        query = as_scalar(query)
        if self.dtype.kind == "M":
            cuts = self.cuts(np.array([times.as_time(query)]))
            exact = cuts.exact is None or bool(cuts.exact[0])
            return Cut(None if cuts.above is not None and cuts.above[0] else int(cuts.codes[0]), exact)
        number = as_number(query)
        return self._cut_float_domain(number) if self.is_float else self._cut_int_domain(number)

    def _cut_int_domain(self, query: int | float | Fraction) -> Cut:
        if isinstance(query, float) and math.isinf(query):
            return Cut(None, False) if query > 0 else Cut(0, False)
        whole = math.ceil(query)
        offset = (1 << (self.bits - 1)) if self.dtype.kind == "i" else 0
        code = whole + offset
        if code < 0:
            return Cut(0, False)
        return Cut(code, whole == query) if code <= self.top else Cut(None, False)

    def _cut_float_domain(self, query: int | float | Fraction) -> Cut:
        """The least float that is not below the query; Python compares ints, fractions and floats exactly."""
        try:
            with np.errstate(over="ignore"):
                near = self.dtype.type(float(query))
        except OverflowError:  # beyond the largest float64
            near = self.dtype.type(math.inf if query > 0 else -math.inf)
        if float(near) < query:
            near = np.nextafter(near, self.dtype.type(math.inf))
        return Cut(int(self._encode_floats(np.array([near]))[0]), float(near) == query)

    def cuts(self, queries: ArrayLike) -> Cuts:
        """Where many queries cut the codes. Arrays of the index's own dtype take the short way."""
        array = as_sequence(queries)
        if isinstance(array, list):
            return self._cut_each(array)
        if array.ndim != 1:
            raise ValueError(f"queries have {array.ndim} dimensions: flatten them with ravel()")
        if array.dtype.newbyteorder("=") == self.dtype:
            return Cuts(self.encode(array.astype(self.dtype, copy=False)), None, None)
        if self.dtype.kind == "M":
            return self._cut_times(array)
        if array.dtype.kind in "iu" and not self.is_float:
            return self._cut_ints(array)
        if array.dtype == np.float32 and self.dtype == np.float64:
            return Cuts(self.encode(array.astype(np.float64)), None, None)
        return self._cut_each(array)

    def _cut_ints(self, array: NDArray[Any]) -> Cuts:
        """Integers of another width or sign: those outside the domain are clipped to it and marked."""
        domain = np.iinfo(self.dtype)
        below, above = array < domain.min, array > domain.max
        inside = np.where(below | above, array.dtype.type(0), array).astype(self.dtype)
        codes = self.encode(inside)
        codes = np.where(below, np.uint64(0), np.where(above, np.uint64(self.top), codes))
        return Cuts(codes, ~(below | above), above)

    def _cut_times(self, array: NDArray[Any]) -> Cuts:
        """Times of another unit: finer ones are rounded up, coarser ones are multiples of ours or beyond its reach."""
        if array.dtype.kind in "OU":
            return self._cut_each(array)
        if array.dtype.kind != "M":
            raise TypeError(f"queries of dtype {array.dtype} for an index of {self.dtype}: give datetime64 values")
        _refuse_missing(np.isnat(array), "NaT", "np.isnat")
        ticks, unit = times.in_linear_unit(array, self.dtype)
        ours = times.unit_of(self.dtype)
        if unit < ours:
            whole, exact = times.rounded_up(ticks, ours // unit)
            return Cuts(self.encode(whole.view(self.dtype)), exact, None)
        inside, below, above = times.multiplied(ticks, unit // ours)
        codes = np.where(below, np.uint64(0), self.encode(inside.view(self.dtype)))
        return Cuts(codes, ~(below | above), above)

    def _cut_each(self, queries: list[Any] | NDArray[Any]) -> Cuts:
        """One by one, for lists and for arrays that no cast maps exactly."""
        quick = self._plain_list(queries)
        if quick is not None:
            return Cuts(self.encode(quick), None, None)
        cuts = [self.cut_one(query) for query in queries]
        codes = np.array([self.top if cut.code is None else cut.code for cut in cuts], dtype=np.uint64)
        exact = np.array([cut.exact for cut in cuts], dtype=np.bool_)
        return Cuts(codes, exact, np.array([cut.code is None for cut in cuts], dtype=np.bool_))

    def _plain_list(self, queries: list[Any] | NDArray[Any]) -> NDArray[Any] | None:
        """A list of Python numbers as an array, if NumPy makes one without passing ints through float."""
        plain = {"i": int, "u": int, "f": float}.get(self.dtype.kind)
        if self.dtype == np.float32 or not isinstance(queries, list):
            return None
        if not all(type(query) is plain for query in queries):
            return None
        try:
            return np.array(queries, dtype=self.dtype)
        except OverflowError:
            return None


def _refuse_missing(missing: Mask, name: str, test: str) -> None:
    if missing.any():
        raise ValueError(f"{name} has no place in an order: drop such keys with keys[~{test}(keys)]")


def as_dtype(dtype: Any) -> np.dtype[Any]:
    """A NumPy dtype, also of pandas' nullable ones. Raises TypeError if there is none."""
    try:
        return numpy_dtype(dtype) or np.dtype(dtype)
    except TypeError:
        raise TypeError(f"keys of dtype {dtype} are not supported: convert them to {SUPPORTED}") from None
