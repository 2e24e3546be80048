"""What users hand in as keys, queries or values: arrays, Series, lists, iterators, single items. What is missing is
refused, and numbers of any type become Python's own, which compare with each other exactly."""

from __future__ import annotations

import array
import decimal
import math
import numbers
import operator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMPY_KINDS = "biufMm"
#: the methods that drop and fill missing entries, of pandas, Arrow and polars
_WITHOUT_MISSING = [("dropna", "fillna"), ("drop_null", "fill_null"), ("drop_nulls", "fill_null")]


def as_sequence(given: Any) -> NDArray[Any] | list[Any]:
    """An array where `given` is or has one, else a list of its items. The array may share the caller's memory.

    pandas' nullable dtypes become NumPy's, and times with a zone become those of UTC. Arrow's columns of one chunk are
    not copied, but for dictionaries and booleans.

    Raises:
        TypeError: it is a single item.
        ValueError: something in it is masked or missing.
    """
    if isinstance(given, np.ndarray):
        refuse_masked(given)
        return np.asarray(given)
    if isinstance(given, memoryview | bytearray | array.array):
        return np.asarray(given)
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        raise TypeError(
            f"{given!r} is not a sequence: give a list or an array, or ask for one key with bisect_left, `in` or get"
        )
    return _array_of(given) if hasattr(given, "__array__") else list(given)


def is_batch(given: Any) -> bool:
    """Whether something holds items, however many, and is not one item itself."""
    if hasattr(given, "__array__"):
        return np.ndim(given) > 0
    return hasattr(given, "__iter__") and not isinstance(given, str | bytes)


def refuse_masked(given: Any) -> None:
    """Raise ValueError if an entry of a masked array is masked."""
    if isinstance(given, np.ma.MaskedArray):
        mask = np.ascontiguousarray(np.ma.getmaskarray(given))
        if mask.view(np.bool_).any():
            raise ValueError("an entry is masked: drop such entries with compressed(), or fill them with filled()")


def _array_of(given: Any) -> NDArray[Any]:
    """The array of a Series or another holder of one, without the floats that NumPy would make of missing integers."""
    dtype = getattr(given, "dtype", None)
    if not isinstance(dtype, np.dtype) and _has_missing(given):
        drop, fill = next((ways for ways in _WITHOUT_MISSING if hasattr(given, ways[0])), _WITHOUT_MISSING[0])
        raise ValueError(f"an entry is missing: drop such entries with {drop}(), or fill them with {fill}()")
    wanted = numpy_dtype(dtype)
    return np.asarray(given) if wanted is None else np.asarray(given, dtype=wanted)


def _has_missing(given: Any) -> bool:
    test = getattr(given, "isna", None) or getattr(given, "is_null", None)
    return test is not None and bool(np.asarray(test()).any())


def numpy_dtype(dtype: Any) -> np.dtype[Any] | None:
    """The NumPy dtype of pandas' nullable dtypes and of times with a zone; None for all others."""
    if isinstance(dtype, np.dtype):
        return None
    if getattr(dtype, "kind", None) == "M" and hasattr(dtype, "unit") and hasattr(dtype, "tz"):
        return np.dtype(f"datetime64[{dtype.unit}]")
    wanted = getattr(dtype, "numpy_dtype", None)
    return wanted if isinstance(wanted, np.dtype) and wanted.kind in _NUMPY_KINDS else None


def as_scalar(given: Any) -> Any:
    """A single item out of an array without dimensions, and everything else as it is.

    Raises ValueError if it is masked.
    """
    if not isinstance(given, np.ndarray) or given.ndim:
        return given
    refuse_masked(given)
    return np.asarray(given)[()]


def as_number(given: Any) -> int | float | Fraction:
    """A number of any type as a Python int, float or fraction of exactly its value.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is NaN.
    """
    if isinstance(given, float | np.floating | decimal.Decimal):
        return _as_real(given)
    if isinstance(given, numbers.Rational) and not isinstance(given, numbers.Integral):
        return Fraction(int(given.numerator), int(given.denominator))
    try:
        whole: int = operator.index(given)
        return whole
    except TypeError:
        raise TypeError(f"{given!r} is not a number: ask with an int, a float or a NumPy number") from None


def _as_real(given: float | np.floating[Any] | decimal.Decimal) -> float | Fraction:
    if given.is_nan() if isinstance(given, decimal.Decimal) else math.isnan(given):
        raise ValueError("NaN has no place in an order: drop such keys with keys[~np.isnan(keys)]")
    near = float(given)
    if isinstance(given, decimal.Decimal | np.longdouble) and near != given and not _is_infinite(given):
        return Fraction(*given.as_integer_ratio())
    return near


def _is_infinite(given: np.longdouble | decimal.Decimal) -> bool:
    return given.is_infinite() if isinstance(given, decimal.Decimal) else math.isinf(given)
