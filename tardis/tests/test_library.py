"""Python and the kernels' library agree on constants, structures and functions, or the library is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from synthetic import correlated, stored_fold

from tardis_llm.config import Storage
from tardis_llm.errors import KernelsError
from tardis_llm.runtime.cpu import library
from tardis_llm.runtime.cpu.description import check, described, sources_of
from tardis_llm.runtime.cpu.library import Kernels, open_library
from tardis_llm.runtime.modules import FoldedFFN

BUILT = open_library()
SOURCES = Path(library.__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_library = pytest.mark.skipif(BUILT is None, reason="the CPU kernels are not built")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler was found")


def description() -> dict[str, str]:
    """Of the library that is built."""
    assert BUILT is not None
    return described(BUILT._library)


@needs_library
def test_the_library_describes_what_python_states() -> None:
    found = description()
    constants = {name: value for name, value in found.items() if not name.startswith("tardis_")}
    assert constants == library._stated()
    assert set(constants) >= {"kMaxTokens", "kPanelRows", "TARDIS_AVX512", "TARDIS_GELU_TANH", "TardisFFN.offset"}


@needs_library
def test_every_function_and_enumerator_of_the_interface_is_described_and_every_function_typed() -> None:
    assert BUILT is not None
    header = "\n".join(line.split("//")[0] for line in (SOURCES / "interface.h").read_text().splitlines())
    functions = set(re.findall(r"\b(tardis_\w+)\(", header)) - {"tardis_description"}
    found = description()
    assert functions == {name for name in found if name.startswith("tardis_")}
    assert set(re.findall(r"\bTARDIS_\w+", header)) == {name for name in found if name.startswith("TARDIS_")}
    assert set(re.findall(r"\b(k\w+) = ", header)) == {name for name in found if name.startswith("k")}
    for name in functions:
        function = getattr(BUILT._library, name)
        assert function.argtypes is not None and len(function.argtypes) == len(found[name].split()) - 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kMaxTokens": "32"}, "kMaxTokens is 64 here and 32 there"),
        ({"TARDIS_BF16": "2"}, "TARDIS_BF16 is 1 here and 2 there"),
        ({"TARDIS_RELU": "5", "TARDIS_RELU2": "4"}, "TARDIS_RELU is 4 here and 5 there; TARDIS_RELU2 is 5 here and 4"),
        ({"TardisMatrix.rows": "int64@24"}, "TardisMatrix.rows is int64@16 here and int64@24 there"),
        ({"TardisMatrix.bits": "int64@44"}, "TardisMatrix.bits is int32@44 here and int64@44 there"),
        ({"TardisBatch": "48", "TardisBatch.more": "int64@40"}, "TardisBatch.more is unknown here and int64@40 there"),
        ({"TARDIS_FP8": "8"}, "TARDIS_FP8 is unknown here and 8 there"),
        ({"sources": "0123"}, "sources is .* here and 0123 there"),
    ],
    ids=str,
)
def test_a_library_that_says_anything_else_is_refused(change: dict[str, str], said: str) -> None:
    stated = library._stated()
    functions = {"tardis_isa": "int32"}
    check(Path("kernels.so"), stated | functions, stated)
    with pytest.raises(KernelsError, match=f"kernels.so was built for another version.*{said}.*Reinstall"):
        check(Path("kernels.so"), stated | functions | change, stated)


def test_a_library_that_leaves_something_out_is_refused() -> None:
    stated = library._stated()
    for name in stated:
        with pytest.raises(KernelsError, match=f"{name} is .* here and unknown there"):
            check(Path("kernels.so"), {key: value for key, value in stated.items() if key != name}, stated)
    with pytest.raises(KernelsError, match=r"and \d+ more"):
        check(Path("kernels.so"), {}, stated)


def test_sources_are_compared_where_they_lie_only(tmp_path: Path) -> None:
    stated = {name: value for name, value in library._stated().items() if name != "sources"}
    assert sources_of(tmp_path) == {}
    check(Path("kernels.so"), stated | {"sources": "0123"}, stated)
    (tmp_path / "one.cpp").write_text("int one;")
    before = sources_of(tmp_path)
    (tmp_path / "notes.txt").write_text("no source")
    assert sources_of(tmp_path) == before
    (tmp_path / "two.h").write_text("int two;")
    assert sources_of(tmp_path) != before


def stub(folder: Path, lines: dict[str, str] | None) -> Path:
    """A library with this description, or none, and no other function."""
    text = "".join(f"{name}={value}\\n" for name, value in (lines or {}).items())
    function = f'const char* tardis_description(void) {{ return "{text}"; }}'
    source, made = folder / "stub.c", folder / "_kernels.so"
    source.write_text("int tardis_abi(void) { return 6; }" if lines is None else function)
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", made, source], check=True)
    return made


@needs_compiler
def test_a_library_of_another_version_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(
        KernelsError, match=r"_kernels.so was built for another version.*unknown there.*pip install -e tardis"
    ):
        Kernels(stub(tmp_path, None))


@needs_compiler
@pytest.mark.parametrize("stale", ["no description", "other sizes", "other sources", "no library"])
@torch.no_grad()
def test_beside_a_stale_library_the_reference_runs_and_says_why(
    stale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"other sizes": {"TardisFFN": "280"}, "other sources": {"sources": "0123"}}
    path = stub(tmp_path, library._stated() | changes[stale] if stale in changes else None)
    if stale == "no library":
        path.write_bytes(b"nothing")
    monkeypatch.setattr(library, "_candidates", lambda folders: [path])
    monkeypatch.setattr(library, "open_library", library.open_library.__wrapped__)
    monkeypatch.setattr(library, "kernels", library.kernels.__wrapped__)
    monkeypatch.delenv("TARDIS_KERNELS", raising=False)
    folded, dense = stored_fold(40, 96, Storage(48), torch.float32)
    with pytest.warns(RuntimeWarning) as said:
        y = FoldedFFN(folded)(correlated(2, 40), dense)
    assert y.shape == (2, 40)
    messages = [str(each.message) for each in said]
    assert any(str(path) in message and "are not used" in message for message in messages)
    assert any("run through the slower reference" in message for message in messages)
