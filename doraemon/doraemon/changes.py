"""Changes to a state: each makes the state after it, and touches nothing of the state before it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .building import unique_last
from .delta import add_counts, put
from .keys import Codes
from .state import REQUIRED, State
from .values import values_like


def insert(state: State, key: Any, value: Any) -> State:
    """One more key, with a value in a map; see `Index.insert`."""
    if state.is_map and state.contains(key):
        raise KeyError(f"{key!r} is in the map: use update() to replace its value")
    codes = np.array([state.key_type.encode_one(key)], dtype=np.uint64)
    if not state.is_map:
        if value is not REQUIRED:
            raise TypeError("this index has keys only: insert the key without a value, or make it with values")
        return _add(state, codes)
    if value is REQUIRED:
        raise TypeError("this index is a map: give a value with the key")
    return _set(state, codes, [value])


def update(state: State, key: Any, value: Any) -> State:
    """A map with a value for the key, new or not."""
    codes = np.array([state.key_type.encode_one(key)], dtype=np.uint64)
    return _set(state, codes, [value])


def extend(state: State, keys: ArrayLike, values: ArrayLike | None) -> State:
    """Many more keys; in a map values for many, the last of equal keys winning."""
    codes = state.key_type.encode_any(keys)
    if not state.is_map:
        if values is not None:
            raise TypeError("this index has keys only: extend it without values, or make it with values")
        return _add(state, codes)
    if values is None:
        raise TypeError("this index is a map: give a value for every key")
    return _set(state, codes, values)


def discard(state: State, key: Any) -> State:
    """One copy of the key less; the state itself if there is none."""
    if not state.contains(key):
        return state
    return _remove(state, np.array([state.key_type.encode_one(key)], dtype=np.uint64))


def discard_many(state: State, keys: ArrayLike) -> State:
    """Each key that is there less, from a multiset one copy per time it is given."""
    codes, exact, _ = state.key_type.cuts(keys)
    return _remove(state, codes if exact is None else codes[exact])


def _set(state: State, codes: Codes, values: Any) -> State:
    new = values_like(values, state.value_dtype, len(codes))
    codes, last = unique_last(codes)
    return state.with_delta(put(state.delta, codes, True, new[last], state.writes + 1, state.count_in_run))


def _add(state: State, codes: Codes) -> State:
    codes, counts = np.unique(codes, return_counts=True)
    return state.with_delta(add_counts(state.delta, codes, counts, state.writes + 1, state.count_in_run))


def _remove(state: State, codes: Codes) -> State:
    codes, counts = np.unique(codes, return_counts=True)
    if state.is_map:
        filler = np.zeros(len(codes), dtype=state.value_dtype)
        return state.with_delta(put(state.delta, codes, False, filler, state.writes + 1, state.count_in_run))
    present: NDArray[np.int64] = state.code_ranks(codes, right=True) - state.code_ranks(codes)
    removed = np.minimum(counts, present)
    codes, change = codes[removed > 0], -removed[removed > 0]
    return state.with_delta(add_counts(state.delta, codes, change, state.writes + 1, state.count_in_run))
