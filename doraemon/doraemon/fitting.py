"""Fitting the leaves of some buckets: in C, or the same sums vectorised with NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .arrays import Bits, Codes, Floats, Ints
from .engine import Engine, native

STEEPEST = 1 << 21  #: a steeper line's base would not be a whole position in a float32 any more
BATCH = 1 << 20  #: keys that NumPy fits at once, which bounds its temporary arrays


def fit_buckets(keys: Codes, ends: Ints, scales: Floats, bits: Bits, out: NDArray[np.float32], engine: Engine) -> None:
    """Write the leaves of buckets, one after the other, to `out`.

    Args:
        keys: the sorted run.
        ends: [buckets, 2], where each begins and ends in it.
        scales: [buckets], leaves per unit of code.
        bits: [buckets], log2 of the number of leaves.
        out: [sum of 2**bits, 3], rows of base, slope and radius.
    """
    if engine == "native":
        native.fit(keys, np.ascontiguousarray(ends), scales, bits, STEEPEST, out)
        return
    sizes = np.int64(1) << bits.astype(np.int64)
    row = np.concatenate([[0], np.cumsum(sizes)])
    depth = np.concatenate([[0], np.cumsum(ends[:, 1] - ends[:, 0])])
    first = 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(depth, depth[first] + BATCH)))
        part = slice(first, last)
        _fit_with_numpy(keys, ends[part], scales[part], sizes[part], out[row[first] : row[min(last, len(ends))]])
        first = last


def _fit_with_numpy(keys: Codes, ends: Ints, scales: Floats, sizes: Ints, out: NDArray[np.float32]) -> None:
    bucket, position, leaf, fraction = _points(keys, ends, scales, sizes)
    rank = (position - ends[bucket, 0]).astype(np.float64)
    occupied = np.flatnonzero(np.diff(leaf, prepend=-1))
    counts = np.diff(occupied, append=len(leaf))
    mean_f = np.add.reduceat(fraction, occupied) / counts
    mean_r = np.add.reduceat(rank, occupied) / counts
    f, r = fraction - np.repeat(mean_f, counts), rank - np.repeat(mean_r, counts)
    ff, fr = np.add.reduceat(f * f, occupied), np.add.reduceat(f * r, occupied)
    slope = np.minimum(np.divide(fr, ff, out=np.zeros(len(ff)), where=ff > 0), STEEPEST).astype(np.float32)
    rest = rank - np.repeat(slope.astype(np.float64), counts) * fraction
    least, most = np.minimum.reduceat(rest, occupied), np.maximum.reduceat(rest, occupied)
    out[:] = 0
    out[:, 0] = _ranks_of_empty_leaves(bucket, rank, leaf, ends, sizes)
    out[leaf[occupied]] = np.stack([(least + most) / 2, slope, (most - least) / 2 + 1], axis=1)


def _points(keys: Codes, ends: Ints, scales: Floats, sizes: Ints) -> tuple[Ints, Ints, Ints, Floats]:
    """Per distinct key of each bucket, and the first of the next: bucket, position, leaf row, fraction of the leaf."""
    counts = np.minimum(ends[:, 1] + 1, len(keys)) - ends[:, 0]
    bucket = np.repeat(np.arange(len(ends)), counts)
    position = np.arange(len(bucket)) - np.repeat(np.cumsum(counts) - counts, counts) + ends[bucket, 0]
    distinct = (position == ends[bucket, 0]) | (keys[position] != keys[position - 1])
    bucket, position = bucket[distinct], position[distinct]
    t = (keys[position] - keys[ends[bucket, 0]]).astype(np.float64) * scales[bucket]
    leaf = np.minimum(t, sizes[bucket] - 1).astype(np.int64)
    row = leaf + (np.cumsum(sizes) - sizes)[bucket]
    return bucket, position, row, t - leaf


def _ranks_of_empty_leaves(bucket: Ints, rank: Floats, leaf: Ints, ends: Ints, sizes: Ints) -> Floats:
    """Per leaf row, the rank in its bucket of the first key after the row: all that an empty leaf is asked for."""
    rows = np.arange(int(sizes.sum()))
    of_row = np.repeat(np.arange(len(sizes)), sizes)
    after = np.searchsorted(leaf, rows, side="right")
    inside = np.minimum(after, len(leaf) - 1)
    same = (after < len(leaf)) & (bucket[inside] == of_row)
    return np.where(same, rank[inside], (ends[of_row, 1] - ends[of_row, 0]).astype(np.float64))
