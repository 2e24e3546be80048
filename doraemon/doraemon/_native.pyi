from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from . import search

Array = NDArray[Any]
Cut = Callable[[Any], tuple[int | None, bool]]
LAYOUT: tuple[tuple[int, ...], tuple[int, ...], int]

# The arrays are those of the enum KEYS, BOUNDS, ... in _native.c, and the values of the run and of the delta.
def View(kind: str, itemsize: int, cut: Cut, sampling: int, /, *arrays: Array | None) -> search.View: ...  # noqa: N802
def fit(keys: Array, ends: Array, scales: Array, bits: Array, steepest: float, out: Array, /) -> None: ...
def splice(old: Array, at: Array, more: Array, out: Array, /) -> None: ...
def ranks(codes: Array, queries: Array, right: bool, out: Array, /) -> None: ...
