"""The paper's two figures, reproduced or refuted."""

from __future__ import annotations

from statistics import median

from .measured import Results, Section
from .skew import skew_verdict
from .tables import figure, range_of, table

LATENCY = """One million keys, 10,000 leaves, 90 % of the queries in 10 % of the keys. The root is trained on the
keys (weight 0), on the accesses (1), or on both (0.5); "change" is against weight 0, the median over seeds with least
and most. Only the search in the leaf's window is timed, as the paper's gain is there; for our index the whole call
is, as built (0) and after `adapt()` (1). A root can change the steps only: where they are alike, a difference in ns
comes from elsewhere, such as where the Python objects lie that carry the windows."""
RETRAINING = """The hot range moves, and a network root is trained by SGD until its loss is within 20 % of that of
long training: from random weights (cold), or from those before (warm). Beside it what our index does for the same, on
the same keys."""


def paper_latency(results: Results) -> str:
    rows = []
    for keys in ("uniform", "lognormal"):
        for root in ("line", "network", "doraemon"):
            for weight in (0.0, 0.5, 1.0):
                found = results.of("paper_latency", keys=keys, root=root, weight=weight)
                if not found:
                    continue
                steps = [row["steps"] for row in found if row["steps"] is not None]
                change = range_of([row["change %"][1] for row in found]) if weight else "-"
                cells = [figure(median(steps)) if steps else "-", figure(median(row["ns"][1] for row in found))]
                rows.append([keys, root, f"{weight:g}", *cells, change, str(len(found))])
    return table(["keys", "root", "weight of accesses", "steps", "ns", "change of ns, %", "seeds"], rows)


def paper_best(results: Results) -> list[float]:
    """For each seed the best change that a weight brought to the line root on lognormal keys, where it is weak."""
    rows = [row for row in results.of("paper_latency", keys="lognormal", root="line") if row["weight"]]
    return [min(row["change %"][1] for row in rows if row["seed"] == seed) for seed in {row["seed"] for row in rows}]


def paper_retraining(results: Results) -> str:
    rows = []
    cases = sorted({(row["keys"], row["shift"]) for row in results.rows["paper_retraining"]})
    for keys, shift in cases:
        found = results.of("paper_retraining", keys=keys, shift=shift)
        cells = [figure(median(row[name] for row in found)) for name in ("cold s", "warm s")]
        shorter = sorted(row["cold s"] / row["warm s"] for row in found)
        cells.append(f"{figure(median(shorter))} ({figure(shorter[0])} to {figure(shorter[-1])})")
        cells += [figure(1e3 * median(row[name] for row in found)) for name in ("refit s", "adapt s")]
        rows.append([keys, f"{shift:.0%}", *cells, str(len(found))])
    names = ["keys", "moved by", "s, SGD cold", "s, SGD warm", "cold over warm", "ms, our refit", "ms, our adapt"]
    return table([*names, "seeds"], rows)


def verdict(results: Results) -> str:
    """What became of the paper's two figures, said with ours."""
    changes, rows = paper_best(results), results.rows["paper_retraining"]
    reached = sum(value <= -45.1 for value in changes)
    lines = [
        f"* **45.1 % better latency**: {'reproduced' if 2 * reached > len(changes) else 'not reproduced'}. With the "
        f"better of the two weights, the line root on lognormal keys, our weakest, changed by {range_of(changes)} %; "
        f"{reached} of {len(changes)} seeds reached the paper's figure."
    ]
    for shift in sorted({row["shift"] for row in rows}):
        shorter = sorted(row["cold s"] / row["warm s"] for row in rows if row["shift"] == shift)
        twenty = sum(value >= 20 for value in shorter)
        lines.append(
            f"* **1/20 of the retraining time**, after a move by {shift:.0%} of the keys: "
            f"{'reproduced' if 2 * twenty > len(shorter) else 'not reproduced'}. Warm training took "
            f"1/{figure(median(shorter))} of cold training, from 1/{figure(shorter[0])} to 1/{figure(shorter[-1])}; "
            f"{twenty} of {len(shorter)} seeds reached 1/20."
        )
    speedup = figure(median(row["refit s"] / row["adapt s"] for row in rows))
    closed = figure(median(row["cold s"] / row["refit s"] for row in rows))
    lines.append(
        f"* Fitting in closed form leaves little of either to gain: our full refit of these keys is {closed} times as "
        f"fast as cold training, and `adapt()` {speedup} times as fast as that."
    )
    return "\n".join([*lines, skew_verdict(results)])


SECTIONS = [
    Section("The paper's latency", LATENCY, paper_latency, "paper_latency"),
    Section("The paper's retraining", RETRAINING, paper_retraining, "paper_retraining"),
    Section("Reproduced or refuted", "By these figures:", verdict, "paper_latency"),
]
