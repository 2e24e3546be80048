"""Statistics that are sums over tokens, which is what makes those of different texts add up."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import InvalidInputError


@dataclass
class Sums:
    """Statistics that are sums over tokens: those of disjoint tokens add up, and old tokens can come to count less.

    A dataclass of tensors, numbers and other sums. Whatever `_GIVEN` names says what is summed, and must agree.
    """

    _GIVEN: ClassVar[frozenset[str]] = frozenset()

    def merge(self, other: Self) -> Self:
        """The statistics of both texts, as if they had been one.

        Raises:
            InvalidInputError: they are of other FFNs, or of other bins.

        Example:
            >>> one, two = SecondMoments.zeros(2, 2), SecondMoments.zeros(2, 2)
            >>> one.add(torch.ones(3, 2), torch.ones(3, 2))
            >>> two.add(torch.zeros(5, 2), torch.zeros(5, 2))
            >>> one.merge(two).count
            8
        """
        return self._plus(other, 1)

    def subtract(self, other: Self) -> Self:
        """The statistics without those of a text that is part of them: the inverse of `merge`, but for fp64 rounding.

        Raises:
            InvalidInputError: they are of other FFNs, or of other bins.
        """
        return self._plus(other, -1)

    def decay(self, share: float) -> Self:
        """The statistics in which every token so far counts `share` of what it did; counts are no whole numbers then.

        Raises:
            InvalidInputError: the share is not from 0 to 1.
        """
        if not 0 <= share <= 1:
            raise InvalidInputError(f"statistics are decayed to {share!r} of their weight; give a share from 0 to 1.")
        return replace(self, **{name: _scaled(value, share) for name, value in self._sums()})

    def _sums(self) -> list[tuple[str, Any]]:
        names = [field.name for field in fields(self) if field.name not in self._GIVEN]
        return [(name, getattr(self, name)) for name in names]

    def _plus(self, other: Self, sign: int) -> Self:
        for name in self._GIVEN:
            if not _equal(getattr(self, name), getattr(other, name)):
                raise InvalidInputError(f"statistics of another {name} do not add up; gather both for the same fold.")
        summed = {name: _summed(value, getattr(other, name), sign) for name, value in self._sums()}
        return replace(self, **summed)


def _scaled(value: Any, share: float) -> Any:
    return value.decay(share) if isinstance(value, Sums) else value * share


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def _summed(one: Any, other: Any, sign: int) -> Any:
    if isinstance(one, Sums):
        return one._plus(other, sign)
    if isinstance(one, Tensor) and one.shape != other.shape:
        raise InvalidInputError(
            f"statistics of shape {list(other.shape)} do not add up with those of shape {list(one.shape)}; gather both "
            "for the same fold."
        )
    return one + sign * other


def divisor(count: Tensor) -> Tensor:
    """Counts to divide sums by: 1 in place of 0, where the sums are 0, too."""
    return count.masked_fill(count <= 0, 1)
