"""What an index is, whether or not it can change: its state, its size, its file."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from . import storage
from .adaptation import Models
from .explanation import Explanation, explain
from .packing import pack, unpack
from .state import State


class Base:
    """A state, and the memory of workloads that belongs to it."""

    _state: State
    _memory: Models
    _OWN: ClassVar[frozenset[str]] = frozenset({"_state", "_memory"})  #: attributes that are not a subclass's

    def __len__(self) -> int:
        """How many keys there are, copies counted. O(1).

        >>> from doraemon import Index
        >>> len(Index([3, 1, 3]))
        3
        """
        return self._state.length

    @property
    def dtype(self) -> np.dtype[Any]:
        """The keys' dtype. O(1).

        >>> from doraemon import Index
        >>> Index([0.5, 1.5]).dtype
        dtype('float64')
        """
        return self._state.key_type.dtype

    @property
    def is_map(self) -> bool:
        """Whether there are values beside the keys. O(1).

        >>> from doraemon import Index
        >>> Index([1, 2]).is_map, Index([1, 2], values=[10, 20]).is_map
        (False, True)
        """
        return self._state.run.values is not None

    def explain(self) -> Explanation:
        """What the index is made of and what its model costs. O(leaves).

        >>> from doraemon import Index
        >>> Index(range(100), engine="numpy").explain().engine
        'numpy'
        """
        return explain(self._state, self._memory)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index with its changes, heat and model memory to a file, in one step: all of it or nothing.

        O(n). `Index.open` reads it.

        >>> import tempfile
        >>> from doraemon import Index
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     Index([1, 2]).save(f"{directory}/two.dora")
        ...     len(Index.open(f"{directory}/two.dora"))
        2
        """
        storage.write(path, *pack(self._state, self._memory))

    def __repr__(self) -> str:
        """The class, the dtype and the number of keys. O(1)."""
        state = self._state
        kind = "map" if self.is_map else "multiset"
        return f"<{type(self).__name__}: {kind} of {state.length:,} {state.key_type.dtype} keys>"

    # ---- copies, which are of the same class and have the same attributes

    def __copy__(self) -> Self:
        """The same at this moment, sharing what cannot change. O(1)."""
        other = type(self).__new__(type(self))
        other._set_attributes(self._attributes())
        other._restore(self._state, self._memory.copy(), *self._options())
        return other

    def __getstate__(self) -> object:
        """What pickles and deep copies hold. O(1), as the arrays are not copied."""
        packed = pack(self._state, self._memory)
        return packed, self._state.engine, self._options(), self._attributes()

    def __setstate__(self, saved: Any) -> None:
        """Become what was pickled, with NumPy's engine where that was used or the other is not there."""
        (header, arrays), engine, options, attributes = saved
        self._set_attributes(attributes)
        self._restore(*unpack(header, arrays, "numpy" if engine == "numpy" else None), *options)

    def _restore(self, state: State, memory: Models) -> None:
        self._state, self._memory = state, memory

    def _options(self) -> tuple[Any, ...]:
        """What `_restore` takes beside the state and the memory."""
        return ()

    def _attributes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a subclass added: in its dictionary, and in slots."""
        found: Any = object.__getstate__(self)
        named, slots = found if isinstance(found, tuple) else (found, None)
        return {name: value for name, value in (named or {}).items() if name not in self._OWN}, slots or {}

    def _set_attributes(self, attributes: tuple[dict[str, Any], dict[str, Any]]) -> None:
        for name, value in (attributes[0] | attributes[1]).items():
            object.__setattr__(self, name, value)

    @staticmethod
    def _require_values(state: State) -> NDArray[Any]:
        if state.run.values is None:
            raise TypeError("this index has keys only: make it with values, Index(keys, values), to look them up")
        return state.run.values
