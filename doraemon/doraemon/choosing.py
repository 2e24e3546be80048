"""Which type of keys an index has: by what users give, and by what a file says."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .dtypes import Described, parsed
from .engine import Engine
from .keys import NumberType, as_dtype
from .keytype import KeyType
from .records import record_type
from .texts import BYTES, STR, is_text_dtype, text_dtype_of, text_type

_TEXTS: dict[str, np.dtype[Any]] = {"str": STR, "bytes": BYTES}


def key_type_of(keys: Any, dtype: DTypeLike | None, engine: Engine) -> KeyType:
    """The type of keys in a list or an array, of this dtype if one is given.

    Raises TypeError if keys of that dtype are not supported.
    """
    return _of_dtype(_dtype_of(keys) if dtype is None else as_dtype(dtype), engine)


def described_type(description: Described, engine: Engine) -> KeyType:
    """The type of keys that has this description. Raises TypeError or ValueError if there is none."""
    known = isinstance(description, str) and description in _TEXTS
    return _of_dtype(_TEXTS[str(description)] if known else parsed(description), engine)


def _of_dtype(dtype: np.dtype[Any], engine: Engine) -> KeyType:
    if is_text_dtype(dtype):
        return text_type(dtype, engine)
    return record_type(dtype, engine) if dtype.names else NumberType.of(dtype)


def _dtype_of(keys: NDArray[Any] | list[Any]) -> np.dtype[Any]:
    """The dtype of keys; of Python ints int64, where NumPy would choose by their values, and floats for some."""
    if isinstance(keys, list) and all(isinstance(key, int) for key in keys):
        return np.dtype(np.int64)
    if isinstance(keys, list) or keys.dtype == object:
        text = text_dtype_of(keys)
        if text is not None:
            return text
    if isinstance(keys, list) and isinstance(keys[0], tuple):
        raise TypeError('keys that are tuples need a dtype: give dtype=[("a", "int64"), ("b", "float64")], say')
    return np.asarray(keys).dtype
