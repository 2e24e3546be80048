from typing import Any

from numpy.typing import NDArray

class View:
    def __new__(
        cls,
        kind: int,
        keys: NDArray[Any],
        bounds: NDArray[Any],
        buckets: NDArray[Any],
        leaves: NDArray[Any],
        hits: NDArray[Any],
        changed: NDArray[Any],
        moved: NDArray[Any],
        alive: NDArray[Any],
        /,
    ) -> View: ...
    def left(self, key: object, /) -> int: ...
    def right(self, key: object, /) -> int: ...
    def find(self, key: object, /) -> int: ...
    def search(self, asked: int, right: int, codes: NDArray[Any], out: NDArray[Any], /) -> None: ...

def fit(
    keys: NDArray[Any], ends: NDArray[Any], scales: NDArray[Any], bits: NDArray[Any], out: NDArray[Any], /
) -> None: ...
def splice(old: NDArray[Any], at: NDArray[Any], more: NDArray[Any], out: NDArray[Any], /) -> None: ...
def ranks(codes: NDArray[Any], queries: NDArray[Any], right: int, out: NDArray[Any], /) -> None: ...
