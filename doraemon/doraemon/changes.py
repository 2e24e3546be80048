"""From what users give to states: the first state of an index, and the one after each change, which touches nothing of
the state before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .arrays import Codes, Ints, Mask, Values
from .choosing import key_type_of
from .delta import Delta, add_counts, put
from .engine import Engine
from .inputs import as_sequence
from .keytype import KeyType
from .run import Models, Run
from .splicing import SPARE, Room, ascending, copied, distinct, in_order
from .state import REQUIRED, State
from .texts import column_dtype
from .values import array_of, as_values, values_like


def create(keys: ArrayLike, values: ArrayLike | None, dtype: DTypeLike | None, engine: Engine, memory: Models) -> State:
    """The state of keys, and of a map's values, in any order; see `Index`."""
    of_column = column_dtype(keys)
    items: Any = as_sequence(keys) if of_column is None else keys  # of which no objects need to be made
    key_type = key_type_of(items, of_column if dtype is None else dtype, engine)
    room = _sorted(key_type, _admitted(key_type, items), values, engine)
    run = Run.of(*room.first(room.used), engine, memory)
    return State.of(key_type, engine, replace(run, room=room))


def insert(state: State, key: Any, value: Any) -> State:
    """One more key, with a value in a map; see `Index.insert`."""
    if state.is_map and state.view.contains(key):
        raise KeyError(f"{key!r} is in the map: use update() to replace its value")
    return update(state, key, value)


def update(state: State, key: Any, value: Any) -> State:
    """A map with a value for the key, new or not; a multiset with one more copy, where the value is REQUIRED."""
    code = state.key_type.admit_one(key)
    if code is None:
        return update(state.respaced(), key, value)
    codes = np.array([code], dtype=np.uint64)
    return _put(state, codes, None if value is REQUIRED else [value])


def extend(state: State, keys: ArrayLike, values: ArrayLike | None) -> State:
    """Many more keys; in a map values for many, the last of equal keys winning."""
    items: Any = keys if hasattr(keys, "__len__") else as_sequence(keys)  # they may be looked at twice
    codes = state.key_type.admit(items)
    return extend(state.respaced(), items, values) if codes is None else _put(state, codes, values)


def discard(state: State, key: Any) -> State:
    """One copy of the key less; the state itself if there is none."""
    if not state.view.contains(key):
        return state
    return _remove(state, np.array([state.key_type.encode_one(key)], dtype=np.uint64))


def discard_many(state: State, keys: ArrayLike) -> State:
    """Each key that is there less, from a multiset one copy per time it is given."""
    codes, exact, _ = state.key_type.cuts(keys)
    return _remove(state, codes if exact is None else codes[exact])


def fold(
    state: State, writes: int, codes: Codes, net: Ints, alive: Mask, values: list[Any] | Values, append: bool
) -> State:
    """The state after single changes of some codes, distinct and ascending.

    Args:
        state: before them.
        writes: how many changes were made, which stamps this fold later than an earlier one over the same state.
        codes: uint64 [changes].
        net: int64 [changes], the change in the number of keys of each code.
        alive: bool [changes], of a map: whether the code is in it afterwards.
        values: of a map [changes], in a list or of its dtype; those of codes not alive are not used.
        append: whether keys above all others may go behind the run: only one successor of a state may take that place.
    """
    if not state.is_map:
        changed = net != 0
        return _with_copies(state, codes[changed], net[changed], writes, append)
    dtype, gone = state.value_dtype, codes[~alive]
    if isinstance(values, list):
        new = array_of([value for value, there in zip(values, alive.tolist(), strict=True) if there], dtype)
    else:
        new = values[alive]
    state, delta = _with_values(state, codes[alive], new, writes, append)
    if len(gone):
        none = np.zeros(len(gone), dtype)
        delta = put(delta, gone, False, none, state.writes + writes, state.counted)
    return state if delta is state.recent else state.with_recent(delta, writes)


def _put(state: State, codes: Codes, values: Any) -> State:
    if not state.is_map:
        if values is not None:
            raise TypeError("this index has keys only: give keys without values, or make it with values")
        highest = state.highest
        if len(codes) and highest is not None and int(codes.max()) <= highest:
            return state.with_pending(codes)
        return _with_copies(state, *distinct(codes, state.engine))
    if values is None:
        raise TypeError("this index is a map: give a value for every key")
    new = values_like(values, state.value_dtype, len(codes))
    codes, last = _unique_last(codes)
    state, delta = _with_values(state, codes, new[last])
    return state if delta is state.recent else state.with_recent(delta)


def _with_copies(state: State, codes: Codes, counts: Ints, writes: int = 1, append: bool = True) -> State:
    """A multiset after changes of the counts of codes, distinct and ascending."""
    among = state.count_not_above(codes) if append else len(codes)
    longer = state.with_appended(np.repeat(codes[among:], counts[among:]), None)
    if longer is not None:
        state, codes, counts = longer, codes[:among], counts[:among]
    if len(codes) == 0:
        return state
    delta = add_counts(state.recent, codes, counts, state.counted)
    return state.with_recent(delta, writes)


def _with_values(
    state: State, codes: Codes, values: Values, writes: int = 1, append: bool = True
) -> tuple[State, Delta]:
    """A map with values for codes, distinct and ascending: the state after those that could be appended, and the recent
    changes with the others."""
    among = state.count_not_above(codes) if append else len(codes)
    longer = state.with_appended(codes[among:], values[among:])
    if longer is not None:
        state, codes, values = longer, codes[:among], values[:among]
    if len(codes) == 0:
        return state, state.recent
    return state, put(state.recent, codes, True, values, state.writes + writes, state.counted)


def _remove(state: State, codes: Codes) -> State:
    codes, counts = distinct(codes, state.engine)
    if state.is_map:
        filler = np.zeros(len(codes), dtype=state.value_dtype)
        return state.with_recent(put(state.recent, codes, False, filler, state.writes + 1, state.counted))
    present: Ints = state.code_ranks(codes, right=True) - state.code_ranks(codes)
    removed = np.minimum(counts, present)
    codes, change = codes[removed > 0], -removed[removed > 0]
    return state.with_recent(add_counts(state.recent, codes, change, state.counted))


def _admitted(key_type: KeyType, keys: ArrayLike) -> Codes:
    codes = key_type.admit(keys)
    if codes is None:
        raise OverflowError("there are more keys than codes")
    return codes


def _sorted(key_type: KeyType, codes: Codes, values: ArrayLike | None, engine: Engine) -> Room:
    """Copies of codes and of a map's values in order, which no one else can change, and room for more behind them."""
    count, spare = len(codes), len(codes) // SPARE
    if values is None:
        return Room((in_order(codes, engine, spare), None), count)
    values = as_values(values, count)
    if not ascending(codes):
        order = np.argsort(codes, kind="stable")
        codes, values = codes[order], values[order]
    twice = codes[1:] == codes[:-1]
    if twice.any():
        key = key_type.decode_one(int(codes[int(np.argmax(twice))]))
        raise ValueError(f"key {key!r} occurs more than once: start from an empty map and extend() it, last one wins")
    return Room((copied(codes, spare), copied(values, spare)), count)


def _unique_last(codes: Codes) -> tuple[Codes, Ints]:
    """Distinct codes in order, and where in the input each occurs last."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    last = np.append(ordered[1:] != ordered[:-1], True)[: len(codes)]
    return ordered[last], order[last]
