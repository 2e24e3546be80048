"""`Index`, and its snapshots: what users make, ask, change and save.

This module is longer than others because it is the whole public interface, to be read from top to bottom: what may be
asked of an index and of a snapshot alike, then what changes an index. The work is done on immutable states: `state`
answers the questions, `changes` and `adaptation` make the next state, and an index holds a `front`, its state with the
single changes since.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Reversible
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import adaptation, changes, columns, storage
from .adaptation import Adaptation
from .arrays import Ints, Mask
from .engine import choose
from .errors import CorruptFileError
from .explanation import Explanation, explain
from .following import follow
from .front import Front
from .packing import pack, unpack
from .run import Models
from .state import REQUIRED, State

Side = Literal["left", "right"]
Merging = Literal["inline", "background", "manual"]
Adapting = Literal["manual", "auto"]
_ABSENT: Any = object()


class _Questions(Collection[Any], Reversible[Any]):
    """What may be asked of an index and of a snapshot, each question of one state, even while others write.

    Of `collections.abc` it is `Reversible` and a `Collection`: of the keys in order, copies included. It is no
    `Sequence`, as `[]` takes keys and not ranks, no `Set`, as it holds copies, and no `Mapping`, as a multiset has no
    values, and `keys`, `values` and `items` give arrays.

    In the complexities, n is the number of keys, d that of changes since the last merge, q that of queries. A model
    search costs O(log buckets + log window), with a window of a few keys: see `explain()`.
    """

    _OWN: ClassVar[frozenset[str]] = frozenset(
        {"_front", "_threads", "_merging", "_adapting", "_lock", "_adapt_lock", "_merger"}
    )  #: attributes that are not a subclass's

    _threads = 1  #: how many may share a batch

    def __init__(self, front: Front) -> None:
        self._begin(front)

    def _begin(self, front: Front) -> None:
        """Hold a front: what `__init__` does, also for copies and files, which are made without it."""
        self._front = front

    @property
    def _state(self) -> State:
        """The state as of now, with every change in it."""
        return self._front.settled()

    @_state.setter
    def _state(self, state: State) -> None:
        self._front = Front(state)

    def __len__(self) -> int:
        """How many keys there are, copies counted. O(1).

        >>> len(Index([3, 1, 3]))
        3
        """
        return len(self._front)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The keys' dtype: of str NumPy's StringDType, of bytes `S` without a length. O(1).

        >>> Index([0.5, 1.5]).dtype
        dtype('float64')
        """
        return self._front.state.key_type.dtype

    @property
    def is_map(self) -> bool:
        """Whether there are values beside the keys. O(1).

        >>> Index([1, 2]).is_map, Index([1, 2], values=[10, 20]).is_map
        (False, True)
        """
        return self._front.state.is_map

    def __repr__(self) -> str:
        """The class, the kind and number of keys, and their dtype. O(1)."""
        kind = "map" if self.is_map else "multiset"
        return f"<{type(self).__name__}: {kind} of {len(self):,} {self.dtype} keys>"

    # ---- one key

    def __contains__(self, key: object) -> bool:
        """Whether the key is in the index. One model search.

        Any number may be asked for; what no key can equal is not in the index.

        Raises:
            TypeError: the key is of another kind than the index's: no number, time, str, bytes or tuple.

        >>> index = Index([2**63, 7], dtype="uint64")
        >>> 2**63 in index, 2**63 - 1 in index, -1 in index, 7.5 in index
        (True, False, False, False)
        """
        return self._front.view.contains(key)

    def __getitem__(self, key: Any) -> Any:
        """A map's value for the key. One model search.

        Raises:
            KeyError: the key is absent.
            TypeError: the index has keys only.

        >>> int(Index([10, 20], [1, 2])[20])
        2
        """
        get = self._front.get  # Python loads an attribute in a slot faster than a method that is none
        value = get(key, _ABSENT)
        if value is _ABSENT:
            raise KeyError(key)
        return value

    def get(self, key: Any, default: Any = None) -> Any:
        """A map's value for the key, or the default if the key is absent. One model search.

        Raises:
            TypeError: the index has keys only.

        >>> Index([10, 20], [1.5, 2.5]).get(30, default=0.0)
        0.0
        """
        get = self._front.get
        return get(key, default)

    def bisect_left(self, key: Any) -> int:
        """How many keys are below this one. One model search.

        >>> Index([1, 3, 3, 5]).bisect_left(3)
        1
        """
        return self._front.view.left(key)

    def bisect_right(self, key: Any) -> int:
        """How many keys are not above this one. One model search.

        >>> Index([1, 3, 3, 5]).bisect_right(3)
        3
        """
        return self._front.view.right(key)

    def rank(self, key: Any) -> int:
        """How many keys are below this one: another name of `bisect_left`. One model search.

        >>> Index([0.5, 1.5]).rank(1)
        1
        """
        return self._front.view.left(key)

    def select(self, rank: int) -> Any:
        """The key of a rank, the inverse of `rank`; negative ranks count from the end. O(log d).

        Raises:
            IndexError: there is no key of that rank.

        >>> Index([30, 10, 20]).select(-1)
        30
        """
        return self._front.select(rank)

    def find_lt(self, key: Any) -> Any | None:
        """The greatest key below this one, None if there is none. One model search.

        >>> Index([1, 3, 5]).find_lt(3)
        1
        """
        return self._front.neighbour(key, right=False, offset=-1)

    def find_le(self, key: Any) -> Any | None:
        """The greatest key not above this one, None if there is none. One model search.

        >>> Index([1, 3, 5]).find_le(4)
        3
        """
        return self._front.neighbour(key, right=True, offset=-1)

    def find_gt(self, key: Any) -> Any | None:
        """The least key above this one, None if there is none. One model search.

        >>> Index([1, 3, 5]).find_gt(5) is None
        True
        """
        return self._front.neighbour(key, right=True, offset=0)

    def find_ge(self, key: Any) -> Any | None:
        """The least key not below this one, None if there is none. One model search.

        >>> Index([1, 3, 5]).find_ge(4)
        5
        """
        return self._front.neighbour(key, right=False, offset=0)

    # ---- ranges

    def range(self, low: Any = None, high: Any = None, limit: int | None = None) -> NDArray[Any]:
        """The keys from `low` on and below `high`, ascending, or only the first `limit` of them.

        None leaves an end open. Two model searches and O(result).

        Raises:
            ValueError: the limit is negative.

        >>> Index([5, 1, 3, 9]).range(3, 9)
        array([3, 5])
        >>> Index([5, 1, 3, 9]).range(2, limit=2)
        array([3, 5])
        """
        return self._front.keys_between(low, high, limit)

    def keys(self) -> NDArray[Any]:
        """All keys, ascending. O(n).

        >>> Index([5, 1, 3]).keys()
        array([1, 3, 5])
        """
        return self.range()

    def values(self, low: Any = None, high: Any = None, limit: int | None = None) -> NDArray[Any]:
        """A map's values in the order of the keys, of all or of a `range`. Two model searches and O(result).

        Raises:
            TypeError: the index has keys only.
            ValueError: the limit is negative.

        >>> Index([5, 1, 3], [50, 10, 30]).values(2)
        array([30, 50])
        """
        return self._front.values_between(low, high, limit)

    def items(self, low: Any = None, high: Any = None, limit: int | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """A map's keys and values, of all or of a `range`. Two model searches and O(result).

        Raises:
            TypeError: the index has keys only.
            ValueError: the limit is negative.

        >>> Index([5, 1, 3], ["five", "one", "three"]).items(2)
        (array([3, 5]), array(['three', 'five'], dtype='<U5'))
        """
        return self._front.items_between(low, high, limit)

    def __iter__(self) -> Iterator[Any]:
        """The keys, ascending, as they were when the iteration began. O(n) memory.

        >>> list(Index([2, 1]))
        [1, 2]
        """
        return iter(self._state.key_type.items(self.range()))

    def __reversed__(self) -> Iterator[Any]:
        """The keys, descending, as they were when the iteration began. O(n) memory.

        >>> list(reversed(Index([2, 1])))
        [2, 1]
        """
        return iter(list(self)[::-1])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """All keys, ascending: what NumPy and pandas make of the index. O(n).

        Raises:
            ValueError: `copy` is False, as the keys are decoded into a new array.

        >>> import numpy as np
        >>> np.asarray(Index([5, 1, 3], [50, 10, 30]))
        array([1, 3, 5])
        """
        if copy is False:
            raise ValueError("the keys are decoded into a new array: ask for a copy")
        keys = self.range()
        return keys if dtype is None else keys.astype(dtype)

    # ---- batches

    def searchsorted(self, queries: ArrayLike, side: Side = "left") -> Ints:
        """The rank of each query, as `np.searchsorted` on the sorted keys would say. q model searches.

        Queries of the index's dtype are fastest; all others are compared exactly, those that no array operation
        compares exactly (ints against float keys, floats against int keys) one by one.

        Raises:
            ValueError: `side` is neither "left" nor "right", or a query is missing or masked.

        >>> import numpy as np
        >>> Index([1, 3, 3, 5]).searchsorted(np.array([0, 3, 9]), side="right")
        array([0, 3, 4])
        """
        if side not in ("left", "right"):
            raise ValueError(f"side {side!r}: choose 'left' or 'right'")
        return self._state.ranks(queries, side == "right", self._threads)

    def contains(self, queries: ArrayLike) -> Mask:
        """Whether each query is in the index. q model searches.

        >>> Index([1, 3]).contains([1, 2, 3])
        array([ True, False,  True])
        """
        return self._state.contains_many(queries, self._threads)

    def get_many(self, queries: ArrayLike, default: Any = REQUIRED) -> NDArray[Any]:
        """A map's value for each query, the default where it is absent. q model searches.

        The result has the dtype of the values, or one that holds the default and every value as well, or is an array
        of objects where no dtype does.

        Raises:
            KeyError: a query is absent, and there is no default.
            TypeError: the index has keys only.

        >>> Index([1, 3], [10, 30]).get_many([3, 2], default=-1)
        array([30, -1])
        """
        return self._state.get_many(queries, default, self._threads)

    def count(self, low: ArrayLike, high: ArrayLike) -> Any:
        """How many keys are from `low` on and below `high`: an int, or for arrays of ends an int64 array.

        Two model searches per range; 0 where the ends are the wrong way round.

        >>> import numpy as np
        >>> index = Index([1, 3, 3, 5])
        >>> index.count(3, 5), index.count(np.array([0, 9]), np.array([9, 0]))
        (2, array([4, 0]))
        """
        return self._front.count(low, high, self._threads)

    # ---- the whole

    def to_arrow(self, low: Any = None, high: Any = None, *, zone: str | None = None) -> Any:
        """The keys, and a map's values, of all or of a `range` as a `pyarrow.Table` with the columns "key" and "value".

        Two model searches and O(result). Numbers, and times from seconds to nanoseconds, are not copied again. Records
        become structs.

        Args:
            low: as in `range`.
            high: as in `range`.
            zone: what zone to label the keys with, which are times of UTC; by default none.

        Raises:
            ImportError: pyarrow is not installed.
            TypeError: Arrow has no such times, or a zone is given for keys that are none.

        >>> Index([5, 1, 3], [0.5, 0.1, 0.3]).to_arrow(2).to_pydict()
        {'key': [3, 5], 'value': [0.3, 0.5]}
        """
        keys, values = self.items(low, high) if self.is_map else (self.range(low, high), None)
        return columns.arrow_table(keys, values, zone)

    def explain(self) -> Explanation:
        """What the index is made of and what its model costs. O(leaves).

        >>> Index(range(100), engine="numpy").explain().engine
        'numpy'
        """
        return explain(self._state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index with its changes, heat and model memory to a file, in one step: all of it or nothing.

        O(n). `Index.open` reads it.

        Raises:
            OSError: the file cannot be written, or what is there is not a file.
            TypeError: the values are objects, which a file does not hold.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     Index([1, 2]).save(f"{directory}/two.dora")
        ...     len(Index.open(f"{directory}/two.dora"))
        2
        """
        storage.write(path, *pack(self._state))

    # ---- copies and pickles, which are of the same class and have the same attributes

    def __copy__(self) -> Self:
        """A copy as of now, sharing what cannot change. O(1)."""
        other, front = type(self).__new__(type(self)), self._front
        front.freeze()
        other._restore(front, self._options(), self._attributes())
        return other

    def __getstate__(self) -> object:
        """What pickles and deep copies hold. O(1), as the arrays are not copied."""
        return pack(self._state), self._state.engine, self._options(), self._attributes()

    def __setstate__(self, saved: Any) -> None:
        """Become what was pickled, with NumPy's engine where that was used or the other is not there."""
        (header, arrays), engine, options, attributes = saved
        state = unpack(header, arrays, "numpy" if engine == "numpy" else None)
        self._restore(Front(state), options, attributes)

    def _restore(self, front: Front, options: tuple[Any, ...], attributes: tuple[dict[str, Any], ...]) -> None:
        for name, value in (attributes[0] | attributes[1]).items():
            object.__setattr__(self, name, value)
        self._begin(front, *options)

    def _options(self) -> tuple[Any, ...]:
        """Arguments of `_begin` after the state."""
        return ()

    def _attributes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a subclass added: in its dictionary, and in slots."""
        found: Any = object.__getstate__(self)
        named, slots = found if isinstance(found, tuple) else (found, None)
        return {name: value for name, value in (named or {}).items() if name not in self._OWN}, slots or {}


class Snapshot(_Questions):
    """A frozen view of an index, made by `Index.snapshot`: all its questions, none of its changes.

    >>> Index([1, 3]).snapshot()
    <Snapshot: multiset of 2 int64 keys>
    """

    def _begin(self, front: Front, threads: int = 1) -> None:
        super()._begin(front)
        self._threads = threads

    def _options(self) -> tuple[int]:
        return (self._threads,)


class Index(_Questions):
    """A sorted multiset of keys, or with values a map of unique keys, searched through a learned model.

    Keys are uint64, int64, uint32, int32, float64, float32 or datetime64, str, bytes, or records of numbers and times;
    NaN and NaT are refused. Any number of threads may read while one or more write: writers take turns, readers wait
    for nobody and see each write whole.

    Args:
        keys: in any order.
        values: one per key; the keys must then be distinct.
        dtype: of the keys; that of `keys` by default, int64 for Python ints and float64 for Python floats. "str" or
            "bytes" for texts; tuples need that of records, as [("a", "int64"), ("b", "float64")].
        engine: "native" or "numpy"; by default the C extension if it was built.
        merging: who merges changes into the run when they have become many: the write that made them so ("inline"),
            a thread ("background"), or only `compact()` ("manual").
        memory: how many past workloads to remember models and hot tables for.
        adapt: who calls `adapt()`: the user ("manual"), or a thread that looks whether there were new accesses and
            takes at most a hundredth of the time for them ("auto").
        threads: by how many threads at most `searchsorted`, `contains`, `get_many` and `count` answer a batch, each
            some ten thousands of its queries at a time; one by default. The answers are the same.

    Raises:
        TypeError: the keys' dtype is not supported, or something is not a sequence.
        ValueError: a key is missing, a map's keys are not distinct, or an option has no such value.

    O(n log n), O(n) for sorted keys.

    >>> index = Index([30, 10, 20])
    >>> index.bisect_left(25), 10 in index, index.range(15)
    (2, True, array([20, 30]))
    """

    def __init__(
        self,
        keys: ArrayLike = (),
        values: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
        *,
        engine: str | None = None,
        merging: Merging = "inline",
        memory: int = 16,
        adapt: Adapting = "manual",
        threads: int = 1,
    ) -> None:
        front = Front(changes.create(keys, values, dtype, choose(engine), Models(memory)))
        self._begin(front, merging, adapt, threads)

    def _begin(self, front: Front, merging: Merging = "inline", adapt: Adapting = "manual", threads: int = 1) -> None:
        if merging not in get_args(Merging):
            raise ValueError(f"merging {merging!r}: choose 'inline', 'background' or 'manual'")
        if adapt not in get_args(Adapting):
            raise ValueError(f"adapt {adapt!r}: choose 'manual' or 'auto'")
        if threads < 1:
            raise ValueError(f"threads {threads!r}: choose 1 or more, os.cpu_count() say")
        super()._begin(front)
        self._threads = threads
        self._merging = merging
        self._adapting = adapt
        self._lock = threading.Lock()  # writers take turns
        self._adapt_lock = threading.Lock()  # and who adapts, before that
        self._merger: threading.Thread | None = None
        if adapt == "auto":
            follow(self)

    def _options(self) -> tuple[Merging, Adapting, int]:
        return self._merging, self._adapting, self._threads

    def snapshot(self) -> Snapshot:
        """A frozen view of the index as it is now. O(1).

        >>> index = Index([1])
        >>> frozen = index.snapshot()
        >>> index.insert(2)
        >>> len(frozen), len(index)
        (1, 2)
        """
        front = self._front
        front.freeze()
        frozen = Snapshot(front)
        frozen._threads = self._threads
        return frozen

    def copy(self) -> Self:
        """An index with the same keys that changes independently. O(1), as both share the run.

        `copy.copy` does the same. A subclass's attributes are shared; `copy.deepcopy` copies them as well.

        >>> index = Index([1])
        >>> other = index.copy()
        >>> other.insert(2)
        >>> len(index), len(other)
        (1, 2)
        """
        return self.__copy__()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mmap: bool = False,
        *,
        verify: bool = True,
        engine: str | None = None,
        merging: Merging = "inline",
        adapt: Adapting = "manual",
        threads: int = 1,
    ) -> Self:
        """An index that `save` wrote; of a subclass, made without its `__init__`.

        The file's header, all sizes and all numbers of the model are checked always, so that no file makes a search
        leave its arrays.

        O(n); with `mmap` and without `verify` O(leaves + d), as keys are then read from the disk when they are
        searched. Keys that are str, bytes or wide records are read by the first question, which takes O(n).

        Args:
            path: of the file.
            mmap: map keys and values into memory instead of copying them. Changes stay in memory until `save`.
            verify: compare the checksums as well, and check that the keys are in order and that what the model and
                the changes say of them is true. This reads all of the file.
            engine: as in `Index`.
            merging: as in `Index`.
            adapt: as in `Index`.
            threads: as in `Index`.

        Raises:
            CorruptFileError: the file is damaged or not an index; the message says what is wrong with it.
            OSError: the file cannot be read.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     Index([1, 2]).save(f"{directory}/two.dora")
        ...     Index.open(f"{directory}/two.dora", mmap=True).bisect_right(1)
        1
        """
        chosen = choose(engine)
        try:
            state = unpack(*storage.read(path, mmap, verify), chosen, verify)
        except CorruptFileError as error:
            raise CorruptFileError(f"{os.fspath(path)} {error}") from None
        index = cls.__new__(cls)
        index._begin(Front(state), merging, adapt, threads)
        return index

    @classmethod
    def from_pandas(cls, keys: Any, values: Any = None, **options: Any) -> Self:
        """An index of the keys in a column of pandas.

        `Index(series)` does nearly the same; here what is no column is refused, and keys and values that are both
        Series must have the same labels. O(n log n), O(n) for sorted keys.

        Args:
            keys: a Series or a pandas Index of numbers, times or str, of NumPy's, nullable or Arrow's dtypes. Times
                with a zone become those of UTC.
            values: a map's, one per key in the order of the keys: a Series, an array or a list.
            options: as in `Index`.

        Raises:
            ImportError: pandas is not installed.
            TypeError: the keys are in something else, or their dtype is not supported.
            ValueError: an entry is missing, or the labels differ; the message names the remedy.

        >>> import pandas as pd
        >>> prices = pd.Series([9.5, 9.7], pd.to_datetime(["2026-01-02", "2026-01-05"]))
        >>> Index.from_pandas(prices.index, prices).get("2026-01-05")
        np.float64(9.7)
        """
        return cls(*columns.pandas_columns(keys, values), **options)

    @classmethod
    def from_arrow(cls, keys: Any, values: Any = None, **options: Any) -> Self:
        """An index of the keys in an Arrow column.

        NumPy reads the memory of a column of numbers or times in one chunk, so that nothing is copied to convert it;
        chunks are joined, dictionaries decoded. O(n log n), O(n) for sorted keys.

        Args:
            keys: a `pyarrow.Array` or `pyarrow.ChunkedArray` of numbers, timestamps, dates, strings or binaries.
                Times keep their unit, and times with a zone become those of UTC.
            values: a map's, one per key in the order of the keys: a column, an array or a list.
            options: as in `Index`.

        Raises:
            ImportError: pyarrow is not installed.
            TypeError: the keys are in something else, or their type is not supported.
            ValueError: an entry is null; the message names the remedy.

        >>> import pyarrow as pa
        >>> table = pa.table({"time": pa.array([3, 1], pa.timestamp("ms", "Europe/Berlin")), "price": [0.5, 0.25]})
        >>> index = Index.from_arrow(table["time"], table["price"])
        >>> index.dtype, index.values()
        (dtype('<M8[ms]'), array([0.25, 0.5 ]))
        """
        return cls(*columns.arrow_columns(keys, values), **options)

    # ---- changes: single ones go into the level, others make a new state and swap it in

    def insert(self, key: Any, value: Any = REQUIRED) -> None:
        """Add one key: another copy in a multiset; in a map a new one with its value.

        O(block) in C while only questions of one key or one range come in between, else O(sqrt(d)) amortised; and from
        time to time a merge in O(n).

        Raises:
            KeyError: the key is in the map.
            TypeError: a map's value is not given, is given to a multiset, or is of another kind than the others.
            ValueError: the key is not a value of the keys' dtype.

        >>> index = Index([1, 3])
        >>> index.insert(2)
        >>> index.keys()
        array([1, 2, 3])
        """
        insert = self._front.insert
        put = insert(key, value)
        if not put and not (put is None and self._renew(key).insert(key, value)):
            self._change(lambda state: changes.insert(state, key, value))

    def update(self, key: Any, value: Any) -> None:
        """Set a map's value for the key, new or not; `index[key] = value` does the same.

        As costly as `insert`.

        Raises:
            OverflowError: the value does not fit the values' dtype.
            TypeError: the index has keys only, or the value is of another kind than the others.
            ValueError: the key is not a value of the keys' dtype.

        >>> index = Index([1, 3], [10, 30])
        >>> index.update(3, 33)
        >>> int(index[3])
        33
        """
        update = self._front.update
        if not update(key, value) and not self._renew(key).update(key, value):
            self._change(lambda state: changes.update(state, key, value))

    __setitem__ = update

    def extend(self, keys: ArrayLike, values: ArrayLike | None = None) -> None:
        """Add many keys; in a map, set the values of many, the last of equal keys winning.

        Those of a multiset are sorted when they are first asked for, or have become many.

        O(k log k + sqrt(k d)) amortised for k keys, O(k log k) above all others, for which there is room behind them;
        and from time to time a merge in O(n).

        Raises:
            OverflowError: a value does not fit the values' dtype.
            TypeError: a map's values are not given, are given to a multiset, or are of another kind than the others.
            ValueError: a key is missing or not a value of the keys' dtype, or there is not one value per key.

        >>> index = Index([1, 3], [10, 30])
        >>> index.extend([3, 2], [33, 22])
        >>> index.values()
        array([10, 22, 33])
        """
        self._change(lambda state: changes.extend(state, keys, values))

    def discard(self, key: Any) -> bool:
        """Remove the key, one copy of it from a multiset; whether it was there. As costly as `insert`.

        >>> index = Index([1, 3, 3])
        >>> index.discard(3), index.discard(2), index.keys()
        (True, False, array([1, 3]))
        """
        there = self._front.discard(key)
        if there is None:
            there = self._renew().discard(key)
        return there if there is not None else self._change(lambda state: changes.discard(state, key)) < 0

    def discard_many(self, keys: ArrayLike) -> int:
        """Remove each key that is there, from a multiset one copy per time it is given; how many were removed.

        O(k log k + sqrt(k d)) amortised for k keys.

        >>> index = Index([1, 3, 3, 5])
        >>> index.discard_many([3, 3, 3, 4, 5]), index.keys()
        (3, array([1]))
        """
        return -self._change(lambda state: changes.discard_many(state, keys))

    def compact(self) -> None:
        """Merge all changes into the run, and fit the model for the accesses counted so far. O(n).

        >>> index = Index([1, 3])
        >>> index.insert(2)
        >>> index.compact()
        >>> index.explain().delta_entries
        0
        """
        with self._lock:
            self._state = self._frozen().merged()

    def adapt(self) -> Adaptation:
        """Follow the accesses sampled lately: a hot table for the keys asked for most, and leaves for the rest.

        The table is looked up before the model, and answers what it holds. A few are made and timed on the newest
        samples, and the fastest stays, or none; where a similar workload was known, what was best for it is back
        without a trial. Of the buckets that are searched nevertheless only those are fitted whose number of leaves
        changes, and none of them if a similar workload was known; leaves change if the model says that it pays. Readers
        and writers go on meanwhile; only after a merge meanwhile it is done once more, and writers wait. O(samples +
        keys of the table + keys of the buckets fitted).

        >>> Index(range(100)).adapt().reason
        'too few accesses were counted to tell'
        """
        with self._adapt_lock:
            with self._lock:
                before = self._frozen()
            after, report = adaptation.adapt(before)  # takes long, and holds up nobody
            with self._lock:
                now = self._frozen()
                state = now.adapted(before, after)
                if state is None:
                    state, report = adaptation.adapt(now)
                self._state = state
            return report

    def _change(self, change: Callable[[State], State]) -> int:
        """Swap in the state that a change makes, and merge if that is due; how many keys there are more."""
        with self._lock:
            before = self._frozen()
            state = change(before)
            self._swap_in(state)
            return state.length - before.length

    def _frozen(self) -> State:
        """The state that a writer, who holds the lock, makes the next one of: single changes go on after it."""
        front = self._front
        front.freeze()
        return front.settled(append=True)

    def _renew(self, *new: Any) -> Front:
        """A front whose level takes changes, of new keys if some are given."""
        with self._lock:
            if self._front.is_closed:  # else another writer was faster
                self._swap_in(self._frozen())
            for key in new:
                self._front.state.key_type.learn(key)
            return self._front

    def _swap_in(self, state: State) -> None:
        """Hold the state, and merge it if that is due."""
        if self._merging == "inline" and state.merge_is_due:
            state = state.merged()
        self._front = Front(state)
        if self._merging == "background" and state.merge_is_due and not (self._merger and self._merger.is_alive()):
            self._merger = threading.Thread(target=self._merge_in_background, args=(state,), daemon=True)
            self._merger.start()

    def _merge_in_background(self, before: State) -> None:
        merged = before.merged()  # takes long, and holds up nobody
        with self._lock:
            now = self._frozen()
            if now.run.lineage is before.run.lineage:  # else compact() was faster
                now = now.after_merge(before, merged) or now
            self._front = Front(now)
