from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from . import search

LAYOUT: tuple[tuple[int, ...], tuple[int, ...], int]

def View(  # noqa: N802 - a class, of which only this is used
    kind: str,
    itemsize: int,
    cut: Callable[[Any], tuple[int | None, bool]],
    sampling: int,
    keys: NDArray[Any],
    bounds: NDArray[Any],
    buckets: NDArray[Any],
    leaves: NDArray[Any],
    delta_codes: NDArray[Any],
    shifts: NDArray[Any],
    alive: NDArray[Any],
    hits: NDArray[Any],
    run_values: NDArray[Any] | None,
    delta_values: NDArray[Any] | None,
    /,
) -> search.View: ...
def fit(
    keys: NDArray[Any],
    ends: NDArray[Any],
    scales: NDArray[Any],
    bits: NDArray[Any],
    steepest: float,
    out: NDArray[Any],
    /,
) -> None: ...
def splice(old: NDArray[Any], at: NDArray[Any], more: NDArray[Any], out: NDArray[Any], /) -> None: ...
def ranks(codes: NDArray[Any], queries: NDArray[Any], right: bool, out: NDArray[Any], /) -> None: ...
