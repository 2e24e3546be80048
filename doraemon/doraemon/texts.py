"""Keys that are str or bytes, and whatever else becomes bytes of the same order: their codes are those of a lexicon."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arrays import Arrays, Codes
from .dtypes import Described
from .engine import Engine
from .errors import damaged
from .inputs import as_scalar
from .keytype import Cut, Cuts, KeyType, Ranking
from .lexicon import Lexicon, Tier, distinct, not_in_order, ranks_in
from .strings import Packed, column_is_text, encoded, pack, queried, unpacked

STR, BYTES = np.dtypes.StringDType(), np.dtype("S")
CHECKED = 1 << 16  #: texts that are checked at once to be UTF-8


class LexiconType(KeyType):
    """Keys that become bytes, whose codes a lexicon gives. A subclass says how, and makes keys of bytes again."""

    lexicon: Lexicon

    def __init__(self, dtype: np.dtype[Any], engine: Engine, lexicon: Lexicon | None = None) -> None:
        self.dtype, self.engine = dtype, engine
        self.lexicon = lexicon or Lexicon(engine)

    @abstractmethod
    def _with(self, lexicon: Lexicon) -> Self:
        """The same type with another lexicon."""

    @abstractmethod
    def _packed(self, keys: Any) -> Packed:
        """The bytes of keys. Raises ValueError if one can be none."""

    # ---- learning

    def admit(self, keys: ArrayLike) -> Codes | None:
        return self.lexicon.add(self._packed(keys))

    def admit_one(self, key: Any) -> int | None:
        codes = self.admit([key])
        return None if codes is None else int(codes[0])

    def learn(self, key: Any) -> None:
        self.admit_one(key)

    def respaced(self, codes: Codes) -> tuple[Self, Codes]:
        lexicon, given = self.lexicon.respaced(codes)
        return self._with(lexicon), given

    def compacted(self, codes: Codes) -> Self:
        tier = self.lexicon.tier_of(distinct(codes))
        return self if self.lexicon.tiers == (tier,) else self._with(Lexicon(self.engine, tier))

    def with_codes_of(self, other: KeyType, *codes: Codes) -> Self:
        if not isinstance(other, LexiconType):
            raise TypeError(f"{other.dtype} has no texts to take over")
        return self._with(self.lexicon.with_tier_of(other.lexicon, distinct(*codes)))

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.lexicon.nbytes

    # ---- files

    def arrays(self, run: Codes, delta: Codes) -> Arrays:
        texts = self.lexicon.tier_of(distinct(run, delta)).texts
        return {"keys.bytes": texts.data, "keys.offsets": texts.offsets}

    def opened(self, arrays: Arrays, verify: bool) -> Self:
        data, offsets = arrays["keys.bytes"], arrays["keys.offsets"]
        codes = distinct(arrays["run.codes"], arrays["delta.codes"])
        fit = len(offsets) == len(codes) + 1 and offsets[0] == 0 and offsets[-1] == len(data)
        if not fit or (offsets[1:] < offsets[:-1]).any():
            raise damaged("keys.offsets do not divide keys.bytes")
        tier = Tier(Packed(data, offsets), codes, self.engine)  # which reads the texts when the first is asked for
        opened = self._with(Lexicon(self.engine, tier))
        if verify:
            try:
                opened.check(tier)
            except ValueError as error:
                raise not_in_order(error) from None
        return opened

    def check(self, tier: Tier) -> None:
        """Raise ValueError unless all texts are in order and those of keys. O(n)."""
        for first in range(0, len(tier), CHECKED):
            number = np.arange(max(first - 1, 0), min(first + CHECKED, len(tier)))
            part = unpacked(tier.texts, number, False, self.engine)
            if any(a >= b for a, b in itertools.pairwise(part)):
                raise ValueError("the texts are not in order")
            self._check_texts(part)

    def _check_texts(self, texts: list[bytes]) -> None:
        """Raise ValueError if one is not that of a key."""

    def has_codes(self, codes: Codes) -> bool:
        return not bool((codes & np.uint64(1)).any())


class TextType(LexiconType):
    """Keys that are str, in the order of their code points, or bytes."""

    @property
    def is_text(self) -> bool:
        """Whether keys are str."""
        return self.dtype.kind == "T"

    def _with(self, lexicon: Lexicon) -> Self:
        return type(self)(self.dtype, self.engine, lexicon)

    def _packed(self, keys: Any) -> Packed:
        return pack(keys, self.is_text, self.engine)

    def cut_one(self, query: Any) -> Cut:
        code = self.lexicon.code_of(encoded(as_scalar(query), self.is_text))
        return Cut(code, code & 1 == 0)

    def cuts(self, queries: ArrayLike) -> Cuts:
        """All exact, as an odd code is no key's."""
        return Cuts(self.lexicon.codes_of(queried(queries, self.is_text, self.engine)), None, None)

    def ranking(self, codes: Codes) -> Ranking | None:
        """What finds the texts, if no others have codes: the number of one is its rank."""
        tier, *others = self.lexicon.tiers
        if others or not np.array_equal(tier.codes, codes):
            return None
        return lambda queries, right: ranks_in(tier, queried(queries, self.is_text, self.engine), right)

    def decode(self, codes: Codes) -> NDArray[Any]:
        """An array of NumPy's StringDType, or of bytes objects, as NumPy's own bytes lose zeros at their end."""
        texts = self.lexicon.texts_of(codes, self.is_text)
        return np.array(texts, dtype=self.dtype if self.is_text else object)

    @property
    def description(self) -> Described:
        return "str" if self.is_text else "bytes"

    def _check_texts(self, texts: list[bytes]) -> None:
        for text in texts if self.is_text else ():
            text.decode()


def is_text_dtype(dtype: Any) -> bool:
    """Whether a NumPy dtype is one of str or bytes."""
    return isinstance(dtype, np.dtype) and dtype.kind in "SUT"


def text_type(dtype: np.dtype[Any], engine: Engine) -> TextType:
    """The key type of NumPy's dtype of str or of bytes, of any length."""
    return TextType(BYTES if dtype.kind == "S" else STR, engine)


def column_dtype(given: Any) -> np.dtype[Any] | None:
    """The dtype of str or bytes if `given` is an Arrow column of them, else None."""
    is_text = column_is_text(given)
    return None if is_text is None else STR if is_text else BYTES


def text_dtype_of(items: NDArray[Any] | list[Any]) -> np.dtype[Any] | None:
    """The dtype of str or bytes if the first item is one, else None."""
    first = items[0] if len(items) else None
    return STR if isinstance(first, str) else BYTES if isinstance(first, bytes) else None
