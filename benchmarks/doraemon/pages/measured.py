"""What was measured: the kept results, and the sections that are made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "doraemon"
PARTS = ["lookups_batches", "lookups_single", "lookups_moving", "changes_building", "changes_adapting"]
PARTS += ["changes_writing", "paper_latency", "paper_retraining"]
PARTS += ["skew_batches", "skew_single", "skew_moving", "single_inserts", "single_ycsb", "threads", "texts"]
KEYS = ["uniform", "normal", "lognormal", "osm", "facebook", "cascade", "words", "offsets"]
QUERIES = ["uniform", "90/10", "99/1", "zipf"]
SKEWED = ["uniform", "90/10", "99/1", "zipf 1.1, endless", "zipf 1.1", "zipf 1.3"]
TARGET, LARGE = 4_000_000, 64_000_000

Row = dict[str, Any]


@dataclass
class Results:
    """All rows, by the part of the benchmarks that made them; each part's are of one processor."""

    rows: dict[str, list[Row]]
    machines: dict[str, dict[str, Any]]  #: that each part was measured on

    @classmethod
    def read(cls, folder: Path) -> Results:
        """What one processor measured, whose folder it is."""
        files = {name: folder / f"{name}.json" for name in PARTS}
        parts = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
        rows = {name: parts[name]["rows"] if name in parts else [] for name in PARTS}
        for name in ("lookups_batches", "lookups_single"):
            rows[name].sort(key=lambda row: (KEYS.index(row["keys"]), row["n"], QUERIES.index(row["queries"])))
        for name in ("changes_building", "changes_adapting", "changes_writing"):
            rows[name].sort(key=lambda row: row["n"])
        for name in ("skew_batches", "skew_single", "skew_moving"):
            rows[name].sort(key=lambda row: (row["n"], SKEWED.index(row["queries"])))
        return cls(rows, {name: part["machine"] for name, part in parts.items()})

    @property
    def machine(self) -> dict[str, Any]:
        """That of the batches, which the page is said to be of; other parts say theirs if it is another."""
        return self.machines["lookups_batches"]

    def or_else(self, other: Results) -> Results:
        """These parts, and those of another processor that this one did not measure."""
        missing = {part: machine for part, machine in other.machines.items() if part not in self.machines}
        return Results(self.rows | {part: other.rows[part] for part in missing}, self.machines | missing)

    def of(self, part: str, **fields: Any) -> list[Row]:
        """The rows of a part that have these values."""
        return [row for row in self.rows[part] if all(row[name] == value for name, value in fields.items())]

    def one(self, part: str, **fields: Any) -> Row:
        (row,) = self.of(part, **fields)
        return row


def by_processor(folder: Path) -> list[Results]:
    """What each processor measured; the first is the one that measured most."""
    all_results = [Results.read(each) for each in sorted(folder.iterdir()) if each.is_dir()]
    return sorted(all_results, key=lambda results: -len(results.machines))


class Section(NamedTuple):
    """A section of the page.

    Attributes:
        title: its heading.
        text: what is said before the figures.
        make: makes the rest of the results.
        part: of the benchmarks, without whose rows there is no section.
        field: that a row must have to count as one; None if all do.
    """

    title: str
    text: str
    make: Callable[[Results], str]
    part: str
    field: str | None = None

    def is_measured(self, results: Results) -> bool:
        """Whether there is anything to say."""
        return any(self.field is None or self.field in row for row in results.rows[self.part])
