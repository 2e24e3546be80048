"""Which cases `make test` leaves out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

#: takes long and seldom fails; `make test-long` runs it
long = pytest.mark.long


def mostly_long(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """`values` for `parametrize`; those that are not among `quick` are long. Tuples are values of several arguments."""
    return [value if value in quick else _marked(value) for value in values]


def in_turns(rows: Iterable[Any], columns: Collection[Any], every: int = 4) -> list[Any]:
    """All pairs, for `parametrize`; of those of a row, and of a column, one out of `every` is not long."""
    return [
        (row, column) if (i + j) % every == 0 else _marked((row, column))
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def _marked(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=long)
