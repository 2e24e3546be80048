"""Timing and tables: the best of some repetitions, as the machine's other work only ever adds."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent.parent / "results" / "doraemon"


def best(work: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds that the fastest of some calls took."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows under the names of their first one's fields."""
    print(f"\n{title}")
    names = list(rows[0])
    cells = [names] + [[f"{v:,.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write rows, and the machine that they are of, to the results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = {"processor": _processor(), "python": platform.python_version(), "numpy": np.__version__}
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
