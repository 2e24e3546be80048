"""A hot range that moves."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from .measured import KEYS, Results, Row, Section
from .tables import figure, millions, table, times

MOVING = """90 % of the queries in 10 % of the keys, which move by 2 % of the keys from position to position; 10
positions after the first, each of which the index sees in a million queries. "Following" then calls `adapt()`, whose
time is beside it (least and most in brackets); "left behind" adapted to the first position only. Medians over the
positions."""


def moving(results: Results) -> str:
    cases = sorted(
        {(row["keys"], row["n"]) for row in results.rows["lookups_moving"]}, key=lambda c: (KEYS.index(c[0]), c[1])
    )
    rows = []
    for keys, n in cases:
        found = results.of("lookups_moving", keys=keys, n=n)
        after = [row for row in found if row["position"] > 0]

        def middle(part: str, name: str, after: list[Row] = after) -> float:
            return median(row[part][name][1] for row in after)

        cells = [figure(middle("ns", name)) for name in ("following", "left behind", "never adapted")]
        cells += [times([middle("ratio", name)] * 3) for name in ("np.searchsorted", "sort + searchsorted")]
        adapting = sorted(row["adapt ms"] for row in after)
        cells.append(f"{figure(median(adapting))} ({figure(adapting[0])} to {figure(adapting[-1])})")
        rows.append([keys, millions(n), *cells])
    names = ["keys", "n", "ns, following", "ns, left behind", "ns, never adapted"]
    return table([*names, "following over np.searchsorted", "over sort + searchsorted", "ms of adapt()"], rows)


def vain_adapting(results: Results) -> Iterator[str]:
    """What following the queries gained, which is little."""
    for keys, n in sorted({(row["keys"], row["n"]) for row in results.rows["lookups_moving"]}):
        after = [row for row in results.of("lookups_moving", keys=keys, n=n) if row["position"] > 0]
        following, never = (median(row["ns"][name][1] for row in after) for name in ("following", "never adapted"))
        change = round(100 * (following / never - 1))
        said = f"{abs(change)} % {'slower' if change > 0 else 'faster'} than" if change else "as fast as"
        yield f"`adapt()` while a hot range moves over {keys} keys, {millions(n)}: lookups {said} never adapted."


SECTIONS = [Section("A hot range that moves", MOVING, moving, "lookups_moving")]
