"""The kernels for ARM processors, compiled for Linux and run by qemu, compute what the plain kernels do."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock
from marks import long

TARDIS = Path(__file__).parents[1]
COMPILER = "aarch64-linux-gnu-g++"
SYSROOT = Path("/usr/aarch64-linux-gnu")  # of Debian's cross compiler: the C and C++ libraries that programs ask for
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
MISSING = [tool for tool in (COMPILER, "cmake", "ninja") if shutil.which(tool) is None]

pytestmark = [
    long,
    pytest.mark.skipif(platform.machine() == "aarch64", reason="test_kernels.py tests them on such a processor"),
    pytest.mark.skipif(
        bool(MISSING) or EMULATOR is None or not SYSROOT.is_dir(),
        reason="needs cmake, ninja, and Debian's packages g++-aarch64-linux-gnu and qemu-user",
    ),
]


def run(*command: object) -> str:
    """What a command prints, if it succeeds."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def program(shared: Path) -> Path:
    """`compare_kernels.cpp` for ARM, with the kernels as the package's own build makes them."""
    folder = shared / "arm"
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}")
    made = folder / "compare_kernels"
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            run("cmake", "-S", TARDIS, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *target)
            run("cmake", "--build", folder)
            library = folder / "_kernels.so"
            source = TARDIS / "tests" / "compare_kernels.cpp"
            run(COMPILER, "-std=c++17", "-O1", source, library, f"-Wl,-rpath,{folder}", "-o", made)
    return made


@pytest.mark.parametrize(
    ("processor", "sets"),
    [("max", ["neon", "i8mm"]), ("neoverse-n1", ["neon"]), ("cortex-a72", [])],
    ids=["all", "without i8mm", "without the dot product"],
)
def test_every_set_that_a_processor_has_computes_what_the_plain_kernels_do(
    program: Path, processor: str, sets: list[str]
) -> None:
    assert EMULATOR is not None
    compared = dict(line.split(": ") for line in run(EMULATOR, "-cpu", processor, "-L", SYSROOT, program).splitlines())
    assert list(compared) == sets
    assert all(int(count) > 1000 for count in compared.values())
