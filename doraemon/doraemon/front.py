"""Fronts: what an index holds, a state with the level of single changes made since.

A single change in the deltas costs a copy of the recent one. The level takes it in place instead, in C, and answers
questions of one key or one range together with the state's view. Batches and long ranges are asked of the settled
state, into whose recent delta the level was folded; a snapshot freezes the level as it is, and the next change begins
another front. Without the C extension, or without a GIL, there is no level, and every change goes to the recent delta.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import state as states
from .arrays import Values
from .changes import fold
from .engine import native
from .search import Scanned, View
from .state import REQUIRED, State, values_error
from .values import plain_type, value_like

Get = Callable[[Any, Any], Any]
Put = Callable[[object, Any], bool | None]
LONG = 1 << 18  #: keys of a range, above which one is copied from the settled state, while other threads run
SHARE = 256  #: of the keys, how many times fewer a level has before it is folded


class OpenFront:
    """A state and the single changes since: every question of one key, O(1) to freeze.

    `insert`, `update` and `discard` answer None where the level does not take the change: it is full or frozen, there
    is none, or the key or the value is not one of this index.

    Attributes:
        state: what the level lies over.
        view: answers questions of one key, changes included.
        get: a map's value for a key, or the default that is given; raises TypeError if there are keys only.
    """

    OPENED = ("_level", "view", "insert", "update", "discard", "get")  #: attributes that come with the level
    __slots__ = (*OPENED, "_frozen", "_lock", "_settled", "state")
    _level: Any
    view: View
    insert: Put
    update: Put
    discard: Callable[[object], bool | None]
    get: Get

    def __init__(self, state: State) -> None:
        self.state = state
        self._settled = (0, state)
        self._frozen = False
        self._lock = threading.Lock()

    def _open(self) -> None:
        state, level = self.state, None
        if state.engine == "native" and native.Level is not None:
            level = _level_over(state)
            if self._frozen:
                level.freeze()
        self.view = state.view if level is None else cast(View, level)
        changing = level or _NoLevel()
        self.insert, self.update, self.discard = changing.insert, changing.update, changing.discard
        self.get = self._getter(self.view)
        self._level = level

    @property
    def _is_open(self) -> bool:
        return type(self) is OpenFront

    def __len__(self) -> int:
        return self.state.length + self._level.net if self._is_open and self._level is not None else self.state.length

    # ---- ranks and ranges

    def select(self, rank: int) -> Any:
        """The key of a rank; negative ranks count from the end. Raises IndexError if there is no such rank."""
        code = self.view.select(rank)
        if code is None:
            n = len(self)
            raise IndexError(f"rank {rank} of {n} keys: give one from {-n} to {n - 1}")
        return self.state.key_type.decode_one(code)

    def neighbour(self, key: Any, right: bool, offset: int) -> Any | None:
        """The key `offset` ranks from this one's left or right rank, None if there is none."""
        code = self.view.neighbour(key, right, offset)
        return None if code is None else self.state.key_type.decode_one(code)

    def count(self, low: ArrayLike, high: ArrayLike, threads: int = 1) -> Any:
        """How many keys are from `low` on and below `high`: an int, or int64 for arrays of ends."""
        is_batch = self.state.key_type.is_batch
        if is_batch(low) or is_batch(high):
            return self.settled().count_many(low, high, threads)
        return self.view.count(low, high)

    def keys_between(self, low: Any, high: Any, limit: int | None) -> NDArray[Any]:
        """The keys from `low` on and below `high`, ascending; None leaves an end open, or has all of them."""
        arrays, _, state = self._scan(low, high, limit, self.state.new_keys)
        return state.scanned_keys(arrays)

    def values_between(self, low: Any, high: Any, limit: int | None) -> Values:
        """A map's values for `keys_between`. Raises TypeError if there are keys only."""
        arrays, late, state = self._scan(low, high, limit, self.state.new_items)
        return state.scanned_values(arrays, late)

    def items_between(self, low: Any, high: Any, limit: int | None) -> tuple[NDArray[Any], Values]:
        """A map's keys and values. Raises TypeError if there are keys only."""
        arrays, late, state = self._scan(low, high, limit, self.state.new_items)
        return state.scanned_keys(arrays), state.scanned_values(arrays, late)

    def _scan(
        self, low: Any, high: Any, limit: int | None, new: Callable[[int], Scanned]
    ) -> tuple[Scanned, list[tuple[int, Any]], State]:
        """What a scan found, and the state that was scanned: this one with the level, or the settled one."""
        if limit is None:
            limit = sys.maxsize
        elif limit < 0:
            raise ValueError(f"limit {limit}: give how many keys to return at most")
        found, state = self.view.scan(low, high, limit, LONG, new), self.state
        if found is None:
            state = self.settled()
            found = state.view.scan(low, high, limit, sys.maxsize, new)
        assert found is not None
        return *found, state

    def freeze(self) -> None:
        """Take no more changes. O(1)."""
        with self._lock:
            self._frozen = True
            if self._is_open and self._level is not None:
                self._level.freeze()

    @property
    def is_closed(self) -> bool:
        """Whether there is a level that takes no more changes."""
        return self._level is not None and self._level.closed

    def settled(self, append: bool = False) -> State:
        """The state with the level's changes in its recent delta. O(changes + delta), O(1) without new changes.

        A writer, who makes the next state of it, may `append` keys behind the run.
        """
        version, state = self._settled
        if not self._is_open or self._level is None or self._level.version == version:
            return state
        version, codes, net, alive, values = self._level.entries()
        if isinstance(values, bytes):
            values = np.frombuffer(values, self.state.value_dtype)
        state = fold(
            self.state,
            version,
            np.frombuffer(codes, np.uint64),
            np.frombuffer(net, np.int64),
            np.frombuffer(alive, np.bool_),
            values,
            append,
        )
        self._settled = (version, state)  # another reader's may be older: its version tells
        return state

    def _getter(self, view: View) -> Get:
        if not self.state.is_map:
            return _no_values
        return partial(_copied, view.get) if self.state.value_dtype.kind == "V" else view.get


class Front(OpenFront):
    """A front that becomes an open one when it is first asked for what needs its level, and with that the state's view.

    One that lives from one batch of changes to the next needs none. Once it is open nothing is in the way of questions.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        """What is asked for before the front was opened, which opens it."""
        if name not in self.OPENED:
            raise AttributeError(f"a front has no {name!r}")
        with self._lock:
            if not self._is_open:
                self._open()
                self.__class__ = OpenFront  # type: ignore[assignment]
        return getattr(self, name)


def _copied(get: Get, key: Any, default: Any) -> Any:
    value = get(key, default)
    return value.copy() if isinstance(value, np.void) else value  # a record is a view of where it is stored


def _no_values(key: Any, default: Any) -> Any:
    raise values_error()


def _level_over(state: State) -> Any:
    capacity = max(states.MIN_DELTA, len(state.run) // SHARE)
    if not state.is_map:
        return native.Level(state.view, capacity, None, None, None, REQUIRED)
    dtype = state.value_dtype
    plain = plain_type(dtype)
    one = None if plain is None else np.zeros(1, dtype)
    return native.Level(state.view, capacity, partial(value_like, dtype), plain, one, REQUIRED)


class _NoLevel:
    """What refuses every change."""

    def insert(self, key: object, value: Any, /) -> None:
        """Refuse."""

    update = insert

    def discard(self, key: object, /) -> None:
        """Refuse."""
