"""The paper's setting: a two-level learned index whose root is weak, under skewed queries (arXiv 1902.00655).

    python benchmarks/doraemon/paper.py [--n 1000000]

Only the paper's abstract says what it did, so this is our reading of it. A root, one line or a small network, sends a
key to one of many leaves; a leaf is a line with a window of true ranks, in which a binary search ends the lookup.

latency     the root trained on the keys' distribution function, or on that of the accesses; lookups are timed one by
            one, each as `bisect` within its leaf's window. The paper reports 45.1 % less on skewed queries.
retraining  after the hot range moved, a network root is trained by stochastic gradient descent until its loss is near
            that of long training: from random weights, or from the weights before. The paper reports 1/20. Beside it
            what our index does instead: a full refit in closed form, and `adapt()`.
"""

from __future__ import annotations

import argparse
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
from inputs import Keys, make_keys, make_queries
from numpy.typing import NDArray
from timing import best, table, write

from doraemon import Index
from doraemon.model import build

Floats = NDArray[np.float64]
Root = Callable[[Floats], Floats]  #: scaled keys to [0, 1]
HIDDEN, BATCH, RATE = 16, 512, 3e-3


def scaled(keys: Keys) -> Floats:
    """Keys as floats from 0 to 1: what the roots read."""
    low, high = float(keys[0]), float(keys[-1])
    return (keys.astype(np.float64) - low) / (high - low)


def access_function(keys: Keys, queries: Keys, weight: float) -> Floats:
    """At each key the share of the mass before it: `weight` of accesses, the rest of keys."""
    counts = np.bincount(np.searchsorted(keys, queries), minlength=len(keys)).astype(np.float64)
    mass = weight * counts / counts.sum() + (1 - weight) / len(keys)
    return np.cumsum(mass) - mass / 2


def line(x: Floats, y: Floats, weights: Floats) -> Root:
    """The weighted least-squares line."""
    slope, offset = np.polyfit(x, y, 1, w=np.sqrt(weights))
    return lambda at: slope * at + offset


class Network:
    """One hidden layer, trained with Adam on single samples' squared errors."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        inner = [rng.normal(0, 3, (1, HIDDEN)), rng.uniform(-3, 3, HIDDEN)]
        self.parts = [*inner, rng.normal(0, 0.3, (HIDDEN, 1)), np.zeros(1)]
        self.moments = [(np.zeros_like(part), np.zeros_like(part)) for part in self.parts]
        self.steps = 0

    def __call__(self, x: Floats) -> Floats:
        w1, b1, w2, b2 = self.parts
        return (np.tanh(x[:, None] @ w1 + b1) @ w2 + b2)[:, 0]

    def step(self, x: Floats, y: Floats) -> None:
        w1, b1, w2, b2 = self.parts
        hidden = np.tanh(x[:, None] @ w1 + b1)
        error = 2 * (hidden @ w2 + b2 - y[:, None]) / len(x)
        back = error @ w2.T * (1 - hidden**2)
        self.steps += 1
        gradients = [x[None] @ back, back.sum(0), hidden.T @ error, error.sum(0)]
        for part, gradient, (mean, square) in zip(self.parts, gradients, self.moments, strict=True):
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            part -= RATE * mean / (1 - 0.9**self.steps) / (np.sqrt(square / (1 - 0.999**self.steps)) + 1e-8)

    def train(self, x: Floats, y: Floats, share: Floats, target: float, most: int, seed: int) -> float:
        """Steps on keys drawn by share until the loss is at the target; the loss reached."""
        rng, held = np.random.default_rng(seed), np.random.default_rng(0)
        cumulated = np.cumsum(share) / share.sum()
        check = np.searchsorted(cumulated, held.random(8192))
        loss = np.inf
        for step in range(most):
            if step % 50 == 0:
                loss = float(np.mean((self(x[check]) - y[check]) ** 2))
                if loss <= target:
                    break
            at = np.searchsorted(cumulated, rng.random(BATCH))
            self.step(x[at], y[at])
        return loss


def windows(root: Root, keys: Keys, queries: Keys, leaves: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each query the ends of its leaf's window around the leaf's prediction; they always hold the rank."""
    low, span = float(keys[0]), float(keys[-1]) - float(keys[0])

    def leaf_of(codes: Keys) -> NDArray[np.int64]:
        share = root((codes.astype(np.float64) - low) / span)
        return np.clip(np.nan_to_num(share) * leaves, 0, leaves - 1).astype(np.int64)

    leaf, x, rank = leaf_of(keys), scaled(keys), np.arange(len(keys), dtype=np.float64)
    n = np.maximum(np.bincount(leaf, minlength=leaves), 1)
    mean_x, mean_r = np.bincount(leaf, x, leaves) / n, np.bincount(leaf, rank, leaves) / n
    dx = x - mean_x[leaf]
    xx, xr = np.bincount(leaf, dx * dx, leaves), np.bincount(leaf, dx * (rank - mean_r[leaf]), leaves)
    slope = np.divide(xr, xx, out=np.zeros(leaves), where=xx > 0)
    rest = rank - mean_r[leaf] - slope[leaf] * dx
    radius = np.zeros(leaves)
    np.maximum.at(radius, leaf, np.abs(rest))
    at = leaf_of(queries)
    centre = mean_r[at] + slope[at] * ((queries.astype(np.float64) - low) / span - mean_x[at])
    first = np.clip(np.floor(centre - radius[at]), 0, len(keys)).astype(np.int64)
    return first, np.clip(np.ceil(centre + radius[at]) + 1, 0, len(keys)).astype(np.int64)


