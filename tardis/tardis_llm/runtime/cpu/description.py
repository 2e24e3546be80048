"""What the kernels' library says of its interface, compared with what Python says of it.

`tardis_description` of description.cpp gives lines `name=value`: the constants and enumerators of interface.h, the
layout of its structures, the types of its functions, and a digest of the sources. A library that says anything else
than Python is refused; functions get their types from it.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import KernelsError

_TYPES: dict[str, type | None] = {
    "void": None,
    "pointer": ctypes.c_void_p,
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "uint64": ctypes.c_uint64,
    "float32": ctypes.c_float,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}
_FUNCTION = "tardis_"  # how their names begin
_SHOWN = 3  # differences, in an error

Structures = Sequence[type[ctypes.Structure]]


def described(library: ctypes.CDLL) -> dict[str, str]:
    """What a library says of itself: values by name; empty if it is of a version that said nothing."""
    describe = getattr(library, "tardis_description", None)
    if describe is None:
        return {}
    describe.restype, describe.argtypes = ctypes.c_char_p, ()
    return dict(line.split("=", 1) for line in describe().decode().splitlines())


def sources_of(folder: Path) -> dict[str, str]:
    """The digest of the C++ sources in a folder, as CMakeLists.txt computes it; nothing where there are none."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h", ".inc"))
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    return {"sources": hashlib.sha256(digests.encode()).hexdigest()} if files else {}


def layout_of(structures: Structures) -> dict[str, str]:
    """Sizes of structures, and types and places of their fields."""
    lines = {}
    for structure in structures:
        name = _name(structure)
        lines[name] = str(ctypes.sizeof(structure))
        for field, kind, *_ in structure._fields_:
            lines[f"{name}.{field}"] = f"{_name(kind)}@{getattr(structure, field).offset}"
    return lines


def check(path: Path, found: Mapping[str, str], stated: Mapping[str, str]) -> None:
    """Compare what a library says of itself with what Python states.

    Args:
        path: of the library.
        found: its description.
        stated: the same names, but for functions, and for `sources` where there are none to compare with.

    Raises:
        KernelsError: they differ; the message says in what.
    """
    names = {name for name in found if not name.startswith(_FUNCTION) and name != "sources"} | stated.keys()
    wrong = [
        f"{name} is {stated.get(name, 'unknown')} here and {found.get(name, 'unknown')} there"
        for name in sorted(names)
        if found.get(name) != stated.get(name)
    ]
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise KernelsError(
            f"{path} was built for another version of TARDIS: {'; '.join(wrong[:_SHOWN])}{more}. "
            "Reinstall tardis-llm, in a checkout by `pip install -e tardis`."
        )


def declare(library: ctypes.CDLL, found: Mapping[str, str], structures: Structures) -> None:
    """Give the functions of a library the types that its description says they have."""
    types = _TYPES | {_name(structure) + "*": ctypes.POINTER(structure) for structure in structures}
    for name, kinds in found.items():
        if name.startswith(_FUNCTION):
            function, (result, *arguments) = getattr(library, name), [types[kind] for kind in kinds.split()]
            function.restype, function.argtypes = result, arguments


def _name(kind: type) -> str:
    """A type's name in descriptions."""
    return _NAMES.get(kind) or f"Tardis{kind.__name__}"
