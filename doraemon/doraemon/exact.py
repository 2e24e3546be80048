"""Numbers of any type as Python's own, which compare with each other exactly."""

from __future__ import annotations

import decimal
import math
import numbers
import operator
from fractions import Fraction
from typing import Any

import numpy as np


def as_number(given: Any) -> int | float | Fraction:
    """The same number as a Python int, float or fraction.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is NaN.
    """
    if isinstance(given, float | np.floating | decimal.Decimal):
        return _as_real(given)
    if isinstance(given, numbers.Rational) and not isinstance(given, numbers.Integral):
        return Fraction(int(given.numerator), int(given.denominator))
    try:
        whole: int = operator.index(given)
        return whole
    except TypeError:
        raise TypeError(f"{given!r} is not a number: ask with an int, a float or a NumPy number") from None


def _as_real(given: float | np.floating[Any] | decimal.Decimal) -> float | Fraction:
    if given.is_nan() if isinstance(given, decimal.Decimal) else math.isnan(given):
        raise ValueError("NaN has no place in an order: drop such keys with keys[~np.isnan(keys)]")
    near = float(given)
    if isinstance(given, decimal.Decimal | np.longdouble) and near != given and not _is_infinite(given):
        return Fraction(*given.as_integer_ratio())
    return near


def _is_infinite(given: np.longdouble | decimal.Decimal) -> bool:
    return given.is_infinite() if isinstance(given, decimal.Decimal) else math.isinf(given)
