"""The values of a map: from what users give to arrays of one dtype, without changing any of them.

A float is rounded to a map's shorter floats, as NumPy does. All else that a dtype cannot hold is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .arrays import Mask, Values
from .inputs import as_number, as_sequence, refuse_masked
from .times import as_duration, as_time

#: by kind of dtype, the kinds whose values are cast to it; a value that does not fit is still refused
_CASTS_FROM = {"b": "b", "i": "biu", "u": "biu", "f": "biuf", "c": "biufc", "M": "M", "m": "mbiu", "S": "S"}
_CASTS_FROM |= {"U": "U", "T": "TU", "O": "biufcMmSUTOV"}
_PLAIN: dict[np.dtype[Any], type] = {np.dtype(np.int64): int, np.dtype(np.float64): float}
_WIDTH = {"S": 1, "U": 4}  #: bytes of a character
_FROM_OBJECTS: dict[str, Callable[[Any], Any]] = {"M": as_time, "m": as_duration}


def is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether a value is its bytes, and there are any."""
    return not dtype.hasobject and dtype.itemsize > 0


def as_values(given: Any, count: int) -> Values:
    """One value per key, in an array of one dimension and native byte order that may share the caller's memory."""
    array = _array_of(given)
    if array.ndim != 1:
        raise ValueError(f"values have {array.ndim} dimensions: give one per key, for rows their numbers")
    if len(array) != count:
        raise ValueError(f"{len(array)} values for {count} keys: give one per key")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _array_of(given: Any) -> Values:
    items = _sequence_of(given)
    if not isinstance(items, list):
        return items
    array = np.asarray(items)
    return array if array.ndim != 1 or _keeps_items(array, items) else _objects(items)


def _sequence_of(given: Any) -> Values | list[Any]:
    if isinstance(given, Mapping | set | frozenset):
        raise TypeError(f"values in a {type(given).__name__} are in no order of the keys: give a list or an array")
    items = as_sequence(given)
    if isinstance(items, list) and any(item is np.ma.masked for item in items):
        raise ValueError("a value is masked: fill such values, or leave their keys out")
    return items


def _keeps_items(array: Values, items: list[Any]) -> bool:
    """Whether NumPy's array of a list has its very items: it turns numbers among texts to text, and large ints among
    floats to floats, and cuts off zero bytes."""
    if array.dtype.kind in "SU":
        return bool(array.tolist() == items)
    if array.dtype.kind in "fc":
        return all(not isinstance(item, int | np.integer) or complex(item) == int(item) for item in items)
    return True


def _objects(items: Any) -> Values:
    array = np.empty(len(items), dtype=object)
    for place, item in enumerate(items):  # which NumPy would take apart where they are sequences
        array[place] = item
    return array


def values_like(given: Any, dtype: np.dtype[Any], count: int) -> Values:
    """New values in the dtype of a map's.

    Raises:
        TypeError: they are of another kind, or texts that are too long.
        OverflowError: one does not fit the dtype.
    """
    items = _sequence_of(given)
    if dtype.kind == "O":
        array = _objects(items) if isinstance(items, list) else items.astype(object)
    elif isinstance(items, list) and dtype.names is not None and all(type(item) is tuple for item in items):
        array = _from_tuples(items, dtype)
    else:
        array = _array_of(items) if isinstance(items, list) else items
    return _converted(as_values(array, count), dtype)


def value_like(dtype: np.dtype[Any], given: Any) -> Any:
    """One new value as the scalar that a map's array of the dtype holds; see `values_like`, which says the same."""
    if type(given) is dtype.type and dtype.kind in "iufb":
        return given
    return values_like([given], dtype, 1)[0]


def plain_type(dtype: np.dtype[Any]) -> type | None:
    """Python's type whose items C makes the dtype's, of 8 bytes, as `values_like` would, where they fit."""
    return _PLAIN.get(dtype)


def array_of(scalars: list[Any], dtype: np.dtype[Any]) -> Values:
    """The array of what `value_like` made."""
    if dtype.kind in "biufc":
        return np.array(scalars, dtype=dtype)
    array = np.empty(len(scalars), dtype=dtype)
    for place, scalar in enumerate(scalars):  # an object may be a sequence, which NumPy would take apart
        array[place] = scalar
    return array


def _from_tuples(items: list[Any], dtype: np.dtype[Any]) -> Values:
    """Records of tuples, each field checked like a column of its own."""
    array = np.zeros(len(items), dtype=dtype)
    names = dtype.names or ()
    if any(len(item) != len(names) for item in items):
        raise TypeError(f"a record of this map has {len(names)} fields: give a tuple of as many")
    for place, name in enumerate(names):
        field, column = dtype[name], [item[place] for item in items]
        if field.subdtype is None:
            array[name] = values_like(column, field, len(items))
        else:
            array[name] = _converted(np.asarray(column), field.base)
    return array


