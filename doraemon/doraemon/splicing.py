"""Finding places for sorted items between others and putting them there: what writes spend most of their time on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Codes, Ints
from .engine import Engine, native
from .values import is_plain


def splice(old: NDArray[Any], at: Ints, new: NDArray[Any], engine: Engine) -> NDArray[Any]:
    """`old` with `new` at the positions `at`, ascending, of the result."""
    result = np.empty(len(old) + len(new), dtype=old.dtype)
    if engine == "native" and is_plain(old.dtype):
        arrays = (old, at, new.astype(old.dtype, copy=False), result)
        native.splice(*(np.ascontiguousarray(array).view(np.uint8) for array in arrays))
        return result
    others = np.ones(len(result), dtype=np.bool_)
    others[at] = False
    result[at] = new
    result[others] = old
    return result


def ranks_in(codes: Codes, queries: Codes, right: bool, engine: Engine) -> Ints:
    """How many of the sorted codes are below each query, or (`right`) not above it."""
    if engine == "numpy":
        return np.searchsorted(codes, queries, side="right" if right else "left")
    result = np.empty(len(queries), dtype=np.int64)
    native.ranks(np.ascontiguousarray(codes), np.ascontiguousarray(queries), right, result)
    return result
