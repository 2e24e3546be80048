"""Keys that are str: look-ups of ours, `bisect` on a list and pandas' and polars' own; one thread.

    python benchmarks/doraemon/texts.py --text FILE... [--keys words urls uuids] [--n 1000000] [--rounds 7]

Needs `pip install pandas pyarrow polars`. 200,000 queries at once for keys that are there, drawn evenly. Every way is
given its queries as it likes them best and answers them the same, which is checked: ours a list of str and an Arrow
column, pandas an Index of its dtype `str` or of objects. pandas' `get_indexer` hashes, and knows no order; its table is
made before the clock starts. A list keeps its str in the order of the keys, as those that were read sorted are.
"""

from __future__ import annotations

import argparse
import uuid
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pyarrow
from timing import Row, in_turns, keep, ratios, seconds_of, show, spreads

from doraemon import Index

BATCH, SINGLE = 200_000, 20_000
KEYS = ["words", "urls", "uuids"]


def make_texts(name: str, n: int, text: list[Path]) -> list[str]:
    """At most n sorted, distinct str.

    words  of the text, as they stand between spaces
    urls   of pages of an encyclopedia named after three words that follow each other in the text
    uuids  random ones, in hexadecimal digits
    """
    rng = np.random.default_rng(1)
    if name == "uuids":
        return sorted(str(uuid.UUID(bytes=rng.bytes(16))) for _ in range(n))
    words = [word for path in text for word in path.read_text(encoding="utf-8", errors="replace").split()]
    if name == "words":
        found = list(dict.fromkeys(words))
    else:
        threes = zip(words[::3], words[1::3], words[2::3], strict=False)
        found = list(dict.fromkeys(f"https://en.wikipedia.org/wiki/{'_'.join(three).capitalize()}" for three in threes))
    return sorted(found[place] for place in rng.permutation(len(found))[:n])


def copied(texts: list[str]) -> list[str]:
    """The same str elsewhere in memory, as queries are not the keys themselves."""
    return [text.encode().decode() for text in texts]


def looked_up(keys: list[str], rounds: int) -> Row:
    """Nanoseconds per query of each way to ask for many keys at once."""
    index, rng = Index(keys), np.random.default_rng(2)
    own, objects, series = pandas.Index(keys), pandas.Index(keys, dtype=object), polars.Series(keys)
    asked = [copied([keys[place] for place in rng.integers(0, len(keys), BATCH)]) for _ in range(3)]
    columns, as_str = [pyarrow.array(queries) for queries in asked], [pandas.Index(queries) for queries in asked]
    as_objects = [pandas.Index(queries, dtype=object) for queries in asked]
    as_series = [polars.Series(queries) for queries in asked]
    ways: dict[str, Callable[[int], Any]] = {
        "doraemon": lambda turn: index.searchsorted(asked[turn % 3]),
        "doraemon, Arrow": lambda turn: index.searchsorted(columns[turn % 3]),
        "bisect on a list": lambda turn: [bisect_left(keys, query) for query in asked[turn % 3]],
        "pandas, str": lambda turn: own.get_indexer(as_str[turn % 3]),
        "pandas, objects": lambda turn: objects.get_indexer(as_objects[turn % 3]),
        "polars": lambda turn: series.search_sorted(as_series[turn % 3], side="left"),
    }
    for name, way in ways.items():
        np.testing.assert_array_equal(np.asarray(way(0)), ways["bisect on a list"](0), err_msg=name)
    seconds = in_turns(ways, rounds)
    faster = {"ratio": ratios(seconds, "doraemon"), "ratio, Arrow": ratios(seconds, "doraemon, Arrow")}
    return {"ns": spreads(seconds, 1e9 / BATCH)} | faster


def one_by_one(keys: list[str], rounds: int) -> Row:
    """Nanoseconds per call of ours and of `bisect`."""
    index, rng = Index(keys), np.random.default_rng(3)
    asked = copied([keys[place] for place in rng.integers(0, len(keys), 10 * SINGLE)])

    def part(turn: int, way: Callable[[str], int]) -> None:
        first = turn * SINGLE % len(asked)
        for query in asked[first : first + SINGLE]:
            way(query)

    ways: dict[str, Callable[[int], Any]] = {
        "doraemon": lambda turn: part(turn, index.bisect_left),
        "bisect on a list": lambda turn: part(turn, lambda query: bisect_left(keys, query)),
    }
    seconds = in_turns(ways, rounds)
    return {"single ns": spreads(seconds, 1e9 / SINGLE), "single ratio": ratios(seconds, "doraemon")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--keys", nargs="+", choices=KEYS, default=KEYS)
    parser.add_argument("--n", nargs="+", type=int, default=[1_000_000])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for name in options.keys:
        for n in options.n:
            keys = make_texts(name, n, options.text)
            made = {"build ms": round(1e3 * seconds_of(lambda keys=keys: Index(keys)), 1)}
            held = Index(keys).explain().key_bytes / len(keys)
            size = {
                "bytes per text": round(sum(map(len, map(str.encode, keys))) / len(keys), 1),
                "held": round(held, 1),
            }
            row: Row = {"keys": name, "asked for": n, "n": len(keys), "rounds": options.rounds} | made | size
            row |= looked_up(keys, options.rounds) | one_by_one(keys, options.rounds)
            show(row)
            keep("texts", [row], ["keys", "asked for"])


if __name__ == "__main__":
    main()
