"""Keys and queries that the benchmarks share, all made from a seed; real keys from text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sosd import GENERATORS, Keys

KEYS = [*GENERATORS, "cascade", "words", "offsets"]
QUERIES = ["uniform", "90/10", "99/1", "zipf"]


def make_keys(name: str, n: int, seed: int = 1, text: list[Path] | None = None) -> Keys:
    """n sorted keys, nearly all distinct except where n is more than the text has.

    uniform, normal, lognormal, osm, facebook: see `sosd`
    cascade    a random multiplicative cascade: dense in dense parts at every scale
    words      the first 8 bytes at the beginning of each word of the text
    offsets    the positions of the words in the text, as multiples of its gaps if it is too short
    """
    rng = np.random.default_rng(seed)
    if name in GENERATORS:
        return np.sort(GENERATORS[name](n, rng))
    if name == "cascade":
        return np.sort(_cascade(n, rng))
    starts, raw = _words(text or [])
    if name == "offsets":
        gaps = np.diff(starts, prepend=0)
        return np.cumsum(np.tile(gaps, -(-n // len(gaps)))[:n]).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(raw, 8)[starts[starts <= len(raw) - 8]]
    keys = np.unique(np.ascontiguousarray(windows).view(">u8")[:, 0].astype(np.uint64))
    return np.sort(rng.choice(keys, n, replace=n > len(keys)))


def _cascade(n: int, rng: np.random.Generator) -> Keys:
    """Each of n points chooses a half, 24 times over, with a bias of its own at every node near the root."""
    bias = rng.beta(2, 2, 1 << 16)
    keys = np.zeros(n, dtype=np.uint64)
    for level in range(40):
        node = (keys + np.uint64(level * 40503)) % np.uint64(len(bias))
        keys = keys * np.uint64(2) + (rng.random(n) < bias[node.astype(np.int64)])
    return keys


def _words(text: list[Path]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    if not text:
        raise SystemExit("error: keys from text need --text FILE...")
    raw = np.concatenate([np.fromfile(path, dtype=np.uint8) for path in text])
    space = raw <= 32
    return np.flatnonzero(space[:-1] & ~space[1:]) + 1, raw


def make_queries(name: str, keys: Keys, count: int, seed: int = 2, shift: float = 0.0) -> Keys:
    """Queries for keys that are there.

    uniform    over the keys
    90/10      90 % of them in 10 % of the keys, next to each other; 99/1 likewise; `shift` moves the hot keys
    zipf       of exponent 1.1, scattered over the keys
    """
    rng, n = np.random.default_rng(seed), len(keys)
    at: NDArray[Any]
    if name == "uniform":
        at = rng.integers(0, n, count)
    elif name == "zipf":
        at = (rng.zipf(1.1, count).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) % np.uint64(n)).astype(np.int64)
    else:
        share, width = (float(part) / 100 for part in name.split("/"))
        hot = int((0.3 + shift) * n) + rng.integers(0, max(1, int(width * n)), count)
        at = np.where(rng.random(count) < share, hot % n, rng.integers(0, n, count))
    return keys[at]
