"""What the rest of the package asks of a type of keys: everything else works on codes and knows no keys.

Codes are uint64 in the order of the keys. Those of numbers follow from the numbers. Those of texts are given to the
texts that the index has: such a type learns, and a code once given stays the same, so that all states of an index share
it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arrays import Arrays, Codes, Ints, Mask
from .dtypes import Described
from .inputs import is_batch

CODES = np.dtype(np.uint64)  #: of codes
Ranking = Callable[[ArrayLike, bool], Ints]  #: how many keys are below each query, or (True) not above it


class Cut(NamedTuple):
    """Where one query cuts the codes: `code` is the least that is not below it, None if there is none."""

    code: int | None
    exact: bool


class Cuts(NamedTuple):
    """Where many queries cut the codes; `exact` and `above` are None where all are exact and none is above."""

    codes: Codes
    exact: Mask | None
    above: Mask | None


class KeyType(ABC):
    """The type of an index's keys.

    Attributes:
        dtype: of the keys, in native byte order.
        lexicon: what gives texts their codes; None for other keys.
        nbytes: that are taken by what it learned of the keys.
    """

    dtype: np.dtype[Any]
    lexicon: object = None
    nbytes: int = 0

    # ---- keys and queries

    @abstractmethod
    def cut_one(self, query: Any) -> Cut:
        """Where one query cuts the codes. Raises TypeError if it cannot be compared with the keys."""

    @abstractmethod
    def cuts(self, queries: ArrayLike) -> Cuts:
        """Where many queries cut the codes."""

    @abstractmethod
    def decode(self, codes: Codes) -> NDArray[Any]:
        """The keys of codes."""

    @property
    def scanned(self) -> np.dtype[Any]:
        """The dtype of what a scan in C fills: that of the keys where they are uint64 or int64, else that of codes."""
        return CODES

    def decode_one(self, code: int) -> Any:
        """One key as users see it."""
        return self.items(self.decode(np.array([code], dtype=np.uint64)))[0]

    def items(self, keys: NDArray[Any]) -> list[Any]:
        """Keys that `decode` made, one by one as users see them."""
        items: list[Any] = keys.tolist()
        return items

    def encode_one(self, key: Any) -> int:
        """The code of one key. Raises ValueError if it has none."""
        cut = self.cut_one(key)
        if cut.code is None or not cut.exact:
            raise self._not_a_key(f"{key!r}")
        return cut.code

    def encode_any(self, keys: ArrayLike) -> Codes:
        """The codes of any sequence of keys. Raises ValueError if one has none."""
        cuts = self.cuts(keys)
        bad = _union(None if cuts.exact is None else ~cuts.exact, cuts.above)
        if bad is not None and bad.any():
            raise self._not_a_key(f"key {int(np.argmax(bad))} of {bad.size}")
        return cuts.codes

    def _not_a_key(self, which: str) -> ValueError:
        return ValueError(f"{which} is not a value of {self.dtype}: round it, or make the index of a wider dtype")

    def is_batch(self, given: Any) -> bool:
        """Whether something holds queries, however many, and is not one itself."""
        return is_batch(given)

    def ranking(self, codes: Codes) -> Ranking | None:
        """What ranks queries among the keys with these codes, in order, if there is something faster than a search."""
        return None

    # ---- learning, which numbers have no need of

    def admit(self, keys: ArrayLike) -> Codes | None:
        """The codes of keys, given to those that had none; None if no room is left between two codes."""
        return self.encode_any(keys)

    def admit_one(self, key: Any) -> int | None:
        """The code of a key, given to it if it had none; None if no room is left between two codes."""
        return self.encode_one(key)

    def learn(self, key: Any) -> None:
        """Give the key a code if it needs one and there is room."""
        return  # it has one already

    def respaced(self, codes: Codes) -> tuple[KeyType, Codes]:
        """A type with room between all codes, and the new codes of ascending ones."""
        return self, codes

    def compacted(self, codes: Codes) -> Self:
        """The type that has only these codes; others may be given again."""
        return self

    def with_codes_of(self, other: KeyType, *codes: Codes) -> Self:
        """The type that has some codes of another type as well, which it was made of; each part of them ascending."""
        return self

    # ---- files

    @property
    @abstractmethod
    def description(self) -> Described:
        """What `choosing.described_type` makes the type of."""

    def arrays(self, run: Codes, delta: Codes) -> Arrays:
        """What a file has to hold of keys with the codes of a run and of a delta, beside these."""
        return {}

    def opened(self, arrays: Arrays, verify: bool) -> Self:
        """The type with what a file holds of its keys.

        Raises CorruptFileError if that cannot be; if it is only wrong, then only to `verify`.
        """
        return self

    @abstractmethod
    def has_codes(self, codes: Codes) -> bool:
        """Whether these are all codes of keys."""


def _union(a: Mask | None, b: Mask | None) -> Mask | None:
    return a if b is None else b if a is None else a | b
