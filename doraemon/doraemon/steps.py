"""Runs of few distinct keys, each there many times: a short list of them answers faster than any model of the run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arrays import Codes, Ints

MAX_DISTINCT = 4096  #: distinct keys whose list stays in the cache
MIN_COPIES = 4  #: of each key, on average, from which the list is worth it


class Steps(NamedTuple):
    """The distinct codes of a run.

    Attributes:
        codes: ascending.
        starts: [codes + 1], where the copies of each begin, and the length of the run.
    """

    codes: Codes
    starts: Ints


def find_steps(codes: Codes) -> Steps | None:
    """The distinct codes of sorted ones if they are few, else None. O(MAX_DISTINCT * log n), and most often much less.

    Stretches with different codes at their ends are halved, and those with the same code are left out, until each is
    the step from one code to the next.
    """
    most = min(MAX_DISTINCT, len(codes) // MIN_COPIES)
    if most == 0:
        return None
    low, high = np.array([0]), np.array([len(codes) - 1])
    if codes[0] == codes[-1]:
        low = high = low[:0]
    while len(low) and int((high - low).max()) > 1:
        middle = (low + high) >> 1
        left, right = codes[low] != codes[middle], codes[middle] != codes[high]
        low, high = np.append(low[left], middle[right]), np.append(middle[left], high[right])
        if len(low) >= most:
            return None
    starts = np.append(0, np.sort(high))
    return Steps(codes[starts], np.append(starts, len(codes)))
