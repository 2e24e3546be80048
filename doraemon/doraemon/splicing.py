"""Putting sorted items between others: what merges spend most of their time on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engine import Engine, native


def splice(old: NDArray[Any], at: NDArray[np.int64], new: NDArray[Any], engine: Engine) -> NDArray[Any]:
    """`old` with `new` at the positions `at`, ascending, of the result."""
    result = np.empty(len(old) + len(new), dtype=old.dtype)
    if engine == "native" and not old.dtype.hasobject and old.dtype.itemsize:
        arrays = (old, at, new.astype(old.dtype, copy=False), result)
        native.splice(*(np.ascontiguousarray(array).view(np.uint8) for array in arrays))
        return result
    others = np.ones(len(result), dtype=np.bool_)
    others[at] = False
    result[at] = new
    result[others] = old
    return result
