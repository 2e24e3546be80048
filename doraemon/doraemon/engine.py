"""Which engine searches and fits: the C extension, or NumPy where it was not built or is not wanted."""

from __future__ import annotations

import os
from typing import Literal

try:
    from . import _native
except ImportError:
    _native = None  # type: ignore[assignment]

native = _native

Engine = Literal["native", "numpy"]

#: set to "numpy" to do without the C extension, to "native" to refuse to
VARIABLE = "DORAEMON_ENGINE"


def choose(engine: str | None = None) -> Engine:
    """The engine asked for by the argument, else by the environment, else the best there is."""
    wanted = engine or os.environ.get(VARIABLE) or ("numpy" if native is None else "native")
    if wanted == "numpy":
        return "numpy"
    if wanted != "native":
        raise ValueError(f"engine {wanted!r}: choose 'native' or 'numpy'")
    if native is None:
        raise ImportError("the C extension was not built: reinstall doraemon-index with a C compiler, or use 'numpy'")
    return "native"
