"""The picture: time against size, and over the kinds of keys."""

from __future__ import annotations

from pathlib import Path

from .measured import TARGET, Results


def plot(results: Results, path: Path) -> None:
    """Two panels: time against size, and over the kinds of keys."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure_, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    names = ["polars", "np.searchsorted", "hash table", "sort + searchsorted", "doraemon", "position known"]
    rows = results.of("lookups_batches", keys="uniform", queries="uniform")
    for name in names:
        points = [(row["n"], *row["ns"][name]) for row in rows if name in row["ns"]]
        n, low, middle, high = zip(*points, strict=True)
        line = left.plot(n, middle, marker="o", label=name, linewidth=2.5 if name == "doraemon" else 1.2)[0]
        left.fill_between(n, low, high, color=line.get_color(), alpha=0.2)
    left.set(
        xscale="log", yscale="log", xlabel="keys", ylabel="ns per query", title="uniform keys and queries, batches"
    )
    left.set_ylim(4, 20_000)
    left.legend(fontsize=8, ncols=2, loc="upper left")
    width = 0.25
    for at, name in enumerate(("np.searchsorted", "sort + searchsorted", "doraemon")):
        found = results.of("lookups_batches", n=TARGET, queries="uniform")
        places = [place + (at - 1) * width for place in range(len(found))]
        right.bar(places, [row["ns"][name][1] for row in found], width, label=name)
    right.set(yscale="log", ylabel="ns per query", title="4M keys, uniform queries, batches")
    right.set_xticks(range(len(found)), [row["keys"] for row in found])
    right.set_ylim(10, 2_000)
    right.legend(fontsize=8, ncols=3, loc="upper center")
    figure_.tight_layout()
    figure_.savefig(path, dpi=110)
    pyplot.close(figure_)
