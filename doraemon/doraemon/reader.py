"""Everything that can be asked of an index: what `Index` and its snapshots have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .base import Base
from .inputs import as_sequence, holds_items
from .state import State
from .values import beside, dtype_beside

Side = Literal["left", "right"]
Ints = NDArray[np.int64]
_REQUIRED: Any = object()


class Reader(Base):
    """Questions to one state. Each question reads the state once, so that it sees one moment even while others write.

    In the complexities, n is the number of keys, d that of changes since the last merge, q that of queries. A model
    search costs O(log buckets + log window), with a window of a few keys: see `explain()`.
    """

    # ---- one key

    def __contains__(self, key: object) -> bool:
        """Whether the key is in the index. One model search.

        Any number may be asked for; what no key can equal is not in the index.

        >>> from doraemon import Index
        >>> index = Index([2**63, 7], dtype="uint64")
        >>> 2**63 in index, 2**63 - 1 in index, -1 in index, 7.5 in index
        (True, False, False, False)
        """
        return self._state.find(key) >= 0

    def __getitem__(self, key: Any) -> Any:
        """A map's value for the key; KeyError if the key is absent. One model search.

        >>> from doraemon import Index
        >>> int(Index([10, 20], [1, 2])[20])
        2
        """
        state = self._state
        at = state.find(key)
        if at < 0:
            self._require_values(state)
            raise KeyError(key)
        return state.value(at)

    def get(self, key: Any, default: Any = None) -> Any:
        """A map's value for the key, or the default if the key is absent. One model search.

        >>> from doraemon import Index
        >>> Index([10, 20], [1.5, 2.5]).get(30, default=0.0)
        0.0
        """
        state = self._state
        at = state.find(key)
        if at < 0:
            self._require_values(state)
            return default
        return state.value(at)

    def bisect_left(self, key: Any) -> int:
        """How many keys are below this one. One model search.

        >>> from doraemon import Index
        >>> Index([1, 3, 3, 5]).bisect_left(3)
        1
        """
        return self._state.rank(key, right=False)

    def bisect_right(self, key: Any) -> int:
        """How many keys are not above this one. One model search.

        >>> from doraemon import Index
        >>> Index([1, 3, 3, 5]).bisect_right(3)
        3
        """
        return self._state.rank(key, right=True)

    def rank(self, key: Any) -> int:
        """How many keys are below this one: another name of `bisect_left`. One model search.

        >>> from doraemon import Index
        >>> Index([0.5, 1.5]).rank(1)
        1
        """
        return self._state.rank(key, right=False)

    def select(self, rank: int) -> Any:
        """The key of a rank, the inverse of `rank`; negative ranks count from the end. O(log d).

        >>> from doraemon import Index
        >>> Index([30, 10, 20]).select(-1)
        30
        """
        state = self._state
        if not -state.length <= rank < state.length:
            raise IndexError(f"rank {rank} of {state.length} keys: give one from {-state.length} to {state.length - 1}")
        return state.key(rank % state.length)

    def find_lt(self, key: Any) -> Any | None:
        """The greatest key below this one, None if there is none. One model search.

        >>> from doraemon import Index
        >>> Index([1, 3, 5]).find_lt(3)
        1
        """
        state = self._state
        return _key_or_none(state, state.rank(key, right=False) - 1)

    def find_le(self, key: Any) -> Any | None:
        """The greatest key not above this one, None if there is none. One model search.

        >>> from doraemon import Index
        >>> Index([1, 3, 5]).find_le(4)
        3
        """
        state = self._state
        return _key_or_none(state, state.rank(key, right=True) - 1)

    def find_gt(self, key: Any) -> Any | None:
        """The least key above this one, None if there is none. One model search.

        >>> from doraemon import Index
        >>> Index([1, 3, 5]).find_gt(5) is None
        True
        """
        state = self._state
        return _key_or_none(state, state.rank(key, right=True))

    def find_ge(self, key: Any) -> Any | None:
        """The least key not below this one, None if there is none. One model search.

        >>> from doraemon import Index
        >>> Index([1, 3, 5]).find_ge(4)
        5
        """
        state = self._state
        return _key_or_none(state, state.rank(key, right=False))

    # ---- ranges

    def range(self, low: Any = None, high: Any = None) -> NDArray[Any]:
        """The keys from `low` on and below `high`, ascending; None leaves an end open.

        Two model searches and O(result).

        >>> from doraemon import Index
        >>> Index([5, 1, 3, 9]).range(3, 9)
        array([3, 5])
        """
        state = self._state
        at = state.positions(_ranks_between(state, low, high))
        return state.key_type.decode(state.codes_at(at))

    def keys(self) -> NDArray[Any]:
        """All keys, ascending. O(n).

        >>> from doraemon import Index
        >>> Index([5, 1, 3]).keys()
        array([1, 3, 5])
        """
        return self.range()

    def values(self, low: Any = None, high: Any = None) -> NDArray[Any]:
        """A map's values in the order of the keys, of all or of a `range`. Two model searches and O(result).

        >>> from doraemon import Index
        >>> Index([5, 1, 3], [50, 10, 30]).values(2)
        array([30, 50])
        """
        return self.items(low, high)[1]

    def items(self, low: Any = None, high: Any = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """A map's keys and values, of all or of a `range`. Two model searches and O(result).

        >>> from doraemon import Index
        >>> Index([5, 1, 3], ["five", "one", "three"]).items(2)
        (array([3, 5]), array(['three', 'five'], dtype='<U5'))
        """
        state = self._state
        at = state.positions(_ranks_between(state, low, high))
        return state.key_type.decode(state.codes_at(at)), state.values_at(at)

    def __iter__(self) -> Iterator[Any]:
        """The keys, ascending, as they were when the iteration began. O(n) memory.

        >>> from doraemon import Index
        >>> list(Index([2, 1]))
        [1, 2]
        """
        keys = self.range()
        return iter(keys if keys.dtype.kind == "M" else keys.tolist())

    def __reversed__(self) -> Iterator[Any]:
        """The keys, descending, as they were when the iteration began. O(n) memory.

        >>> from doraemon import Index
        >>> list(reversed(Index([2, 1])))
        [2, 1]
        """
        return iter(list(self)[::-1])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """All keys, ascending: what NumPy and pandas make of the index. O(n).

        >>> from doraemon import Index
        >>> import numpy as np
        >>> np.asarray(Index([5, 1, 3], [50, 10, 30]))
        array([1, 3, 5])
        """
        if copy is False:
            raise ValueError("the keys are decoded into a new array: ask for a copy")
        return self.range().astype(self.dtype if dtype is None else dtype, copy=False)

    # ---- batches

    def searchsorted(self, queries: ArrayLike, side: Side = "left") -> Ints:
        """The rank of each query, as `np.searchsorted` on the sorted keys would say. q model searches.

        Queries of the index's dtype are fastest; all others are compared exactly, those that no array operation
        compares exactly (ints against float keys, floats against int keys) one by one.

        >>> from doraemon import Index
        >>> import numpy as np
        >>> Index([1, 3, 3, 5]).searchsorted(np.array([0, 3, 9]), side="right")
        array([0, 3, 4])
        """
        if side not in ("left", "right"):
            raise ValueError(f"side {side!r}: choose 'left' or 'right'")
        return self._state.ranks(queries, right=side == "right")

    def contains(self, queries: ArrayLike) -> NDArray[np.bool_]:
        """Whether each query is in the index. q model searches.

        >>> from doraemon import Index
        >>> Index([1, 3]).contains([1, 2, 3])
        array([ True, False,  True])
        """
        return self._state.find_many(queries) >= 0

    def get_many(self, queries: ArrayLike, default: Any = _REQUIRED) -> NDArray[Any]:
        """A map's value for each query, the default where it is absent. q model searches.

        Without a default, KeyError for the first query that is absent. The result has the dtype of the values, or one
        that holds the default and every value as well, or is an array of objects where no dtype does.

        >>> from doraemon import Index
        >>> Index([1, 3], [10, 30]).get_many([3, 2], default=-1)
        array([30, -1])
        """
        state = self._state
        values = self._require_values(state)
        given = as_sequence(queries)
        at = state.find_many(given)
        absent = at < 0
        if default is not _REQUIRED:
            return beside(state.values_at(at[~absent]), absent, default, dtype_beside(default, values.dtype))
        if absent.any():
            first = int(np.argmax(absent))
            raise KeyError(f"query {first}, {given[first]!s}, is absent: give a default to look up keys that may be")
        return state.values_at(at)

    def count(self, low: ArrayLike, high: ArrayLike) -> Any:
        """How many keys are from `low` on and below `high`: an int, or for arrays of ends an int64 array.

        Two model searches per range; 0 where the ends are the wrong way round.

        >>> from doraemon import Index
        >>> import numpy as np
        >>> index = Index([1, 3, 3, 5])
        >>> index.count(3, 5), index.count(np.array([0, 9]), np.array([9, 0]))
        (2, array([4, 0]))
        """
        state = self._state
        counted = np.maximum(_ranks_of(state, high) - _ranks_of(state, low), 0)
        return int(counted) if np.ndim(counted) == 0 else counted


def _ranks_of(state: State, ends: Any) -> Ints | int:
    return state.ranks(ends, right=False) if holds_items(ends) else state.rank(ends, right=False)


def _key_or_none(state: State, rank: int) -> Any | None:
    return state.key(rank) if 0 <= rank < state.length else None


def _ranks_between(state: State, low: Any, high: Any) -> Ints:
    first = 0 if low is None else state.rank(low, right=False)
    last = state.length if high is None else state.rank(high, right=False)
    return np.arange(first, last)
