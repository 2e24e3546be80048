"""Workloads as distributions: signature, distance, and a memory of what was made for each.

Nothing here knows of indexes. A workload is what a histogram counts: accesses per bucket of keys, or activations per
bin. Whatever was fitted for one can be kept in a `Memory` and found again when a similar workload returns.

>>> memory = Memory[str](capacity=2)
>>> memory.remember(signature([90, 5, 5]), "made by day")
>>> memory.remember(signature([5, 5, 90]), "made by night")
>>> match = memory.nearest(signature([85, 10, 5]))
>>> match.value, round(match.distance, 2)
('made by day', 0.03)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

T = TypeVar("T")
Signature = NDArray[np.float64]


def signature(counts: ArrayLike, prior: ArrayLike | None = None, strength: float = 1.0) -> Signature:
    """The shares of a histogram, smoothed so that none is zero and distances stay finite.

    Args:
        counts: how often each bin was hit; fractions (decayed counts) are welcome.
        prior: what to believe before the first count, uniform by default.
        strength: how many counts per bin the prior is worth, more than 0.

    Raises ValueError if the prior has other bins or the strength is not above 0. O(bins).

    >>> signature([3, 0, 1]).round(3)
    array([0.571, 0.143, 0.286])
    """
    counts = np.asarray(counts, dtype=np.float64)
    if strength <= 0:
        raise ValueError(f"strength {strength}: give more than 0, lest a bin that was never hit have share 0")
    share = np.full(len(counts), 1 / max(len(counts), 1)) if prior is None else np.asarray(prior, dtype=np.float64)
    if share.shape != counts.shape:
        raise ValueError(f"a prior of {share.size} bins for counts of {counts.size}: give as many")
    smooth = counts + strength * len(counts) * share / max(share.sum(), 1e-300)
    normal: Signature = smooth / max(smooth.sum(), 1e-300)
    return normal


def distance(current: ArrayLike, other: ArrayLike) -> float:
    """KL(current || other) in bits: the extra binary-search steps per access when served by what `other` asked for.

    Raises ValueError if they have other numbers of bins. O(bins).

    >>> distance([0.5, 0.5], [0.5, 0.5]), distance([1.0, 0.0], [0.5, 0.5])
    (0.0, 1.0)
    """
    p, q = np.asarray(current, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if p.shape != q.shape:
        raise ValueError(f"signatures of {p.size} and {q.size} bins: compare only those of the same bins")
    seen = p > 0
    with np.errstate(divide="ignore"):
        return max(0.0, float((p[seen] * np.log2(p[seen] / q[seen])).sum()))


def drift(current: ArrayLike, trained: ArrayLike, steps_per_bit: float = 1.0) -> float:
    """The modelled extra search steps per access since training: `steps_per_bit * KL(current || trained)`.

    O(bins).

    >>> drift([0.9, 0.1], [0.9, 0.1])
    0.0
    """
    return steps_per_bit * distance(current, trained)


@dataclass(frozen=True)
class Match(Generic[T]):
    """What a memory found: the nearest signature, how far it is in bits, and what was remembered with it.

    >>> memory = Memory[str]()
    >>> memory.remember(signature([1, 1]), "even")
    >>> memory.nearest(signature([1, 1]))
    Match(signature=array([0.5, 0.5]), distance=0.0, value='even')
    """

    signature: Signature
    distance: float
    value: T


def _log2(shares: Signature) -> Signature:
    """Logarithms, of 0 one so low that whatever has a share there is as good as infinitely far, and 0 times it is 0."""
    logs: Signature = np.log2(np.maximum(shares, 1e-300))
    return np.where(shares > 0, logs, -1e300)


class _Entry(Generic[T]):
    """What a memory holds; the logarithms are what distances to it are made of."""

    def __init__(self, signature: Signature, value: T) -> None:
        self.signature, self.value = signature, value
        self.logs = _log2(np.asarray(signature, dtype=np.float64))


class Memory(Generic[T]):
    """A bounded memory of what was made for past workloads. The one not recalled for longest is forgotten first.

    Raises ValueError if the capacity is below 0.

    >>> memory = Memory[int](capacity=8)
    >>> memory.nearest(signature([1, 2])) is None
    True
    """

    def __init__(self, capacity: int = 16) -> None:
        if capacity < 0:
            raise ValueError(f"capacity {capacity}: give 0 to remember nothing, or more")
        self.capacity = capacity
        self._entries: tuple[_Entry[T], ...] = ()  # oldest first; replaced as a whole, for readers' sake

    def __len__(self) -> int:
        """How many are remembered. O(1).

        >>> len(Memory[str]())
        0
        """
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[Signature, T]]:
        """Signatures and values, the one recalled last at the end. O(entries).

        >>> memory = Memory[str]()
        >>> memory.remember(signature([1, 2]), "a")
        >>> [value for _, value in memory]
        ['a']
        """
        return iter([(entry.signature, entry.value) for entry in self._entries])

    def remember(self, signature: Signature, value: T, merge_within: float = 0.01) -> None:
        """Keep `value` for this workload, in place of one whose signature is less than `merge_within` bits away.

        O(entries * bins).

        >>> memory = Memory[str](capacity=1)
        >>> memory.remember(signature([1, 2]), "a")
        >>> memory.remember(signature([2, 1]), "b")
        >>> [value for _, value in memory]
        ['b']
        """
        match = self.nearest(signature)
        kept = self._entries
        if match is not None and match.distance < merge_within:
            kept = tuple(entry for entry in kept if entry.signature is not match.signature)
        kept = (*kept, _Entry(signature, value))
        self._entries = kept[max(0, len(kept) - self.capacity) :]

    def nearest(self, signature: Signature) -> Match[T] | None:
        """The entry least far from this workload, None if there is none. O(entries * bins).

        >>> memory = Memory[str]()
        >>> memory.remember(signature([90, 10]), "hot left")
        >>> memory.nearest(signature([10, 90])).value
        'hot left'
        """
        p = np.asarray(signature, dtype=np.float64)
        own = float(p @ _log2(p))
        same = [entry for entry in self._entries if len(entry.signature) == len(p)]
        far = [max(0.0, own - float(p @ entry.logs)) for entry in same]
        if not far:
            return None
        nearest = int(np.argmin(far))
        return Match(same[nearest].signature, far[nearest], same[nearest].value)

    def recall(self, signature: Signature, within: float) -> Match[T] | None:
        """The nearest entry if it is at most `within` bits away; recalling it keeps it from being forgotten.

        O(entries * bins).

        >>> memory = Memory[str]()
        >>> memory.remember(signature([90, 10]), "hot left")
        >>> memory.recall(signature([89, 11]), within=0.1).value
        'hot left'
        >>> memory.recall(signature([10, 90]), within=0.1) is None
        True
        """
        match = self.nearest(signature)
        if match is None or match.distance > within:
            return None
        others = tuple(entry for entry in self._entries if entry.signature is not match.signature)
        found = tuple(entry for entry in self._entries if entry.signature is match.signature)
        self._entries = others + found
        return match

    @classmethod
    def of(cls, entries: Iterable[tuple[Signature, T]], capacity: int = 16) -> Memory[T]:
        """A memory of given entries, oldest first. O(entries * bins).

        >>> len(Memory.of([(signature([1, 2]), "a"), (signature([2, 1]), "b")]))
        2
        """
        memory = cls(capacity)
        kept = tuple(_Entry(known, value) for known, value in entries)
        memory._entries = kept[max(0, len(kept) - capacity) :]
        return memory

    def copy(self) -> Memory[T]:
        """A memory of the same entries that changes independently. O(1).

        >>> memory = Memory[str]()
        >>> memory.copy().remember(signature([1, 2]), "a")
        >>> len(memory)
        0
        """
        other = Memory[T](self.capacity)
        other._entries = self._entries
        return other

    def transformed(self, change: Callable[[Signature, T], tuple[Signature, Any]]) -> Memory[Any]:
        """A memory of the same order with each entry changed, for when the bins change. O(entries) changes.

        >>> memory = Memory[str]()
        >>> memory.remember(signature([1, 2]), "a")
        >>> [value for _, value in memory.transformed(lambda known, value: (known[::-1], value * 2))]
        ['aa']
        """
        changed: Memory[Any] = Memory(self.capacity)
        changed._entries = tuple(_Entry(*change(entry.signature, entry.value)) for entry in self._entries)
        return changed