def _converted(array: Values, dtype: np.dtype[Any]) -> Values:
    """A copy in another dtype of an array of any shape."""
    if array.dtype == dtype:
        return array.astype(dtype)
    if dtype.names is not None and array.dtype.names == dtype.names:
        return _converted_fields(array, dtype)
    if array.dtype.kind == "O" and dtype.kind != "O":
        array = _from_objects(array, dtype)
    if array.dtype.kind not in _CASTS_FROM.get(dtype.kind, ""):
        raise _kind_error(array, dtype)
    width = _WIDTH.get(dtype.kind)
    if width and array.dtype.itemsize > dtype.itemsize:
        raise _kind_error(array, dtype)
    return _cast(array, dtype)


def _converted_fields(array: Values, dtype: np.dtype[Any]) -> Values:
    result = np.zeros(array.shape, dtype=dtype)
    for name in dtype.names or ():
        if array[name].shape != result[name].shape:
            raise _kind_error(array, dtype)
        result[name] = _converted(array[name], dtype[name].base)
    return result


def _from_objects(array: Values, dtype: np.dtype[Any]) -> Values:
    """Objects as numbers or times, where they are all of them."""
    if dtype.kind in _FROM_OBJECTS:
        ones = [_converted(np.array([_FROM_OBJECTS[dtype.kind](item)]), dtype) for item in array.flat]
        return np.concatenate([np.zeros(0, dtype), *ones]).reshape(array.shape)
    if all(isinstance(item, int | np.integer) for item in array.flat) and dtype.kind in "iu":
        raise OverflowError(f"a value does not fit {dtype}: make the map with values of a wider dtype")
    return array


def _cast(array: Values, dtype: np.dtype[Any]) -> Values:
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if not _same_values(array, cast):
        raise OverflowError(f"a value does not fit {dtype}: make the map with values of a wider dtype")
    return cast


def _same_values(array: Values, cast: Values) -> bool:
    """Whether a cast kept every value, but for the rounding of floats."""
    kinds = array.dtype.kind + cast.dtype.kind
    if kinds in ("ff", "fc", "cc"):
        return bool((np.isinf(cast) <= np.isinf(array)).all())
    if kinds[0] in "iu" and kinds[1] in "fc":
        large = np.abs(array.astype(np.float64)) >= exact_ints(cast.dtype)
        return all(as_number(c.real) == int(a) for a, c in zip(array[large].flat, cast[large].flat, strict=True))
    if kinds in ("MM", "mm"):
        there = ~np.isnat(array)
        return np.array_equal(cast[there].astype(array.dtype), array[there])
    return np.array_equal(cast, array)


def exact_ints(dtype: np.dtype[Any]) -> float:
    """The int up to which a dtype of floats holds every int."""
    return float(2.0 ** (np.finfo(dtype).nmant + 1))


def _kind_error(array: Values, dtype: np.dtype[Any]) -> TypeError:
    return TypeError(f"values of dtype {array.dtype} for a map of {dtype}: make the map with values of that dtype")


# ---- values with a default for absent keys


def dtype_with_default(default: Any, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """A dtype that holds a map's values and the default, none of them changed: object where no other does."""
    refuse_masked(default)
    if _has_exactly(dtype, default):
        return dtype
    given = np.asarray(default) if np.isscalar(default) else np.asarray(None)
    if dtype.kind in "SU" and given.dtype.kind == dtype.kind:
        return np.result_type(dtype, given)
    if dtype.kind in "biufc" and given.dtype.kind in "biufc":
        common = np.result_type(dtype, given)
        if _has_all_of(common, dtype) and _has_exactly(common, default):
            return common
    return np.dtype(object)


def _has_exactly(dtype: np.dtype[Any], one: Any) -> bool:
    """Whether the dtype has this very value."""
    try:
        cast = values_like([one], dtype, 1)[0]
    except (TypeError, ValueError, OverflowError):
        return False
    return dtype.kind not in "fc" or bool(one != one) or _number(cast) == _number(one)


def _number(one: Any) -> Any:
    """A Python number that compares exactly."""
    one = one.item() if isinstance(one, np.generic) else one
    return one if isinstance(one, complex | np.complexfloating) else as_number(one)


def _has_all_of(dtype: np.dtype[Any], other: np.dtype[Any]) -> bool:
    """Whether a dtype of numbers has all values of the other."""
    if other.kind in "iu" and dtype.kind in "fc":
        return float(max(abs(np.iinfo(other).min), np.iinfo(other).max)) <= exact_ints(dtype)
    return np.can_cast(other, dtype)


def with_default(found: Values, absent: Mask, default: Any, dtype: np.dtype[Any]) -> Values:
    """Values and, where they are absent, the default, in a dtype that `dtype_with_default` chose."""
    result = np.empty(len(absent), dtype=dtype)
    apart = dtype.kind == "O" and found.dtype.kind in "MmV"  # which NumPy would turn to ints and tuples
    result[~absent] = _objects(found) if apart else found
    result[absent] = _objects([default]) if dtype.kind == "O" else values_like([default], dtype, 1)
    return result
