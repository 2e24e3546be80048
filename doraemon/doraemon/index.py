"""`Index`: what users make, change and save."""

from __future__ import annotations

import os
from typing import Self

from numpy.typing import ArrayLike, DTypeLike

from . import storage
from .adaptation import Models
from .building import run_of
from .engine import choose
from .errors import CorruptFileError
from .packing import unpack
from .reader import Reader
from .state import State
from .writer import Merging, Writer


class Snapshot(Reader):
    """A frozen view of an index: all its questions, none of its changes."""

    def __init__(self, state: State, memory: Models) -> None:
        self._state, self._memory = state, memory


class Index(Writer):
    """A sorted multiset of keys, or with values a map of unique keys, searched through a learned model.

    Keys are uint64, int64, uint32, int32, float64, float32 or datetime64; NaN and NaT are refused. Any number of
    threads may read while one or more write: writers take turns, readers wait for nobody and see each write whole.

    Args:
        keys: in any order.
        values: one per key; the keys must then be distinct.
        dtype: of the keys; that of `keys` by default, int64 for Python ints and float64 for Python floats.
        engine: "native" or "numpy"; by default the C extension if it was built.
        merging: who merges changes into the run when they have become many: the write that made them so ("inline"),
            a thread ("background"), or only `compact()` ("manual").
        memory: how many past workloads to remember models for.

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
    ) -> None:
        chosen = choose(engine)
        key_type, run = run_of(keys, values, dtype, chosen)
        self._restore(State.of(key_type, chosen, run), Models(memory), merging)

    # ---- copies and files

    def snapshot(self) -> Snapshot:
        """A frozen view of the index as it is now. O(1).

        >>> index = Index([1])
        >>> frozen = index.snapshot()
        >>> index.insert(2)
        >>> len(frozen), len(index)
        (1, 2)
        """
        return Snapshot(self._state, self._memory.copy())

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
    ) -> Self:
        """An index that `save` wrote; of a subclass, made without its `__init__`.

        `CorruptFileError` says what is wrong with the file. Its header, all sizes and all numbers of the model are
        checked always, so that no file makes a search leave its arrays.

        O(n); with `mmap` and without `verify` O(leaves + d), as keys are then read from the disk when they are
        searched.

        Args:
            mmap: map keys and values into memory instead of copying them. Changes stay in memory until `save`.
            verify: compare the checksums as well, and check that the keys are in order and that what the model and
                the changes say of them is true. This reads all of the file.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     Index([1, 2]).save(f"{directory}/two.dora")
        ...     Index.open(f"{directory}/two.dora", mmap=True).bisect_right(1)
        1
        """
        chosen = choose(engine)
        try:
            state, memory = unpack(*storage.read(path, mmap, verify), chosen, verify)
        except CorruptFileError as error:
            raise CorruptFileError(f"{os.fspath(path)} {error}") from None
        index = cls.__new__(cls)
        index._restore(state, memory, merging)
        return index