def latency(n: int, shape: str, queries_shape: str, leaves: int) -> list[dict[str, Any]]:
    """ns and steps per lookup for each way to train the root."""
    keys = np.unique(make_keys(shape, n))
    seen = make_queries(queries_shape, keys, 1_000_000, seed=3)
    queries = make_queries(queries_shape, keys, 100_000, seed=4)
    x, view, rows = scaled(keys), memoryview(keys), []
    for kind, steps in (("line", 0), ("network", 4000)):
        for weight in (0.0, 0.5, 1.0):
            y = access_function(keys, seen, weight)
            share = np.diff(y, prepend=0)
            share = np.maximum(share, 0) + 1e-12
            root: Root = line(x, y, share * len(keys)) if kind == "line" else Network(1)
            if isinstance(root, Network):
                root.train(x, y, share, 0.0, steps, 2)
            low, high = windows(root, keys, queries, leaves)
            asked = list(zip(queries.tolist(), low.tolist(), high.tolist(), strict=True))
            assert [bisect_left(view, *q) for q in asked] == np.searchsorted(keys, queries).tolist()
            seconds = best(lambda asked=asked: [bisect_left(view, *q) for q in asked], 3)
            row = {"keys": shape, "queries": queries_shape, "root": kind, "access weight": weight}
            rows.append(row | {"steps": float(np.log2(high - low + 1).mean()), "ns": seconds / len(queries) * 1e9})
            plain = next(other for other in rows if other["root"] == kind)
            rows[-1]["change %"] = 100 * (rows[-1]["ns"] / plain["ns"] - 1)
    return rows


def retraining(n: int, shape: str, shift: float) -> dict[str, Any]:
    """Seconds of cold and warm training of a network root, and of what our index does."""
    keys = np.unique(make_keys(shape, n))
    x = scaled(keys)
    old, new = (access_function(keys, make_queries("90/10", keys, 1_000_000, shift=s), 0.5) for s in (0.0, shift))
    shares = [np.maximum(np.diff(y, prepend=0), 0) + 1e-12 for y in (old, new)]
    target = 1.2 * Network(1).train(x, new, shares[1], 0.0, 6000, 2)
    before = Network(1)
    before.train(x, old, shares[0], 0.0, 6000, 3)
    row: dict[str, Any] = {"keys": shape, "shift": shift}
    for name, network in (("cold", Network(4)), ("warm", before)):
        network.moments, network.steps = Network(0).moments, 0
        begin = time.perf_counter()
        network.train(x, new, shares[1], target, 20_000, 5)
        row[f"{name} s"], row[f"{name} steps"] = time.perf_counter() - begin, network.steps
    row["warm/cold"] = row["warm s"] / row["cold s"]
    index = Index(keys)
    for moved in (0.0, shift):
        for seed in range(4):
            index.searchsorted(make_queries("90/10", keys, 2_000_000, seed=seed, shift=moved))
        begin = time.perf_counter()
        index.adapt()
        row["adapt s"] = time.perf_counter() - begin
    row["refit s"] = best(lambda: build(keys, index._state.engine), 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--leaves", type=int, default=10_000)
    options = parser.parse_args()
    found = [row for shape in ("uniform", "lognormal") for row in latency(options.n, shape, "90/10", options.leaves)]
    table("latency", found)
    trained = [retraining(options.n, "uniform", shift) for shift in (0.02, 0.2)]
    table("retraining", trained)
    write("paper_latency", found)
    write("paper_retraining", trained)


if __name__ == "__main__":
    main()
