"""The page of results, docs/doraemon.md, its picture, and the targets in doraemon/README.md: made of the kept results.

    python benchmarks/doraemon/results.py

The picture needs matplotlib, the page nothing.
"""

from __future__ import annotations

from functools import reduce

from pages import changes, lookups, losses, moving, paper, processors, single, skew, targets, texts, threads
from pages.measured import RESULTS, ROOT, Results, by_processor
from pages.picture import plot

PAGE = ROOT / "docs" / "doraemon.md"
README = ROOT / "doraemon" / "README.md"
BEGIN, END = "<!-- results: made by benchmarks/doraemon/results.py -->", "<!-- end of results -->"
PICTURE = ROOT / "docs" / "images" / "doraemon.png"
#: in the order of the page
PARTS = [targets, lookups, texts, threads, skew, moving, changes, single, paper, losses]


def page(all_results: list[Results]) -> str:
    """The whole page: what the first processor measured, the others where it measured nothing, and all side by side."""
    results = reduce(Results.or_else, all_results)
    return sections_of(results) + side_by_side(all_results)


def side_by_side(all_results: list[Results]) -> str:
    """The section on all processors, none of one alone."""
    if len(all_results) == 1:
        return ""
    return f"\n## By processor\n\n{processors.PROCESSORS}\n\n{processors.processors(all_results)}\n"


def sections_of(results: Results) -> str:
    """The head of the page and its sections, without those of which nothing was measured."""
    head = HEAD.format(**results.machine)
    sections = [section for part in PARTS for section in part.SECTIONS if section.is_measured(results)]
    parts = [
        f"\n## {section.title}\n\n{section.text}{elsewhere(results, section.part)}\n\n{section.make(results)}"
        for section in sections
    ]
    return head + "\n".join(parts) + "\n"


def elsewhere(results: Results, part: str) -> str:
    """The machine that a part was measured on, if it is not the page's."""
    machine = results.machines[part]
    if machine == results.machine:
        return ""
    return f"\nOn {machine['processor']}; Python {machine['python']}, NumPy {machine['numpy']}."


HEAD = """# Doraemon, measured

Made by `benchmarks/doraemon/results.py` of the files in `benchmarks/results/doraemon`; no figure is typed by hand.
{processor}; Python {python}, NumPy {numpy}, one thread.
A section that names another processor was measured on that. What is compared takes turns in one process. Times are the
process's on the processor, so that other programs' turns are not counted. Percentiles, and the sections on texts,
threads, and skew in batches and one by one, are of the world's clock. Figures are medians over rounds, with quartiles
in brackets, and ratios are medians of the ratios of each round: 3x is "a third of the time", and a **bold** ratio is
below 1, where the other is faster.

    pip install -e 'doraemon[dev]' sortedcontainers BTrees pygm polars duckdb matplotlib
    python benchmarks/doraemon/lookups.py batches    # also: single, moving; --keys, --queries, --n, --text choose cases
    python benchmarks/doraemon/changes.py building   # also: adapting, writing
    python benchmarks/doraemon/single.py ycsb        # also: inserts
    python benchmarks/doraemon/skew.py batches       # also: single, moving
    python benchmarks/doraemon/threads.py            # needs two cores
    python benchmarks/doraemon/paper.py latency      # also: retraining
    python benchmarks/doraemon/texts.py --text FILE...
    python benchmarks/doraemon/results.py

![Nanoseconds per query against the number of keys, and over the kinds of keys](images/doraemon.png)

Keys: uniform over uint64, normal and lognormal, as in [SOSD](https://arxiv.org/abs/1911.13014), and synthetic
stand-ins for its cells of OpenStreetMap ("osm") and its users of Facebook ("facebook"), of which
`benchmarks/doraemon/sosd.py` says what they imitate; a multiplicative cascade, dense in dense parts at every scale; the
first 8 bytes at each word of a text; the words' positions in it. Queries for keys that are there: uniform over them;
90 % of them in 10 % of the keys, 99 % in 1 %; zipf of exponent 1.1, scattered.
"""


def readme_part(results: Results) -> str:
    """The targets, for the package's own page."""
    machine = results.machine
    software = f"Python {machine['python']}, NumPy {machine['numpy']}"
    head = f"One thread of {machine['processor']}; {software}; medians and quartiles."
    return f"{head}\n\n{targets.targets(results)}"


def replace_part(text: str, part: str) -> str:
    """The text with this between the two marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    all_results = by_processor(RESULTS)
    PAGE.write_text(page(all_results), encoding="utf-8")
    README.write_text(replace_part(README.read_text(encoding="utf-8"), readme_part(all_results[0])), encoding="utf-8")
    plot(all_results[0], PICTURE)
    print(f"made {PAGE}, {PICTURE} and a part of {README}")


if __name__ == "__main__":
    main()
