"""Keys and queries of each supported dtype, with the extremes, and Python numbers to compare them exactly by."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

DTYPES = ["uint64", "int64", "uint32", "int32", "float64", "float32", "datetime64[ns]", "datetime64[D]"]
#: asked of every numeric index, most of them outside its domain
STRANGE = [-1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 10**400, -(10**400), 0.5, -1e300, float("inf")]


def keys(dtype: str) -> st.SearchStrategy[Any]:
    """Keys of a dtype: few values near each other, which repeat; the extremes; anything."""
    kind = np.dtype(dtype).kind
    if kind == "f":
        width = np.dtype(dtype).itemsize * 8
        near = st.integers(-5, 5).map(float)
        return near | st.floats(allow_nan=False, width=width) | st.sampled_from([np.inf, -np.inf, 0.0, -0.0])
    low, high = (-(2**63) + 1, 2**63 - 1) if kind == "M" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    near = st.integers(0, 20) | st.sampled_from([int(low), int(low) + 1, int(high) - 1, int(high)])
    anything = near | st.integers(int(low), int(high))
    return anything.map(lambda ticks: np.datetime64(ticks, np.dtype(dtype).str[4:-1])) if kind == "M" else anything


def queries(dtype: str) -> st.SearchStrategy[Any]:
    """What may be asked: keys, and numbers that no key can be."""
    return keys(dtype) if dtype.startswith("datetime") else keys(dtype) | st.sampled_from(STRANGE)


def plain(key: Any) -> int | float:
    """A key or query as a Python number that compares as the key does."""
    return int(key.astype(np.int64)) if isinstance(key, np.datetime64) else key  # type: ignore[no-any-return]


def plain_list(keys: np.ndarray[Any, Any]) -> list[int | float]:
    return [int(ticks) for ticks in keys.view(np.int64)] if keys.dtype.kind == "M" else keys.tolist()
