"""Beside llama.cpp at chosen fix rates: the output of `benchmarks/llama_cpp.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sections.markdown import spread, table

ABOUT = """Shapes with random weights: llama.cpp with everything in Q4_0 (or the file named), ours with everything in
int4, dense and folded. The shares of fixed neurons are chosen; those that equal quality asks for are in the section
before. Ratios are of neighbouring runs, with their quartiles. By `benchmarks/llama_cpp.py`; what says "by node" was
measured through node-llama-cpp, which costs small models much, and not through llama.cpp's own library. On
processors other than those of family 25, model 1, and of family 6, model 85, inputs of our linear layers had 16 bits,
and have 8 now."""


def llama_parts(folder: Path) -> Iterator[str]:
    """The section: a table for each processor and number of threads, of the files that were written into a folder."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("llama_cpp_*.json"))]
    if not runs:
        return
    yield "## Beside llama.cpp"
    yield ABOUT
    for machine in sorted({_machine(run) for run in runs}):
        yield f"{machine}."
        yield llama_table([run for run in runs if _machine(run) == machine])


def _machine(run: dict[str, Any]) -> str:
    """What ratios are kept apart by."""
    only = f", both sides by {run['instructions']} only" if "instructions" in run else ""
    return f"{run['cpu']}, threads: {run['threads']}{only}"


def llama_table(runs: list[dict[str, Any]]) -> str:
    """A row for each variant of each run."""
    head = ["shape and layers", "batch", "", "tokens/s", "over llama.cpp", "prompt", "first token, s", "over llama.cpp"]
    return table(head, [_line(run, row) for run in runs for row in run["rows"]])


def _line(run: dict[str, Any], row: dict[str, Any]) -> list[str]:
    label = run["file"].removesuffix(".gguf") + (", compiled" if run["compiled"] else "")
    label += ", by node" if run["llama_cpp"].startswith("node") else ""
    return [
        label,
        str(run.get("batch", 1)),
        row["variant"],
        f"{row['tokens_per_second']:.1f}",
        spread(*row["over_llama"].values()),
        str(run.get("prompt", 512)),
        f"{row['first_token_seconds']:.2f}",
        spread(*row["first_over_llama"].values()),
    ]
