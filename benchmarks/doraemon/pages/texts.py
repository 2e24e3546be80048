"""Keys that are str."""

from __future__ import annotations

from .measured import Results, Section
from .tables import spread, table, times

TEXTS = """Keys that are str, and 200,000 queries at once for keys that are there. `bisect` is asked, as we are, with a
list of str; pandas, whose `get_indexer` hashes and knows no order, and polars with columns of their own, beside which
ours is asked with an Arrow column. "Bytes held" are those of keys, codes and what finds them."""


def texts(results: Results) -> str:
    rivals = ["bisect on a list", "pandas, str", "pandas, objects", "polars"]
    rows = []
    for row in results.rows["texts"]:
        cells = [row["keys"], f"{row['n']:,}", f"{row['bytes per text']:.0f}", f"{row['held']:.0f}"]
        cells += [spread(row["ns"][name]) for name in ("doraemon", "doraemon, Arrow")]
        cells.append(times(row["ratio"]["bisect on a list"]))
        cells += [times(row["ratio, Arrow"][name]) for name in rivals[1:]]
        rows.append([*cells, spread(row["single ns"]["doraemon"]), times(row["single ratio"]["bisect on a list"])])
    names = ["keys", "n", "bytes per key", "bytes held", "ns, ours, of a list", "ns, ours, of Arrow"]
    names += [f"over {name}" for name in rivals]
    return table([*names, "ns, one by one", "over bisect, one by one"], rows)


SECTIONS = [Section("Texts", TEXTS, texts, "texts")]
