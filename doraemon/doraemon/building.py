"""From what users give to a sorted run: key types of sequences, sorting, values of one dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .engine import Engine
from .keys import Codes, KeyType
from .state import Run

Ints = NDArray[np.int64]


def key_type_of(keys: Any, dtype: DTypeLike | None) -> KeyType:
    """The key type asked for, else that of the keys, else int64."""
    if dtype is not None:
        return KeyType.of(dtype)
    if hasattr(keys, "dtype"):
        return KeyType.of(keys.dtype)
    if isinstance(keys, list | tuple | range) and all(isinstance(key, int) for key in keys):
        return KeyType.of(np.int64)  # NumPy would choose by the values, and floats for some
    return KeyType.of(np.asarray(keys).dtype)


def sorted_run(key_type: KeyType, keys: ArrayLike, values: ArrayLike | None, engine: Engine) -> Run:
    """A run of keys in any order."""
    codes = key_type.encode_any(list(keys) if isinstance(keys, range) else keys)
    if values is None:
        return Run.of(_sorted_copy(codes, keys), None, engine)
    values = as_values(values, len(codes))
    if _ascending(codes):
        codes, values = _sorted_copy(codes, keys), values.copy()
    else:
        order = np.argsort(codes, kind="stable")
        codes, values = codes[order], values[order]
    twice = codes[1:] == codes[:-1]
    if twice.any():
        key = key_type.decode_one(int(codes[int(np.argmax(twice))]))
        raise ValueError(f"key {key!r} occurs more than once: start from an empty map and extend() it, last one wins")
    return Run.of(codes, values, engine)


def _sorted_copy(codes: Codes, keys: Any) -> Codes:
    """Sorted codes that no one else can change."""
    if not _ascending(codes):
        return np.sort(codes)
    return codes.copy() if isinstance(keys, np.ndarray) and np.may_share_memory(codes, keys) else codes


def _ascending(codes: Codes) -> bool:
    return bool((codes[1:] >= codes[:-1]).all())


def unique_last(codes: Codes) -> tuple[Codes, Ints]:
    """Distinct codes in order, and where in the input each occurs last."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    last = np.append(ordered[1:] != ordered[:-1], True)[: len(codes)]
    return ordered[last], order[last]


def as_values(values: ArrayLike, count: int) -> NDArray[Any]:
    """One value per key, in an array of one dimension."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"values have {array.ndim} dimensions: give one per key, for rows their numbers")
    if len(array) != count:
        raise ValueError(f"{len(array)} values for {count} keys: give one per key")
    return array


def values_like(values: Any, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """New values in the dtype of a map's; refuses those that it would cut off."""
    if dtype.hasobject:
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return as_values(array, count)
    array = as_values(values, count)
    longer = dtype.kind in "SU" and array.dtype.itemsize > dtype.itemsize
    if np.can_cast(array.dtype, dtype, casting="same_kind") and not longer:
        if dtype.kind not in "iu":
            return array.astype(dtype)
    elif longer or array.dtype.kind not in "iu" or dtype.kind not in "iu":
        raise TypeError(f"values of dtype {array.dtype} for a map of {dtype}: make the map with values of that dtype")
    cast = array.astype(dtype)
    if not np.array_equal(cast, array):
        raise OverflowError(f"a value does not fit {dtype}: make the map with values of a wider dtype")
    return cast
