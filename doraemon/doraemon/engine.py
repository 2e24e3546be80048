"""Which engine searches and fits: the C extension, or NumPy where it was not built or is not wanted."""

from __future__ import annotations

import os
from typing import Literal

from .arrays import LAYOUT
from .sources import fingerprint

try:
    from . import _native as native
except ImportError:
    native = None  # type: ignore[assignment]

__all__ = ["VARIABLE", "Engine", "choose", "native"]
Engine = Literal["native", "numpy"]

#: set to "numpy" to do without the C extension, to "native" to refuse to
VARIABLE = "DORAEMON_ENGINE"

if native is not None and (native.LAYOUT != LAYOUT or fingerprint() not in (None, native.SOURCES)):
    raise ImportError(
        "the C extension was built from other sources than these: reinstall doraemon-index,"
        " or run `python setup.py build_ext --inplace --force` beside its setup.py"
    )


def choose(engine: str | None = None) -> Engine:
    """The engine that the argument names, else the environment, else the fastest there is.

    Raises:
        ValueError: there is no engine of that name.
        ImportError: the C extension is asked for and was not built.
    """
    wanted = engine or os.environ.get(VARIABLE) or ("numpy" if native is None else "native")
    if wanted == "numpy":
        return "numpy"
    if wanted != "native":
        raise ValueError(f"engine {wanted!r}: choose 'native' or 'numpy'")
    if native is None:
        raise ImportError("the C extension was not built: reinstall doraemon-index with a C compiler, or use 'numpy'")
    return "native"
