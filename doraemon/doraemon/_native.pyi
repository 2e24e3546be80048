from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

BUCKET: Any
LEAF: Any
PLACE_SHIFT: int

class View:
    def __new__(
        cls,
        dtype: str,
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
    ) -> View: ...
    def left(self, key: object, /) -> int: ...
    def right(self, key: object, /) -> int: ...
    def contains(self, key: object, /) -> bool: ...
    def get(self, key: object, default: Any, /) -> Any: ...
    def run_ranks(self, codes: NDArray[Any], right: bool, ranks: NDArray[Any], /) -> None: ...
    def ranks(self, codes: NDArray[Any], right: bool, ranks: NDArray[Any], /) -> None: ...
    def contains_many(self, codes: NDArray[Any], present: NDArray[Any], /) -> None: ...
    def find_many(
        self, codes: NDArray[Any], present: NDArray[Any], in_delta: NDArray[Any], positions: NDArray[Any], /
    ) -> None: ...
    def within_error_bounds(self) -> bool: ...

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
