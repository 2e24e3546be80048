"""Keys like those of SOSD, the benchmark of learned indexes: synthetic stand-ins, all made from a seed.

SOSD (https://arxiv.org/abs/1911.13014) asks for keys that are there, uniformly, among 200 million keys or more. Its
synthetic sets are drawn from distributions, as `uniform`, `normal` and `lognormal` are here. Its real ones are files of
gigabytes. `osm` and `facebook` stand in for two of them: they imitate what makes those hard for a model, by the means
that their docstrings say, and hold none of their data. A figure over them is comparable with another over the same
stand-in, and not with one over SOSD's files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]
TOWNS, OUTLIERS, BLOCK = 20_000, 21, 1_000


def uniform(n: int, rng: np.random.Generator) -> Keys:
    """As SOSD's sparse uniform keys: drawn from all of uint64."""
    return rng.integers(0, 2**64 - 1, n, dtype=np.uint64)


def normal(n: int, rng: np.random.Generator) -> Keys:
    """As SOSD's normal keys: about the middle of uint64, with a deviation of 2**60."""
    return rng.normal(2.0**63, 2.0**60, n).astype(np.uint64)


def lognormal(n: int, rng: np.random.Generator) -> Keys:
    """As SOSD's lognormal keys: exp of a normal with deviation 2, scaled to whole numbers."""
    return (np.exp(rng.normal(0, 2, n)) * 1e12).astype(np.uint64)


def osm(n: int, rng: np.random.Generator) -> Keys:
    """Stand-in for OpenStreetMap's cells, which are places on the earth, numbered along a curve that fills a plane.

    Nine places in ten lie in towns, whose sizes follow Zipf's law and which thin out from their middle; the rest is
    spread evenly. The curve is the Z-order of 32-bit coordinates, not the Hilbert curve on a cube of the original. What
    is alike: two dimensions folded into one, so that dense and empty stretches follow each other at every scale.
    """
    sizes = 1 / np.arange(1, TOWNS + 1)
    town = rng.choice(TOWNS, n, p=sizes / sizes.sum())
    middles, width = rng.random((2, TOWNS)), 1e-3 * rng.lognormal(0, 1, TOWNS)
    away = width[town] * rng.exponential(1, n)
    angle = rng.uniform(0, 2 * np.pi, n)
    places = middles[:, town] + away * np.stack([np.cos(angle), np.sin(angle)])
    spread = rng.random(n) < 0.1
    places[:, spread] = rng.random((2, int(spread.sum())))
    x, y = (places % 1.0 * 2.0**32).astype(np.uint64)
    return _every_other_bit(x) | _every_other_bit(y) << np.uint64(1)


def _every_other_bit(numbers: Keys) -> Keys:
    """The 32 bits of each number, moved apart so that one fits between each two."""
    for shift, mask in (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ):
        numbers = (numbers | numbers << np.uint64(shift)) & np.uint64(mask)
    return numbers


def facebook(n: int, rng: np.random.Generator) -> Keys:
    """Stand-in for Facebook's users, whose numbers were given out in ascending order, and of which a sample is kept.

    Gaps are exponential, and their mean changes by orders of magnitude from one thousand of keys to the next, as when
    ranges of numbers are reserved or given out by many machines. The last 21 keys lie anywhere up to 2**63, as a few of
    the original's are far above all others. What is alike: smooth where looked at from afar, uneven within a bucket of
    a model, and a range that outliers stretch.
    """
    means = np.exp(rng.normal(2, 2, -(-n // BLOCK)))
    gaps = 1 + rng.exponential(np.repeat(means, BLOCK)[:n]).astype(np.uint64)
    keys = np.cumsum(gaps, dtype=np.uint64)
    few = min(OUTLIERS, n // BLOCK)
    keys[n - few :] = rng.integers(int(keys[-1]), 2**63, few, dtype=np.uint64)
    return keys


GENERATORS: dict[str, Callable[[int, np.random.Generator], Keys]] = {
    "uniform": uniform,
    "normal": normal,
    "lognormal": lognormal,
    "osm": osm,
    "facebook": facebook,
}
