"""Markdown that all sections write."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def spread(value: float, low: float, high: float) -> str:
    """A ratio with its quartiles."""
    return f"{value:.2f} [{low:.2f}-{high:.2f}]"
