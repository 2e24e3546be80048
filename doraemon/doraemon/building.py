"""From the keys that users give, in any order, to a state: key types of sequences, sorting."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .engine import Engine
from .inputs import as_sequence
from .keys import Codes, KeyType
from .run import Models, Run
from .state import State
from .values import as_values

Ints = NDArray[np.int64]


def state_of(
    keys: ArrayLike, values: ArrayLike | None, dtype: DTypeLike | None, engine: Engine, memory: Models
) -> State:
    """The state of keys in any order."""
    items = as_sequence(keys)
    key_type = KeyType.of(_dtype_of(items) if dtype is None else dtype)
    codes, sorted_values = _sorted(key_type, key_type.encode_any(items), values)
    return State.of(key_type, engine, Run.of(codes, sorted_values, engine, memory))


def _dtype_of(keys: NDArray[Any] | list[Any]) -> DTypeLike:
    """The dtype of keys; of Python ints int64, where NumPy would choose by their values, and floats for some."""
    if isinstance(keys, list) and all(isinstance(key, int) for key in keys):
        return np.int64
    return np.asarray(keys).dtype


def _sorted(key_type: KeyType, codes: Codes, values: ArrayLike | None) -> tuple[Codes, NDArray[Any] | None]:
    if values is None:
        return _sorted_copy(codes, key_type), None
    values = as_values(values, len(codes))
    if _ascending(codes):
        codes, values = _sorted_copy(codes, key_type), values.copy()
    else:
        order = np.argsort(codes, kind="stable")
        codes, values = codes[order], values[order]
    twice = codes[1:] == codes[:-1]
    if twice.any():
        key = key_type.decode_one(int(codes[int(np.argmax(twice))]))
        raise ValueError(f"key {key!r} occurs more than once: start from an empty map and extend() it, last one wins")
    return codes, values


def _sorted_copy(codes: Codes, key_type: KeyType) -> Codes:
    """Sorted codes that no one else can change: those of uint64 keys are the caller's keys themselves."""
    if not _ascending(codes):
        return np.sort(codes)
    return codes.copy() if key_type.dtype == np.uint64 else codes


def _ascending(codes: Codes) -> bool:
    return bool((codes[1:] >= codes[:-1]).all())


def unique_last(codes: Codes) -> tuple[Codes, Ints]:
    """Distinct codes in order, and where in the input each occurs last."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    last = np.append(ordered[1:] != ordered[:-1], True)[: len(codes)]
    return ordered[last], order[last]
