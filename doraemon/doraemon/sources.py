"""Which C sources lie beside this file: the extension states those that it was built from, and `engine` compares them.

It imports nothing of the package, as `setup.py` runs it before there is an extension.
"""

from __future__ import annotations

import zlib
from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The C files, in order. An installed package has none, only what was built from them."""
    return sorted(path.name for path in FOLDER.glob("*.[ch]"))


def fingerprint() -> int | None:
    """A number that changes with the C files; None where there are none."""
    found = names()
    return zlib.crc32(b"".join((FOLDER / name).read_bytes() for name in found)) if found else None
