"""Times of different units, in whole numbers: NumPy's own conversions wrap around near the ends of int64."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Ints, Mask

_LAST = np.iinfo(np.int64).max
_FACTORS = {"as": 1, "fs": 1000, "ps": 1000, "ns": 1000, "us": 1000, "ms": 1000, "s": 1000}
_FACTORS |= {"m": 60, "h": 60, "D": 24, "W": 7}
_CALENDAR = {"M": 1, "Y": 12}  #: whose days are not all as long
_YEARS = 10**7  #: as far from 1970 as NumPy turns years into days


def as_time(given: Any) -> np.datetime64:
    """One time, with all its digits. Times with a zone become those of UTC.

    Raises TypeError if it is not a time.
    """
    if hasattr(given, "to_datetime64"):  # pandas': as a datetime, which it also is, it would lose its nanoseconds
        return np.datetime64(given.to_datetime64())
    if isinstance(given, datetime.datetime) and given.tzinfo is not None:
        given = given.astimezone(datetime.UTC).replace(tzinfo=None)
    if not isinstance(given, np.datetime64 | datetime.date | str):
        raise _time_error(given)
    try:
        return np.datetime64(given)
    except ValueError:
        raise _time_error(given) from None


def as_duration(given: Any) -> np.timedelta64:
    """One length of time, with all its digits. Raises TypeError if it is none."""
    if hasattr(given, "to_timedelta64"):
        return np.timedelta64(given.to_timedelta64())
    if not isinstance(given, np.timedelta64 | datetime.timedelta):
        raise TypeError(f"{given!r} is not a length of time: give a timedelta64 or a timedelta")
    return np.timedelta64(given)


def _time_error(given: Any) -> TypeError:
    return TypeError(f"{given!r} is not a time: ask with a datetime64, a datetime or an ISO string")


def unit_of(dtype: np.dtype[Any]) -> int:
    """The length of a datetime64's unit in attoseconds; of months and years in months."""
    name = dtype.str[4:-1]
    if name in _CALENDAR:
        return _CALENDAR[name]
    length = 1
    for unit, factor in _FACTORS.items():
        length *= factor
        if unit == name:
            return length
    raise TypeError(f"{dtype} is not understood: convert the times with astype('datetime64[ns]')")


def in_linear_unit(array: NDArray[Any], dtype: np.dtype[Any]) -> tuple[Ints, int]:
    """Ticks, and their unit's length on the scale of `dtype`; months and years become days where those are compared."""
    given, wanted = (kind.str[4:-1] in _CALENDAR for kind in (array.dtype, dtype))
    if wanted and not given:
        raise TypeError(f"queries of {array.dtype} for an index of {dtype}: convert them with astype('{dtype}')")
    if given and not wanted:
        if (np.abs(array.view(np.int64)) > _YEARS).any():
            raise OverflowError(f"a query is too far from 1970: convert the queries with astype('{dtype}')")
        array = array.astype("datetime64[D]")
    return array.view(np.int64), unit_of(array.dtype)


def rounded_up(ticks: Ints, factor: int) -> tuple[Ints, Mask]:
    """Ticks of a unit `factor` times as long, rounded up, and which needed no rounding."""
    if factor > _LAST:
        return (ticks > 0).astype(np.int64), ticks == 0
    return -(-ticks // factor), ticks % factor == 0


def multiplied(ticks: Ints, factor: int) -> tuple[Ints, Mask, Mask]:
    """Ticks of a unit 1/`factor` as long, 0 for those beyond its reach; which are before and which after it."""
    reach = _LAST // factor
    below, above = ticks < -reach, ticks > reach
    return np.where(below | above, 0, ticks) * min(factor, _LAST), below, above
