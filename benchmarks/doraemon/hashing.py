"""A hash table in NumPy: the floor under batched lookups of keys, which answers no question of order."""

from __future__ import annotations

import numpy as np
from inputs import Keys
from numpy.typing import NDArray

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class HashTable:
    """Open addressing, at most half full; all queries of a batch take their next step together."""

    def __init__(self, keys: Keys) -> None:
        """Keys in order; of equal ones the first is found."""
        first = np.flatnonzero(np.diff(keys, prepend=keys[0] ^ np.uint64(1)))
        bits = max(1, int(2 * len(first) - 1).bit_length())
        self.shift, self.mask = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
        self.keys, self.positions = np.zeros(1 << bits, np.uint64), np.full(1 << bits, -1, np.int32)
        keys, first = keys[first], first.astype(np.int32)
        slots = self._slots(keys)
        while len(first):
            free = self.positions[slots] < 0
            self.positions[slots[free]] = first[free]
            lost = self.positions[slots] != first
            self.keys[slots[~lost]] = keys[~lost]
            keys, first, slots = keys[lost], first[lost], slots[lost] + np.uint64(1) & self.mask

    def _slots(self, keys: Keys) -> Keys:
        return (keys * MULTIPLIER) >> self.shift

    def find(self, queries: Keys) -> NDArray[np.int64]:
        """The position of each query, -1 of those that are absent."""
        slots = self._slots(queries)
        found = self.positions[slots].astype(np.int64)
        asking = np.flatnonzero((self.keys[slots] != queries) & (found >= 0))
        while len(asking):
            slots[asking] = slots[asking] + np.uint64(1) & self.mask
            at = slots[asking]
            found[asking] = self.positions[at]
            asking = asking[(self.keys[at] != queries[asking]) & (found[asking] >= 0)]
        return found
