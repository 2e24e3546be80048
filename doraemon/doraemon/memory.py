"""Memory of large arrays that come and go: the system clears what it gives out, which takes longer than filling it.

What merges and writes let go of is kept for the next ones, up to a share of the machine's memory. The system is told
that it may take it back whenever it is short.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST = 1 << 22  #: bytes of an array that is worth it; smaller ones the C library uses again by itself
SHARE = 16  #: of the machine's memory, how many times less is kept


@dataclass(eq=False)
class _Piece:
    """Memory of a size that is a power of two, of which so many bytes were ever used: the others were never taken."""

    memory: mmap.mmap
    used: int


class Pool:
    """Pieces of memory that no array uses, those let go of last at the end.

    Arrays may be let go of by any thread and in the midst of any method, so there is no lock: each step is one
    operation of a list, or does without what another thread took.
    """

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most
        self._free: list[_Piece] = []

    @property
    def nbytes(self) -> int:
        """How many bytes are kept."""
        return sum(piece.used for piece in self._free.copy())

    def empty(self, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array as of `np.empty`, whose memory is kept when it and all views of it are gone. O(pieces)."""
        nbytes = count * dtype.itemsize
        if nbytes < self.least or dtype.hasobject or sys.platform == "win32":
            return np.empty(count, dtype)
        piece = self._taken(1 << (nbytes - 1).bit_length())
        piece.used = max(piece.used, nbytes)
        array = np.frombuffer(piece.memory, dtype, count)
        weakref.finalize(array, self._keep, piece).atexit = False
        return array

    def _taken(self, size: int) -> _Piece:
        for piece in reversed(self._free.copy()):
            if len(piece.memory) == size:
                try:
                    self._free.remove(piece)
                except ValueError:  # another thread took it
                    continue
                return piece
        return _Piece(_fresh(size), 0)

    def _keep(self, piece: _Piece) -> None:
        if hasattr(mmap, "MADV_FREE"):
            piece.memory.madvise(mmap.MADV_FREE)
        self._free.append(piece)
        while self.nbytes > self.most:
            del self._free[:1]


def _fresh(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a shared one would outlive a fork
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _bytes_of_machine() -> int:
    return 0 if sys.platform == "win32" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


pool = Pool(LEAST, _bytes_of_machine() // SHARE)  #: of the runs and deltas of all indexes
