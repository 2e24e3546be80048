"""The hot table: the codes asked for most and where they are in the run, small enough to stay in the second cache.

Both batches and single look-ups of the C engine ask it before the model. Whatever equals a code in it is answered by
what the table says of that code, and everything else goes on to the model: which codes are in it decides how long an
answer takes and never what it is. `_hot.h` has the layout.

A table that is small enough has a copy that learns: one reader at a time asks that one, and adds what it lacked. So it
follows accesses that move by itself, and adapting has only to see that it does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import LINE, RANK_BITS, Codes, Ints, Mask
from .engine import native

FILLED = 0.6  #: of the slots; of a fuller table more codes would find their line full
MOST_COPIES = (1 << (64 - RANK_BITS)) - 1  #: of a code in the table
NO_LINES = np.zeros(0, dtype=LINE)
LEARNED = 1 << 22  #: bytes of the largest table that learns: in a larger one a new code takes a line from afar


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


class Learner:
    """The copy of a table that learns: only C reads and writes its lines, and one reader at a time has them.

    Attributes:
        lines: LINE [lines], or none where the table is too large.
        notes: uint64, native.NOTES of them, and native.SEEN bytes for each line, see `_hot.h`.
        reach: how many keys of the run, from the first on, it may learn.
        share: of what it was asked lately, how much it answered; None before that was told.
    """

    share: float | None = None

    def __init__(self, lines: NDArray[Any], reach: int) -> None:
        small = lines.nbytes <= LEARNED and reach > 0
        self.lines = _aligned_lines(len(lines)) if small else NO_LINES
        self.lines[:] = lines[: len(self.lines)]
        self.notes = np.zeros(native.NOTES + -(-len(self.lines) * native.SEEN // 8), dtype=np.uint64)
        self.reach = reach
        self._seen = (0, 0)

    def answered(self, least: int) -> float | None:
        """The share that it answered of what it was asked since this was last told; None if that were fewer codes."""
        asked, missed = self.notes[[native.ASKED, native.MISSED]].tolist()
        if asked - self._seen[0] < least:
            return None
        self.share = 1 - (missed - self._seen[1]) / (asked - self._seen[0])
        self._seen = (asked, missed)
        return self.share


@dataclass(frozen=True, eq=False)
class Hot:
    """A table of codes and their places in one run. Immutable but for what its copy learns.

    Attributes:
        lines: LINE [lines], what C reads.
        held: how many codes found room when it was made.
        learner: the copy that learns.
        choice: what it was chosen by; None for a table of other making.
    """

    lines: NDArray[Any]
    held: int
    learner: Learner
    choice: Choice | None = None

    @classmethod
    def of(cls, codes: Codes, ranks: Ints, copies: Ints, reach: int, n_lines: int = 0) -> Hot | None:
        """The table of codes, the hottest first; None without any.

        Args:
            codes: distinct; in the run or not.
            ranks: how many keys of the run are below each.
            copies: how many keys of the run equal each.
            reach: how many keys of the run, from the first on, it may learn.
            n_lines: how many lines it has, by default as many as the codes need.
        """
        few = copies <= MOST_COPIES
        if not few.all():
            codes, ranks, copies = codes[few], ranks[few], copies[few]
        if len(codes) == 0:
            return None
        slots = LINE["codes"].shape[0]
        lines = _aligned_lines(n_lines or int(len(codes) / (FILLED * slots)) + 1)
        held = native.fill_hot(np.ascontiguousarray(codes), ranks, copies, lines)
        return cls(lines, held, Learner(lines, reach))

    @property
    def lacks(self) -> int:
        """How many parts of `native.PARTS` asked it lacked when it was chosen; 0 for a table of other making."""
        return 0 if self.choice is None else round((1 - self.choice.answered) * native.PARTS)

    @property
    def least(self) -> int:
        """How many parts of `native.PARTS` of a long batch it has to answer to pay; 0 for a table of other making.

        As a miss costs no less than without a table, that is at least what it answered less what it saved.
        """
        return 0 if self.choice is None else max(0, round((self.choice.answered - self.choice.saved) * native.PARTS))

    def followed(self) -> Hot | None:
        """The table as its copy has become by learning; None if there is none, or if a reader has it now."""
        lines = _aligned_lines(len(self.learner.lines))
        copied = len(lines) > 0 and native.copy_learned(self.learner.lines, self.learner.notes, lines)
        return replace(self, lines=lines) if copied else None

    @cached_property
    def codes(self) -> Codes:
        """The codes in the table."""
        return np.unique(self.lines["codes"])

    @cached_property
    def highest(self) -> int:
        """The largest code in the table."""
        return int(self.lines["codes"].max())

    def holds(self, codes: Codes) -> Mask:
        """Whether each code is in the table."""
        held = np.empty(len(codes), dtype=np.bool_)
        native.held_hot(self.lines, codes, held)
        return held

    @property
    def nbytes(self) -> int:
        """The bytes of the table and of its copy."""
        return self.lines.nbytes + self.learner.lines.nbytes + self.learner.notes.nbytes


@dataclass(frozen=True, eq=False)
class Decision:
    """What was found best for a workload.

    Attributes:
        table: without what its copy learned; None where no table paid.
        choice: what was chosen by; of no table it tells of how many samples.
        known: which share of its accesses a few samples had in them.
        keys: how many the run had.
    """

    table: Hot | None
    choice: Choice
    known: float
    keys: int

    @property
    def nbytes(self) -> int:
        """The bytes of the table."""
        return 0 if self.table is None else self.table.nbytes


def _aligned_lines(count: int) -> NDArray[Any]:
    """Lines that are lines of the processor's cache, lest each be in two."""
    raw = np.empty((count + 1) * LINE.itemsize, dtype=np.uint8)
    first = -raw.ctypes.data % LINE.itemsize
    return raw[first : first + count * LINE.itemsize].view(LINE)


@cache
def no_learner() -> Learner:
    """What learns nothing."""
    return Learner(NO_LINES, 0)
