"""Ratios of times that cannot flatter: what is compared takes turns in one process.

A machine's speed drifts while it is measured, so two things are only compared by runs next to each other: a speed-up is
the median of the ratios of neighbouring runs, given with their quartiles.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..report import Progress


@dataclass(frozen=True)
class Ratio:
    """How many times faster one thing is than another.

    Attributes:
        value: median of the ratios of neighbouring runs.
        low: first quartile of these ratios.
        high: third quartile of these ratios.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> Ratio:
        """The ratio of two lists of seconds, two at least, of runs that took turns."""
        ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
        low, value, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(value, low, high)


def take_turns(
    timed: Mapping[str, Callable[[], float]], rounds: int, progress: Progress, stage: str
) -> dict[str, list[float]]:
    """Call each function once per round, one after the other; a first round is not counted.

    Args:
        timed: functions by name, each of which returns the seconds that it took.
        rounds: rounds that count.
        progress: told of the rounds done.
        stage: name of the work, for `progress`.

    Returns:
        Seconds of every counted round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        progress(stage, number, rounds + 1)
        for name, run in timed.items():
            taken = run()
            if number:
                seconds[name].append(taken)
    progress(stage, rounds + 1, rounds + 1)
    return seconds
