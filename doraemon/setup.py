"""The one C extension. It is optional: without a compiler the package installs and searches with NumPy."""

import runpy
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

sources = runpy.run_path(str(Path(__file__).parent / "doraemon" / "sources.py"))

# One wheel serves Python 3.11 and later; free-threaded builds have no stable ABI before 3.15.
abi3 = not sysconfig.get_config_var("Py_GIL_DISABLED")

native = Extension(
    "doraemon._native",
    sources=["doraemon/_native.c"],
    depends=[f"doraemon/{name}" for name in sources["names"]()],
    define_macros=[
        ("SOURCES", f"{sources['fingerprint']()}u"),
        *([("Py_LIMITED_API", "0x030B0000")] if abi3 else []),
    ],
    extra_compile_args=["/O2"] if sys.platform == "win32" else ["-O3", "-std=c11"],
    py_limited_api=abi3,
    optional=True,
)

setup(ext_modules=[native], options={"bdist_wheel": {"py_limited_api": "cp311"}} if abi3 else {})
