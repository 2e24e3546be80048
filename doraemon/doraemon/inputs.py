"""What users hand in as keys, queries or values: arrays, Series, lists, iterators. What is missing is refused."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMPY_KINDS = "biufMm"


def as_sequence(given: Any) -> NDArray[Any] | list[Any]:
    """An array where `given` is or has one, else a list of its items. The array may share the caller's memory.

    pandas' nullable dtypes become NumPy's, and times with a zone become those of UTC.

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
        raise ValueError("an entry is missing: drop such entries with dropna(), or fill them with fillna()")
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
