"""Figures, and tables of them in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from .measured import Row

Spread = list[float]  #: first quartile, median, third quartile


def millions(n: int) -> str:
    return f"{n // 1_000_000}M"


def figure(value: float) -> str:
    """Three digits, and no more after the point than they take."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values: Spread, unit: str = "") -> str:
    """The median, and the quartiles in brackets."""
    low, middle, high = (figure(value) for value in values)
    return f"{middle}{unit} ({low} to {high})"


def times(values: Spread) -> str:
    """A ratio; bold where the other is faster."""
    text = f"{figure(values[1])}x"
    return f"**{text}**" if values[1] < 1 else text


def asked(rows: list[Row], names: list[str]) -> list[str]:
    """Of the other ways those that were measured in any of the rows."""
    return [name for name in names if any(name in row["ratio"] for row in rows)]


def times_over(row: Row, names: list[str]) -> list[str]:
    """How many times as long as ours each other way takes, a dash where it was not asked."""
    return [times(row["ratio"][name]) if name in row["ratio"] else "-" for name in names]


def percents(values: Spread) -> str:
    """A change in percent, with its quartiles."""
    low, middle, high = (f"{value:+.0f}" for value in values)
    return f"{middle} % ({low} to {high})"


def range_of(values: list[float]) -> str:
    """The median over seeds, least and most."""
    low, middle, high = (f"{value:+.1f}" for value in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"


def table(names: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *rows)]
    return "\n".join(lines)
