"""Finding places for sorted items between others and putting them there: what writes spend most of their time on."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Codes, Ints, Values
from .engine import Engine, native
from .memory import pool
from .values import is_plain

SPARE = 4  #: of the keys, how many times fewer a run leaves room for behind them
LONG = 1024  #: codes from which on sorting them by their digits pays


class Room:
    """Arrays that are used up to a length, of codes and of a map's values.

    Attributes:
        arrays: of as many items; the second is None in a multiset.
        used: how many are keys.
    """

    def __init__(self, arrays: tuple[Codes, Values | None], used: int) -> None:
        self.arrays, self.used = arrays, used
        self._lock = threading.Lock()  # copies of an index share a room

    def first(self, count: int) -> tuple[Codes, Values | None]:
        """The first items of each array."""
        codes, values = self.arrays
        return codes[:count], None if values is None else values[:count]

    def take(self, after: int, codes: Codes, values: Values | None) -> bool:
        """Put keys behind the first `after`, if no others are there and all have room; whether that was so."""
        all_codes, all_values = self.arrays
        with self._lock:
            end = after + len(codes)
            if self.used != after or end > len(all_codes):
                return False
            all_codes[after:end] = codes
            if all_values is not None:
                all_values[after:end] = values
            self.used = end
            return True


def constant(value: int, count: int) -> Ints:
    """`count` times the same number, which takes no memory."""
    return np.broadcast_to(np.int64(value), count)


def flat(array: Ints) -> Ints:
    """The same array as a `constant`, if all of its items are equal."""
    return constant(int(array[0]), len(array)) if len(array) and (array == array[0]).all() else array


def splice(old: NDArray[Any], at: Ints, new: NDArray[Any], engine: Engine, spare: int = 0) -> NDArray[Any]:
    """`old` with `new` at the positions `at`, ascending, of the result, and `spare` items behind it.

    O(items); O(1) for a `constant` in itself, without spare items.
    """
    if spare == 0 and _is_constant(new) and (len(old) == 0 or (_is_constant(old) and old[0] == new[0])):
        return constant(int(new[0]), len(old) + len(new))
    whole = pool.empty(len(old) + len(new) + spare, old.dtype)
    result = whole[: len(old) + len(new)]
    if engine == "native" and is_plain(old.dtype):
        arrays = (old, at, new.astype(old.dtype, copy=False), result)
        native.splice(*(np.ascontiguousarray(array).view(np.uint8) for array in arrays))
        return whole
    others = np.ones(len(result), dtype=np.bool_)
    others[at] = False
    result[at] = new
    result[others] = old
    return whole


def copied(items: NDArray[Any], spare: int) -> NDArray[Any]:
    """A copy of the items, and `spare` more behind them, of memory that is not taken before it is written to."""
    whole = pool.empty(len(items) + spare, items.dtype)
    whole[: len(items)] = items
    return whole


def ascending(codes: Codes) -> bool:
    """Whether the codes are in order."""
    return bool((codes[1:] >= codes[:-1]).all())


def in_order(codes: Codes, engine: Engine, spare: int = 0) -> Codes:
    """A copy of the codes in order, as by `copied`. O(codes) with C, or where they are in order."""
    whole = copied(codes, spare)
    ordered = whole[: len(codes)]
    if ascending(ordered):
        return whole
    if engine == "numpy" or len(codes) < LONG:
        ordered.sort()
    else:
        native.sort(ordered, pool.empty(len(codes), codes.dtype))
    return whole


def distinct(codes: Codes, engine: Engine) -> tuple[Codes, Ints]:
    """The distinct ones of codes in order, and how often each occurs. O(codes) with C."""
    ordered = in_order(codes, engine)
    again = ordered[1:] == ordered[:-1]
    if not again.any():
        return ordered, constant(1, len(ordered))
    first = np.flatnonzero(np.append(True, ~again))
    return ordered[first], np.diff(first, append=len(ordered))


def _is_constant(array: NDArray[Any]) -> bool:
    return len(array) > 0 and array.dtype == np.int64 and array.strides == (0,)


def ranks_in(codes: Codes, queries: Codes, right: bool, engine: Engine) -> Ints:
    """How many of the sorted codes are below each query, or (`right`) not above it."""
    if engine == "numpy":
        return np.searchsorted(codes, queries, side="right" if right else "left")
    result = np.empty(len(queries), dtype=np.int64)
    native.ranks(np.ascontiguousarray(codes), np.ascontiguousarray(queries), right, result)
    return result
