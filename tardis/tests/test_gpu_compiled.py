"""The GPU kernels compile for GPUs that are not there, fit them, and load every weight once."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from marks import long

from tardis_llm.runtime.triton.backend import available

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_compiled.py"
#: bytes that a program may have on the smallest of the GPUs
SHARED = 48 * 1024
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942")
pytestmark = [long, pytest.mark.skipif(not available(), reason="Triton is not installed")]


@functools.cache
def found() -> Any:
    """What the script finds for all targets; in a process of its own, as Triton interprets kernels in this one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--json", "--targets", ",".join(TARGETS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_of_one_token_compile_without_spilling(target: str) -> None:
    for steps in found()["steps"].values():
        kernels = {each["name"]: each for each in steps if each["target"] == target}
        assert kernels.keys() == {"predict", "gather", "residuals", "correct", "multiply"}
        assert all(each["spilled"] == 0 and each["shared"] <= SHARED for each in kernels.values())
        assert all(0 < each["registers"] <= 128 for each in kernels.values())


def test_programs_load_the_bytes_that_are_counted_and_none_twice() -> None:
    assert {each["bits"] for each in found()["loads"]} == {1, 2, 4, 8, 16}
    assert all(each["loaded"] == each["counted"] for each in found()["loads"])
