"""Timing and results: what is compared takes turns in one process, so that what else the machine does meets all."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent.parent / "results" / "doraemon"
Row = dict[str, Any]
Seconds = dict[str, list[float]]  #: of each way, one per round
Clock = Callable[[], float]  #: in seconds


def seconds_of(work: Callable[[], Any], clock: Clock = time.process_time) -> float:
    """How long one call takes: of this process, so that other programs' turns on the processor are not counted."""
    begin = clock()
    work()
    return clock() - begin


def in_turns(ways: dict[str, Callable[[int], Any]], rounds: int = 7, clock: Clock = time.process_time) -> Seconds:
    """Seconds of each way in each round. A way is told which turn it is, lest it find warm what another just read.

    Several threads need a clock of the world. Each round begins with another way, as one may leave the caches worse
    for the next than others do.
    """
    seconds: Seconds = {name: [] for name in ways}
    order = list(ways.items())
    for round_ in range(rounds):
        first = round_ % len(order)
        for number, (name, way) in enumerate(order[first:] + order[:first]):
            turn = round_ * len(ways) + number
            seconds[name].append(seconds_of(lambda way=way, turn=turn: way(turn), clock))
    return seconds


def spread(values: list[float], digits: int = 4) -> list[float]:
    """First quartile, median and third quartile."""
    return [float(f"{value:.{digits}g}") for value in np.percentile(values, [25, 50, 75])]


def spreads(seconds: Seconds, scale: float) -> dict[str, list[float]]:
    """The spread of each way's seconds times a scale."""
    return {name: spread([scale * value for value in values]) for name, values in seconds.items()}


def ratios(seconds: Seconds, ours: str) -> dict[str, list[float]]:
    """The spread of how many times as long as ours each way took, round by round."""
    pairs = {name: zip(values, seconds[ours], strict=True) for name, values in seconds.items() if name != ours}
    return {name: spread([other / own for other, own in each]) for name, each in pairs.items()}


def show(row: Row) -> None:
    """Print a row as it is measured: of spreads the medians."""
    flat = {}
    for name, value in row.items():
        parts = value if isinstance(value, dict) else {"": value}
        flat |= {
            f"{name} {part}".strip(): v[1] if isinstance(v, list) and len(v) == 3 else v for part, v in parts.items()
        }
    print("; ".join(f"{name} {value}" for name, value in flat.items()), flush=True)


def keep(name: str, rows: list[Row], by: list[str]) -> None:
    """Put rows among this processor's results, in place of those that have the same values of the fields `by`.

    Each processor has a folder. Rows of other software are dropped, as a file states one.
    """
    path = RESULTS / folder_of(processor()) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    held = json.loads(path.read_text()) if path.exists() else {}
    kept = held["rows"] if held.get("machine") == machine() else []
    fresh = {tuple(row[field] for field in by) for row in rows}
    kept = [row for row in kept if tuple(row[field] for field in by) not in fresh] + rows
    lines = ",\n".join(json.dumps(row) for row in kept)
    path.write_text(f'{{"machine": {json.dumps(machine())},\n"rows": [\n{lines}\n]}}\n')


def machine() -> Row:
    """What the figures are of."""
    return {"processor": processor(), "python": platform.python_version(), "numpy": np.__version__, "threads": 1}


def processor() -> str:
    """Its name with family and model, as vendors give different processors one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in known.items()}
    family, model = fields.get("cpu family", "?"), fields.get("model", "?")
    cache = fields.get("cache size", "?")
    return f"{fields.get('model name', '')}, family {family}, model {model}, cache {cache}"


def folder_of(name: str) -> str:
    """The folder of a processor's results: its name in small letters and digits."""
    return "-".join(re.findall(r"[a-z0-9]+", name.split(", cache")[0].lower()))
