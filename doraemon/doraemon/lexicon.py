"""Lexica: which code each text of an index has, in the order of the texts. They only grow.

Codes of texts are even. A query that is no text of the lexicon gets an odd code, 1 less than that of the next text, so
that it lies between its neighbours and equals none. New texts get codes between those of their neighbours: evenly
spread, but where a gap was last filled from one side, near that side, as keys that come in order would else halve it
each time.

Texts lie in tiers, each sorted, of which the first is most of them; a new tier is merged into the one before if it is
not much smaller. Tiers never change, and a reader takes them once: so it may read while another thread adds.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np

from .arrays import Codes, Ints
from .engine import Engine, native
from .errors import CorruptFileError, damaged
from .splicing import ranks_in as code_ranks
from .strings import Listed, Packed, concatenated, gathered, ordered, slices, unpacked

RATIO = 8  #: times as many texts as in the next tier a tier has at least
ONE_SIDED = 64  #: share of a gap that is filled at once from one side
END_STEP = 1 << 32  #: between halves of codes before the first text and after the last
HALVES = (1 << 63) - 1  #: halves of codes are above 0 and below this
ABOVE = (1 << 64) - 1  #: the code of queries above all texts


Out = TypeVar("Out", Codes, Ints)


class Finder(Protocol):
    """What finds the codes of queries in one tier."""

    def find_one(self, query: bytes, /) -> int:
        """The code of a query."""

    def find_many(self, data: Any, offsets: Ints, right: bool | None, out: Codes | Ints, /) -> None:
        """The codes of packed queries; or how many texts are below each, or (`right`) not above it."""

    def find_items(self, items: list[Any], is_text: bool, right: bool | None, out: Codes | Ints, /) -> int | None:
        """The same of a list of str or bytes; the place of the first item that is none, if one is."""


@dataclass(frozen=True, eq=False)
class Tier:
    """Sorted, distinct texts and their codes, ascending and even."""

    texts: Packed
    codes: Codes
    engine: Engine

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def finder(self) -> Finder:
        """What finds texts. Made on first use in O(n) with C.

        Raises CorruptFileError if the texts, of a file that was not verified, are not in order.
        """
        if self.engine == "numpy":
            return _Bisection(self.texts, self.codes)
        try:
            return native.Tree(self.texts.data, self.texts.offsets, self.codes)
        except ValueError as error:
            raise not_in_order(error) from None

    def chosen(self, numbers: Ints) -> Tier:
        """The tier of some of the texts, given by ascending numbers."""
        return Tier(gathered(self.texts, numbers, self.engine), self.codes[numbers], self.engine)

    def merged(self, other: Tier) -> Tier:
        """The tier of the texts of both, which have none in common."""
        codes = np.concatenate([self.codes, other.codes])
        order = np.argsort(codes, kind="stable")
        return Tier(concatenated([self.texts, other.texts]), codes, self.engine).chosen(order)


class Tiers(tuple[Tier, ...]):
    """The tiers of a lexicon at one moment, the largest first, at least one."""

    @cached_property
    def finders(self) -> tuple[Finder, ...]:
        """Those of all tiers. C asks for them by this name."""
        return tuple(tier.finder for tier in self)


class Lexicon:
    """The texts that have codes. Any number of threads may ask while one or more add.

    Attributes:
        tiers: as of now. C asks for them by this name.
    """

    def __init__(self, engine: Engine, *tiers: Tier) -> None:
        self.engine = engine
        empty = Packed(np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64))
        self.tiers = Tiers(tiers or (Tier(empty, np.zeros(0, dtype=np.uint64), engine),))
        self._lock = threading.Lock()  # indexes that share it take turns to add

    def code_of(self, text: bytes) -> int:
        """The code of a text, odd if it is not in the lexicon. O(log n) per tier."""
        return min([finder.find_one(text) for finder in self.tiers.finders])

    def codes_of(self, texts: Packed | Listed) -> Codes:
        """The code of each text, odd for those that are not in the lexicon."""
        found = [_found(finder, texts, None, np.empty(texts.count, dtype=np.uint64)) for finder in self.tiers.finders]
        return found[0] if len(found) == 1 else np.minimum.reduce(found)

    def add(self, texts: Packed) -> Codes | None:
        """The code of each text, given to those that had none; None, and nothing is added, if there is no room.

        O(k log k) for k texts and O(log n) merges, most of them of small tiers.
        """
        with self._lock:
            codes = self.codes_of(texts)
            new = np.flatnonzero(codes & np.uint64(1))
            if len(new) == 0:
                return codes
            fresh = texts if len(new) == texts.count else gathered(texts, new, self.engine)
            order, again = ordered(fresh, self.engine)
            first = order[~again]
            given = self._codes_between(codes[new[first]])
            if given is None:
                return None
            codes[new[order]] = given[np.cumsum(~again) - 1]
            self.tiers = Tiers(_settled((*self.tiers, Tier(gathered(fresh, first, self.engine), given, self.engine))))
            return codes

    def _codes_between(self, gaps: Codes) -> Codes | None:
        """Codes for new texts, ascending, whose odd codes name the gaps that they are in."""
        starts = np.flatnonzero(np.append(True, gaps[1:] != gaps[:-1]))
        counts = np.diff(np.append(starts, len(gaps)))
        low, high, lean = self._neighbours(gaps[starts])
        step = _steps_in(low, high, counts, lean)
        if (high - low <= counts).any():
            return None
        number = np.arange(len(gaps)) - np.repeat(starts, counts)
        low, high, step, lean, counts = (np.repeat(each, counts) for each in (low, high, step, lean, counts))
        halves = np.where(lean >= 0, low + step * (number + 1), high - step * (counts - number))
        codes: Codes = halves.astype(np.uint64) << np.uint64(1)
        return codes

    def _neighbours(self, gaps: Codes) -> tuple[Ints, Ints, Ints]:
        """Halves of the codes on both sides of gaps; and 1 where the lower one is newer, -1 where the upper one is."""
        low, high = np.zeros(len(gaps), dtype=np.int64), np.full(len(gaps), HALVES)
        age_of_low, age_of_high = np.zeros(len(gaps), dtype=np.int64), np.zeros(len(gaps), dtype=np.int64)
        for age, tier in enumerate(self.tiers):
            halves = np.concatenate([[0], (tier.codes >> np.uint64(1)).astype(np.int64), [HALVES]])
            at = code_ranks(tier.codes, gaps, False, self.engine)
            age_of_low[halves[at] > low] = age
            age_of_high[halves[at + 1] < high] = age
            low, high = np.maximum(low, halves[at]), np.minimum(high, halves[at + 1])
        return low, high, np.sign(age_of_low - age_of_high)

    # ---- back to texts

    def texts_of(self, codes: Codes, is_text: bool) -> list[Any]:
        """The str or bytes of codes in the lexicon."""
        tiers = self.tiers
        if len(tiers) == 1:
            return unpacked(tiers[0].texts, self._places(tiers[0], codes), is_text, self.engine)
        items = np.empty(len(codes), dtype=object)
        for tier in tiers:
            there = np.isin(codes, tier.codes)
            items[there] = unpacked(tier.texts, self._places(tier, codes[there]), is_text, self.engine)
        found: list[Any] = items.tolist()
        return found

    def _places(self, tier: Tier, codes: Codes) -> Ints:
        return code_ranks(tier.codes, codes, False, self.engine)

    def tier_of(self, codes: Codes) -> Tier:
        """One tier of the texts with these codes, distinct and ascending, all in the lexicon."""
        whole, *others = self.tiers
        for tier in others:
            whole = whole.merged(tier)
        return whole if np.array_equal(codes, whole.codes) else whole.chosen(self._places(whole, codes))

    def with_tier_of(self, other: Lexicon, codes: Codes) -> Lexicon:
        """The lexicon that has some texts of another one as well."""
        missing = codes[~np.isin(codes, np.concatenate([tier.codes for tier in self.tiers]))]
        if len(missing) == 0:
            return self
        return Lexicon(self.engine, *_settled((*self.tiers, other.tier_of(missing))))

    def respaced(self, codes: Codes) -> tuple[Lexicon, Codes]:
        """The lexicon of the texts of some codes under evenly spread codes, and the new ones of these."""
        tier, fresh = self.tier_of(distinct(codes)), Lexicon(self.engine)
        given = fresh._codes_between(np.full(len(tier), ABOVE, dtype=np.uint64))
        if given is None:
            raise OverflowError("there are more texts than codes")
        return Lexicon(self.engine, Tier(tier.texts, given, self.engine)), given[self._places(tier, codes)]

    @property
    def nbytes(self) -> int:
        """The bytes of texts and codes, and of trees, which take as much as the codes, and tables, a third more."""
        return sum(tier.texts.nbytes + tier.codes.nbytes * 10 // 3 for tier in self.tiers)


def not_in_order(error: ValueError) -> CorruptFileError:
    """What is wrong with a file whose texts are not in order, or no keys."""
    return damaged(f"keys.bytes are not those of keys in order, {error}")


def ranks_in(tier: Tier, texts: Packed | Listed, right: bool) -> Ints:
    """How many texts of a tier are below each of others, or (`right`) not above it."""
    return _found(tier.finder, texts, right, np.empty(texts.count, dtype=np.int64))


def _found(finder: Finder, texts: Packed | Listed, right: bool | None, out: Out) -> Out:
    if isinstance(texts, Listed):
        if finder.find_items(texts.items, texts.is_text, right, out) is None:
            return out
        texts = texts.packed()  # raises what is wrong with an item
    finder.find_many(texts.data, texts.offsets, right, out)
    return out


def distinct(codes: Codes, *others: Codes) -> Codes:
    """The distinct ones of ascending codes, in order: the very array if they are."""
    for more in others:
        codes = np.union1d(codes, more) if len(more) else codes
    new = np.append(True, codes[1:] != codes[:-1])[: len(codes)]
    return codes if new.all() else codes[new]


def _steps_in(low: Ints, high: Ints, counts: Ints, lean: Ints) -> Ints:
    """The step between halves of codes in gaps; `lean` becomes the side from which each is filled."""
    width = high - low
    step = width // (counts + 1)
    first, last = low == 0, high == HALVES
    one_sided = np.maximum(width // (ONE_SIDED * (counts + 1)), 1)
    step = np.where(lean != 0, np.minimum(one_sided, step), step)
    step = np.where(first | last, np.minimum(np.maximum(step, 1), END_STEP), step)
    lean[first & ~last], lean[last & ~first] = -1, 1
    both = first & last
    low[both] += width[both] // 4
    step[both] = (width[both] // 2) // (counts[both] + 1)
    lean[both] = 0
    return step


def _settled(tiers: tuple[Tier, ...]) -> tuple[Tier, ...]:
    """The tiers with the last ones merged until each is much larger than the next."""
    while len(tiers) > 1 and len(tiers[-1]) * RATIO >= len(tiers[-2]):
        last = tiers[-2].merged(tiers[-1]) if len(tiers[-2]) else tiers[-1]
        tiers = (*tiers[:-2], last)
    return tiers


class _Texts:
    """Packed texts as a sequence of bytes."""

    def __init__(self, texts: Packed) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return self.texts.count

    def __getitem__(self, number: int) -> bytes:
        begin, end = self.texts.offsets[number : number + 2]
        return self.texts.data[begin:end].tobytes()


class _Bisection:
    """A finder without the C extension: a binary search per query."""

    def __init__(self, texts: Packed, codes: Codes) -> None:
        self.texts, self.codes = _Texts(texts), codes

    def find_one(self, query: bytes, /) -> int:
        at = bisect_left(self.texts, query)
        return self._code(at, at < len(self.codes) and self.texts[at] == query)

    def find_many(self, data: Any, offsets: Ints, right: bool | None, out: Codes | Ints, /) -> None:
        queries = Packed(data, offsets)
        for place, query in enumerate(slices(queries, np.arange(queries.count))):
            at = bisect_left(self.texts, query)
            exact = at < len(self.codes) and self.texts[at] == query
            out[place] = self._code(at, exact) if right is None else at + (exact and right)

    def find_items(self, items: list[Any], is_text: bool, right: bool | None, out: Codes | Ints, /) -> int | None:
        texts = Listed(items, is_text, "numpy").packed()
        self.find_many(texts.data, texts.offsets, right, out)
        return None

    def _code(self, at: int, exact: bool) -> int:
        return ABOVE if at == len(self.codes) else int(self.codes[at]) - (not exact)
