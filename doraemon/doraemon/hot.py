"""The hot table: the codes asked for most and where they are in the run, small enough to stay in the second cache.

Both batches and single look-ups of the C engine ask it before the model. Whatever equals a code in it is answered by
what the table says of that code, and everything else goes on to the model: which codes are in it decides how long an
answer takes and never what it is. `_hot.h` has the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import LINE, RANK_BITS, Codes, Ints, Mask
from .engine import native

FILLED = 0.6  #: of the slots; of a fuller table more codes would find their line full
MOST_COPIES = (1 << (64 - RANK_BITS)) - 1  #: of a code in the table
NO_LINES = np.zeros(0, dtype=LINE)


@dataclass(frozen=True)
class Choice:
    """What a table was chosen by.

    Attributes:
        began: how many samples had been taken before those of its workload.
        samples: how many of these there were.
        answered: which share of the newest ones it answered.
        saved: measured share of the time of a look-up.
    """

    began: int
    samples: int
    answered: float
    saved: float


@dataclass(frozen=True, eq=False)
class Hot:
    """A table of codes and their places in one run. Immutable.

    Attributes:
        codes: the hottest first; those without room in the table included.
        lines: LINE [lines], what C reads.
        held: how many codes found room.
        choice: what it was chosen by; None for a table of other making.
    """

    codes: Codes
    lines: NDArray[Any]
    held: int
    choice: Choice | None = None

    @classmethod
    def of(cls, codes: Codes, ranks: Ints, copies: Ints) -> Hot | None:
        """The table of codes, the hottest first; None without any.

        Args:
            codes: distinct; in the run or not.
            ranks: how many keys of the run are below each.
            copies: how many keys of the run equal each.
        """
        few = copies <= MOST_COPIES
        if not few.all():
            codes, ranks, copies = codes[few], ranks[few], copies[few]
        if len(codes) == 0:
            return None
        slots = LINE["codes"].shape[0]
        lines = _aligned_lines(int(len(codes) / (FILLED * slots)) + 1)
        return cls(codes, lines, native.fill_hot(np.ascontiguousarray(codes), ranks, copies, lines))

    @cached_property
    def highest(self) -> int:
        """The largest code in the table."""
        return int(self.codes.max())

    def holds(self, codes: Codes) -> Mask:
        """Whether each code is in the table."""
        held = np.empty(len(codes), dtype=np.bool_)
        native.held_hot(self.lines, codes, held)
        return held

    @property
    def nbytes(self) -> int:
        """The bytes of the table, and of the codes of which a merge makes it anew."""
        return self.lines.nbytes + self.codes.nbytes


def _aligned_lines(count: int) -> NDArray[Any]:
    """Lines that are lines of the processor's cache, lest each be in two."""
    raw = np.empty((count + 1) * LINE.itemsize, dtype=np.uint8)
    first = -raw.ctypes.data % LINE.itemsize
    return raw[first : first + count * LINE.itemsize].view(LINE)
