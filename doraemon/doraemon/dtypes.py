"""NumPy dtypes in JSON, and back: numbers, times, texts, and records of any layout."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Described = str | dict[str, Any]
_PLAIN = re.compile(r"[<|][biufcMmSUV][0-9]+(\[[0-9]*[a-zA-Z]+\])?")
_LAYOUT: dict[str, Any] = {
    "names": str,
    "formats": (str, dict),
    "shapes": list,
    "offsets": int,
    "titles": (str, type(None)),
}


def described(dtype: np.dtype[Any]) -> Described:
    """What `parsed` understands, for a little-endian dtype without objects.

    Raises TypeError for a dtype that cannot be described.
    """
    if dtype.names is None:
        if not _PLAIN.fullmatch(dtype.str):
            raise TypeError(f"dtype {dtype} cannot be saved: convert the array to numbers or fixed-size strings")
        return dtype.str
    fields = [dtype.fields[name] for name in dtype.names] if dtype.fields else []
    return {
        "names": list(dtype.names),
        "formats": [described(field[0].base) for field in fields],
        "shapes": [list(field[0].shape) for field in fields],
        "offsets": [field[1] for field in fields],
        "titles": [field[2] if len(field) > 2 else None for field in fields],
        "itemsize": dtype.itemsize,
        "aligned": dtype.isalignedstruct,
        "record": dtype.type is np.record,
    }


def parsed(description: Any) -> np.dtype[Any]:
    """The dtype of a description, which may come from anywhere. Raises ValueError if it is none."""
    try:
        dtype = _parsed(description)
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{str(description)[:100]} is no dtype") from error
    if dtype.hasobject or dtype.itemsize < 0:
        raise ValueError(f"{dtype} holds no data")
    return dtype


def _parsed(description: Any) -> np.dtype[Any]:
    if isinstance(description, str):
        if not _PLAIN.fullmatch(description):
            raise ValueError("no plain dtype")
        return np.dtype(description)
    if isinstance(description, list):  # as records without padding were saved at first
        return np.dtype([(str(name), _parsed(kind)) for name, kind in description])
    columns = [description[name] for name in _LAYOUT]
    if len({len(column) for column in columns}) != 1:
        raise ValueError("fields of different numbers")
    for column, kind in zip(columns, _LAYOUT.values(), strict=True):
        if not all(isinstance(item, kind) for item in column):
            raise TypeError("a field of another type")
    names, formats, shapes, offsets, titles = columns
    layout: Any = {
        "names": names,
        "formats": [np.dtype((_parsed(kind), tuple(shape))) for kind, shape in zip(formats, shapes, strict=True)],
        "offsets": offsets,
        "itemsize": description["itemsize"],
        "aligned": description["aligned"] is True,
    }
    if any(titles):
        layout["titles"] = titles
    dtype = np.dtype(layout)
    return np.dtype((np.record, dtype)) if description["record"] is True else dtype
