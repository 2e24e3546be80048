"""The paper's setting: a two-level learned index whose root is weak, under skewed queries (arXiv 1902.00655).

    python benchmarks/doraemon/paper.py latency|retraining [--n 1000000] [--seeds 1 2 3 4 5]

Only the paper's abstract says what it did, so this is our reading of it. A root, one line or a small network, sends a
key to one of many leaves; a leaf is a line with a window of true ranks, in which a binary search ends the lookup.

latency     the root trained on the keys' distribution function (weight 0), on that of the accesses (1), or on their
            mean (0.5); lookups are timed one by one, each as `bisect` within its leaf's window, which is known
            beforehand, so that what differs is the search alone. The paper reports 45.1 % less on skewed queries.
            Beside it our index, as built and after `adapt()`, timed whole.
retraining  after the hot range moved, a network root is trained by stochastic gradient descent until its loss is near
            that of long training: from random weights, or from the weights before. The paper reports 1/20. Beside it
            what our index does instead: a full refit in closed form, and `adapt()`.

Each seed has keys, queries and first weights of its own; the methods of one seed take turns.
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from inputs import Keys, make_keys, make_queries
from numpy.typing import NDArray
from timing import Row, in_turns, keep, seconds_of, show, spread

from doraemon import Index
from doraemon.model import build

Floats = NDArray[np.float64]
Root = Callable[[Floats], Floats]  #: scaled keys to [0, 1]
HIDDEN, BATCH, RATE = 16, 512, 3e-3
WEIGHTS = (0.0, 0.5, 1.0)  #: how much of the mass that a root is trained on is that of accesses


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


def roots(keys: Keys, seen: Keys, seed: int) -> Iterator[tuple[str, float, Root]]:
    """Each kind of root for each weight of the accesses."""
    x = scaled(keys)
    for weight in WEIGHTS:
        y = access_function(keys, seen, weight)
        share = np.maximum(np.diff(y, prepend=0), 0) + 1e-12
        yield "line", weight, line(x, y, share * len(keys))
        network = Network(seed)
        network.train(x, y, share, 0.0, 4000, seed)
        yield "network", weight, network


def latency(n: int, shape: str, seed: int, leaves: int) -> list[Row]:
    """Steps and time per lookup for each way to train the root, and for our index."""
    keys = np.unique(make_keys(shape, n, seed))
    seen, queries = (make_queries("90/10", keys, count, 10 * seed + i) for i, count in enumerate((1_000_000, 50_000)))
    view, asked, found = memoryview(keys), queries.tolist(), []
    ways: dict[str, Callable[[int], Any]] = {}
    for kind, weight, root in roots(keys, seen, seed):
        low, high = windows(root, keys, queries, leaves)
        limits = list(zip(asked, low.tolist(), high.tolist(), strict=True))
        assert [bisect_left(view, *q) for q in limits] == np.searchsorted(keys, queries).tolist()
        ways[f"{kind} {weight}"] = lambda _, limits=limits: [bisect_left(view, *q) for q in limits]
        row = {"keys": shape, "seed": seed, "root": kind, "weight": weight}
        found.append(row | {"steps": round(float(np.log2(high - low + 1).mean()), 2)})
    plain, index = Index(keys), Index(keys)
    index.searchsorted(seen)
    index.adapt()
    for weight, ours in ((0.0, plain), (1.0, index)):
        ways[f"doraemon {weight}"] = lambda _, rank=ours.bisect_left: [rank(q) for q in asked]
        found.append({"keys": shape, "seed": seed, "root": "doraemon", "weight": weight, "steps": None})
    seconds = in_turns(ways, 7)
    for row in found:
        own, base = seconds[f"{row['root']} {row['weight']}"], seconds[f"{row['root']} 0.0"]
        row["ns"] = spread([1e9 / len(asked) * value for value in own])
        row["change %"] = spread([100 * (a / b - 1) for a, b in zip(own, base, strict=True)])
    return found


def retraining(n: int, shape: str, seed: int, shift: float) -> Row:
    """Seconds of cold and warm training of a network root, and of what our index does."""
    keys = np.unique(make_keys(shape, n, seed))
    x, places = scaled(keys), (0.0, shift)
    seen = [make_queries("90/10", keys, 1_000_000, 10 * seed, shift=place) for place in places]
    old, new = (access_function(keys, queries, 0.5) for queries in seen)
    shares = [np.maximum(np.diff(y, prepend=0), 0) + 1e-12 for y in (old, new)]
    target = 1.2 * Network(10 * seed).train(x, new, shares[1], 0.0, 6000, 2)
    before = Network(10 * seed + 1)
    before.train(x, old, shares[0], 0.0, 6000, 3)
    row: Row = {"keys": shape, "seed": seed, "shift": shift}
    for name, network in (("cold", Network(10 * seed + 2)), ("warm", before)):
        network.moments, network.steps = Network(0).moments, 0
        row[f"{name} s"] = seconds_of(lambda network=network: network.train(x, new, shares[1], target, 20_000, 5))
        row[f"{name} steps"] = network.steps
    row["warm/cold"] = row["warm s"] / row["cold s"]
    index = Index(keys)
    for place in places:
        for part in range(4):
            index.searchsorted(make_queries("90/10", keys, 2_000_000, 10 * seed + part, shift=place))
        row["adapt s"] = seconds_of(index.adapt)
    run = index._state.run
    row["refit s"] = spread(in_turns({"": lambda _: build(keys, index._state.engine, run.trained)}, 5)[""])[1]
    return row | {name: float(f"{value:.4g}") for name, value in row.items() if isinstance(value, float)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["latency", "retraining"])
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--leaves", type=int, default=10_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--keys", nargs="+", default=["uniform", "lognormal"])
    parser.add_argument("--shifts", nargs="+", type=float, default=[0.02, 0.2])
    options = parser.parse_args()
    for seed in options.seeds:
        for shape in options.keys:
            rows = (
                latency(options.n, shape, seed, options.leaves)
                if options.part == "latency"
                else [retraining(options.n, shape, seed, shift) for shift in options.shifts]
            )
            for row in rows:
                show(row)
            by = ["root", "weight"] if options.part == "latency" else ["shift"]
            keep(f"paper_{options.part}", rows, ["keys", "seed", *by])


if __name__ == "__main__":
    main()
