"""Columns of pandas and Arrow. Both packages are optional and imported here only.

Here columns are checked, and made; what makes a NumPy array of them, as of anything else, is `inputs.as_sequence`.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from .arrays import Values

_ARROW_UNITS = ("s", "ms", "us", "ns")


def imported(package: str) -> Any:
    """An optional package. Raises ImportError, which says what to install, if it is not there."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is not installed: install it with `pip install {package}`") from error


def pandas_columns(keys: Any, values: Any) -> tuple[Any, Any]:
    """Keys in a Series or a pandas Index, and values for them in anything or None, checked to belong together.

    Raises:
        TypeError: the keys are in something else.
        ValueError: both are Series whose labels differ.
    """
    pandas = imported("pandas")
    if not isinstance(keys, pandas.Series | pandas.Index):
        raise TypeError(f"keys in a {type(keys).__name__}: give a Series, as frame['column'], or a pandas Index")
    if isinstance(keys, pandas.Series) and isinstance(values, pandas.Series) and not keys.index.equals(values.index):
        raise ValueError("keys and values have different labels: give values.reindex(keys.index), or values.array")
    return keys, values


def arrow_columns(keys: Any, values: Any) -> tuple[Any, Any]:
    """Keys in an Arrow Array or ChunkedArray, and values in anything or None. Raises TypeError for other keys."""
    pyarrow = imported("pyarrow")
    if not isinstance(keys, pyarrow.Array | pyarrow.ChunkedArray):
        raise TypeError(f"keys in a {type(keys).__name__}: give an Array or a ChunkedArray, as table['column']")
    return keys, values


def arrow_table(keys: Values, values: Values | None, zone: str | None) -> Any:
    """A pyarrow.Table with the column "key", whose times get the zone, and for a map with the column "value"."""
    pyarrow = imported("pyarrow")
    are_bytes = zone is None and keys.dtype == object
    columns = {"key": pyarrow.array(keys, pyarrow.binary()) if are_bytes else _arrow_array(pyarrow, keys, zone)}
    if values is not None:
        columns["value"] = _arrow_array(pyarrow, values, None)
    return pyarrow.table(columns)


def _arrow_array(pyarrow: Any, array: Values, zone: str | None) -> Any:
    """An Arrow array, of the same memory where Arrow lays the items out as NumPy does."""
    unit = np.datetime_data(array.dtype)[0] if array.dtype.kind == "M" else None
    if zone is not None and unit not in _ARROW_UNITS:
        raise TypeError(f"keys of dtype {array.dtype} have no zone: leave it out")
    if unit is not None and unit not in (*_ARROW_UNITS, "D"):
        raise TypeError(f"Arrow has no times like {array.dtype}: convert the keys with astype('datetime64[s]')")
    if array.dtype.names:
        fields = [_arrow_array(pyarrow, array[name], None) for name in array.dtype.names]
        return pyarrow.StructArray.from_arrays(fields, array.dtype.names)
    return pyarrow.array(array, None if zone is None else pyarrow.timestamp(unit, zone))
