"""Make docs/results.md, its pictures and the README's table out of measured results. No figure is typed by hand.

    python benchmarks/results.py [--compare DIR] [--ablation-file FILE]

`DIR` is the output of `tardis compare`, of which compare.json and table.csv are read; `FILE` that of
`benchmarks/ablation.py`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

import ablation
from tardis_llm.evaluation.curves import plot_curves
from tardis_llm.evaluation.methods import Method
from tardis_llm.evaluation.plots import STYLE
from tardis_llm.evaluation.rows import FIGURES, Row
from tardis_llm.evaluation.tasks import Metric

ROOT = Path(__file__).parent.parent
COMPARE, ABLATION = ROOT / "benchmarks/results/compare", ROOT / "benchmarks/results/ablation.json"
SPEEDS = ROOT / "benchmarks/results"
#: a run of real_models.py each, the one with most methods first; others have other calibration tokens
REAL = [SPEEDS / "real_models.json", SPEEDS / "real_models_65536.json"]
_TEXTS = ("wikitext2", "lambada", "code")
PAGE, README, IMAGES = ROOT / "docs/results.md", ROOT / "README.md", ROOT / "docs/images"
_RANGE = (0.085, 0.275)  # of the dense bytes: from the smallest fold to the largest 4-bit quantiser
BEGIN, END = "<!-- results: made by benchmarks/results.py -->", "<!-- end of results -->"

BENCHES = {
    "bench-1-falcon-7b-bf16.json": "Falcon-7B, fold and fallback in bf16",
    "bench-1-falcon-7b-bf16-compiled.json": "Falcon-7B in bf16, steps compiled",
    "bench-2-falcon-7b-int4.json": "Falcon-7B, 16 layers, fold, fallback, attention and head in int4",
    "bench-2-falcon-7b-int4-compiled.json": "Falcon-7B, 16 layers in int4, steps compiled",
}

SPEED = """Weights that are read whole lie in panels, 32 outputs side by side. Those of the dense FFN do, too: our
dense kernel then reads at the pace of memory for up to a dozen tokens at once, and only fewer bytes can beat it. The
fold reads 4.2 times fewer in bf16, and 7.3 times fewer stacked.

The targets were 4 times as fast in bf16, and 6 times stacked. Over the kernel that reads row by row, both are met.
Over panels 4 times is not met, and 6 times depends on the machine: two threads read 48 GB/s in some minutes and 71 in
others, and a run an hour before this one, at 48, had 3.9 and 6.2 times at batch 1. For 4 times, the fold would have
to read at 95 % of the dense kernel's pace. Predictor and fold do; but on one thread, in a loop that does nothing
else, rows of W1 from all over are read at 0.9 of that pace, and rows of W2, which are added to sums, at 0.8.

At batch 8 the tokens together fix a third of the neurons, while eight tokens cost the dense FFN hardly more than one.
All kernels are called as folded layers call them, with arguments that are put together once. The machine is shared,
and its read bandwidth is measured once per run: trust the ratios, which are of neighbouring runs, more than the
shares of the bandwidth."""

MODELS = """The models have random weights, in the published shapes. Their folds are random, too, with ranges that 5 %
of the neurons leave. `dense` is the model as it is in transformers; `kernels` is the dense model with every linear
layer through our own bf16 kernel. Two threads, all weights in huge pages.

Variants share the weights that they have in common. These therefore lie row by row, as they are stored: all of
`kernels`, and attention and head of the folded model. Its folds and predictors lie in panels. (`tardis generate` puts
everything in panels; 24 GiB hold no second copy of these models.) The int4 comparison has 16 of the 32 layers,
because both forms, and the weights that they are made of, do not fit 24 GiB together.

Attention, the head, and what transformers does between the layers are the same in both, and bound the ratio. The
dense model reads 2.4 times the bytes of the folded one; what takes time without reading weighs more beside fewer
bytes, so the folded model's GB/s are lower. Compiled steps (`--compile`, for every variant) spend less time so: 11
and 15 ms per token of the folded model, where eager mode spent 16 and 21, in two rounds with a clock around the
kernels.

In some minutes torch's products are slower on this machine while memory is faster. Of two runs of the first model,
half an hour apart, the folded one was 3.9 and 3.1 times as fast as transformers, and 2.3 times as fast as our kernels
in both. The table has the later run."""

HEAD = """# Results

Every figure on this page is measured, and the page is made by a script:

    tardis compare MODEL -o benchmarks/results/compare --text FILE... --eval-text FILE --tasks {tasks} --task-data DIR
    python benchmarks/ablation.py MODEL --wikipedia FILE... --novels FILE... --evaluation FILE --lambada FILE
    python benchmarks/packed.py MODEL --text FILE... --evaluation FILE
    python benchmarks/prefill.py MODEL --text FILE... --evaluation FILE
    python benchmarks/ffn_kernels.py --batch 1,8 --output benchmarks/results/kernels-1.json
    tardis bench --shape falcon-7b ... [--compile] --json
    python benchmarks/real_models.py
    python benchmarks/results.py

[Real models](#real-models) come first. All other figures of accuracy are of a model that is small and
undertrained: they compare methods with each other, and say nothing of what a model of billions of parameters would
lose.

## Real models

{real}

## Methods side by side

{title}

| column | meaning |
|---|---|
| `perplexity` | on the evaluation text |
| `/ dense` | ratio to the perplexity of the dense model, with the standard error paired by window |
| `touched` | bytes of {scope} read for a token at batch 1, as a share of the dense model's in {dtype} |
| `resident` | bytes of {scope} kept in memory, as the same share |
| `fixed` | share of the neurons corrected per token |

Mask indices (a bitmap), scales, zero points, ranges, lines and biases are counted. The number behind @ is the
reduction: for folds the share of bytes no longer read, for masks the share of weights that are zero. `tardis-paper`
is nearest to the published method: coverage ranges, no refit, 2-bit predictor. `tardis-int8` and `tardis-int4` are
stacked with quantisation: fold and fallback weights in 8 or 4 bits, of which the predictor's bits are the highest.
They are stored in few bits, and written out before each product.

![Perplexity and accuracy against bytes](images/compare.png)
"""


def read_table(path: Path, tasks: Sequence[str]) -> list[Row]:
    """Read the rows that `write_table` wrote, given the names of the tasks."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(record, tasks) for record in csv.DictReader(file)]


def _row(values: Mapping[str, str], tasks: Sequence[str]) -> Row:
    known = {name: value for name, value in values.items() if value}

    def metrics(suffix: str) -> dict[str, Metric]:
        names = {task: task + suffix for task in tasks if task in known}
        return {task: Metric(float(known[name]), float(known[f"{name}_error"])) for task, name in names.items()}

    return Row(
        method=Method(known["method"], float(known["reduction"]) if "reduction" in known else None),
        infeasible=known.get("infeasible"),
        scores=metrics(""),
        changes=metrics("_change"),
        **{name: float(known[name]) for name in (*FIGURES, "fix_rate", "seconds") if name in known},
    )


@dataclass(frozen=True)
class Compared:
    """A comparison as its directory has it.

    Attributes:
        record: compare.json.
        rows: of table.csv, the dense model first.
    """

    record: dict[str, Any]
    rows: list[Row]

    @classmethod
    def read(cls, directory: Path) -> Compared:
        """From the directory."""
        record = json.loads((directory / "compare.json").read_text())
        return cls(record, read_table(directory / "table.csv", list(record["tasks"]["items"])))

    @property
    def title(self) -> str:
        """Model, data and versions."""
        record, software, machine = self.record, self.record["software"], self.record["machine"]
        evaluation, calibration = record["evaluation"], record["calibration"]
        named: list[str] = calibration["files"]
        files = named[0] if len(named) == 1 else f"{len(named)} files, {named[0]} to {named[-1]}"
        items = (f"{name} ({'all' if n is None else f'{n:,}'} items)" for name, n in record["tasks"]["items"].items())
        return (
            f"{record['model']['name']} in {record['model']['dtype']}; token perplexity on {evaluation['file']}, "
            f"{evaluation['tokens']:,} tokens in windows of {evaluation['window']}, evenly spread; zero-shot "
            f"{', '.join(items)} by lm-eval; {calibration['tokens']:,} + {calibration['heldout_tokens']:,} calibration "
            f"tokens of {files}; torch {software['torch']}, transformers "
            f"{software['transformers']}; {machine['cpu']}, threads: {machine['threads']}."
        )

    def find(self, label: str) -> Row:
        """The row of a method."""
        return next(row for row in self.rows if row.method.label == label)

    def of(self, *names: str) -> list[Row]:
        """The rows of methods whose names begin so, by rising bytes touched."""
        found = (row for row in self.rows if row.method.name.startswith(names) and not row.infeasible)
        return sorted(found, key=lambda row: row.touched)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def compared_table(compared: Compared) -> str:
    """Every method."""
    tasks = list(compared.record["tasks"]["items"])
    head = [*compared.rows[0].shown(), *(f"{task}, %" for task in tasks)]
    lines = []
    for row in compared.rows:
        cells = [*row.shown().values(), *(row.scores[task].percent() for task in tasks if row.scores)]
        lines.append([*cells, *[""] * (len(head) - len(cells))])
    return table(head, lines)


def real_part(runs: Sequence[dict[str, Any]]) -> str:
    """What compressing real models costs, on text like that of the calibration and on code."""
    settings, machine = runs[0]["settings"], runs[0]["machine"]
    parts = [
        f"Increase of the loss in nats per token over the dense model, whose perplexity is in the first row; "
        f"{settings['tokens']:,} tokens of each text in windows of {settings['window']}, bf16 models out of Q4_K_M "
        f"files. Calibrated on {settings['calibration']:,} tokens of Wikipedia and novels, and no code. The FFNs alone "
        "are compressed, everything counted; groups of 128. Folds have the same fix rate in every layer, a 2-bit "
        "predictor, 3 bits beside it, and fold and W2 in 4 bits. `+affine+refit+weigh` are our own tricks lent to "
        f"GPTQ: it is calibrated as folds are. On an {machine['cpu']}, by `benchmarks/real_models.py`."
    ]
    for run in runs:
        if run is not runs[0]:
            parts.append(_calibrated_on(run))
        for model, found in run["models"].items():
            parts.append(real_table(model, found["methods"], _tasks_of(found["methods"])))
    return "\n\n".join(parts)


def _calibrated_on(run: dict[str, Any]) -> str:
    return f"Calibrated on {run['settings']['calibration']:,} tokens, all else the same:"


def real_readme_part(runs: Sequence[dict[str, Any]]) -> str:
    """The README's tables of the first real model."""
    real, *others = runs
    model, found = next(iter(real["models"].items()))
    tables = [real_table("FFNs", found["methods"], [])]
    for run in others:
        tables += [_calibrated_on(run), real_table("FFNs", run["models"][model]["methods"], [])]
    return (
        f"{model}, FFNs alone compressed: share of their bytes that a token reads, everything counted, and increase of "
        f"the loss in nats per token ({real['settings']['tokens']:,} tokens each; the dense perplexity in the first "
        "row). Calibration text is prose, no code. Measured before weights were rounded as they are now. "
        "[More models](docs/results.md#real-models).\n\n" + "\n\n".join(tables)
    )


def real_table(title: str, methods: Mapping[str, dict[str, Any]], tasks: Sequence[str]) -> str:
    """Every method on one model, by the bytes that it touches."""
    lines = [
        [_real_name(label), f"{row['touched']:.1%}"]
        + [_increase(row, methods["dense"], text) for text in _TEXTS]
        + [f"{row['tasks'][task]['value']:.1%}" if "tasks" in row else "" for task in tasks]
        for label, row in sorted(methods.items(), key=lambda pair: -pair[1]["touched"])
    ]
    return table([title, "touched", *_TEXTS, *tasks], lines)


def _tasks_of(methods: Mapping[str, dict[str, Any]]) -> list[str]:
    """The tasks that any method was judged by."""
    return list(dict.fromkeys(task for row in methods.values() for task in row.get("tasks", {})))


def _real_name(label: str) -> str:
    name, _, _ = label.partition("@")
    return f"**{name}**" if name.startswith("tardis") else name.replace("-g128", "")


def _increase(row: dict[str, Any], dense: dict[str, Any], text: str) -> str:
    """Nats over the dense model; of that itself, its perplexity."""
    value, base = row[text]["value"], dense[text]["value"]
    return f"{base:.2f}" if row is dense else f"{math.log(value / base):+.3f}"


def against_masks(compared: Compared) -> str:
    """What folding in the model's dtype loses, beside masks at the same reduction."""
    names = ("sparsegpt", "owl-sparsegpt", "wanda", "owl-wanda", "ria", "magnitude")
    lines = []
    for fold in compared.of("tardis"):
        if fold.method.name != "tardis":
            continue
        masks = [compared.find(f"{name}@{fold.method.reduction:g}") for name in names]
        losses = (f"{(mask.ratio - 1) / (fold.ratio - 1):.1f}x ({mask.touched:.0%})" for mask in masks)
        lines.append([f"{fold.method.reduction:g}", fold.shown_ratio(), f"{fold.touched:.1%}", *losses])
    head = ["reduction", "TARDIS, / dense", "touched", *names]
    return "\n\n".join(
        [
            "What each mask adds to the perplexity, as a multiple of what TARDIS in bf16 adds at the same reduction. "
            "In brackets are the bytes that the mask touches. They are more, as its index is read, too.",
            table(head, lines),
        ]
    )


def against_quantisers(compared: Compared) -> str:
    """At the bytes of each quantiser, the best fold that touches no more."""
    folds = [row for row in compared.of("tardis") if row.method.name != "tardis-paper"]
    lines = []
    wins = within_range = wins_there = 0
    rivals = compared.of("gptq", "rtn", "affine")
    for rival in rivals:
        its = [rival.method.label, f"{rival.touched:.1%}", rival.shown_ratio()]
        within = [fold for fold in folds if fold.touched <= rival.touched + 1e-4]
        if not within:
            lines.append([*its, "no fold so small", "", "", ""])
            continue
        best = min(within, key=lambda fold: fold.ratio)
        below = best.ratio < rival.ratio
        wins += below
        if _RANGE[0] <= rival.touched <= _RANGE[1]:
            within_range += 1
            wins_there += below
        own = [best.method.label, f"{best.touched:.1%}", best.shown_ratio(), "yes" if below else "**no**"]
        lines.append([*its, *own])
    head = [
        "method",
        "touched",
        "/ dense",
        "best fold in no more bytes",
        "its touched",
        "its / dense",
        "fold is better",
    ]
    return "\n\n".join(
        [
            "Quantisation is what people would use instead. Beside each quantiser stands the best fold that touches no "
            f"more bytes: it is better in {wins} of {len(rivals)} cases, and in {wins_there} of {within_range} between "
            f"{_RANGE[0]:.1%} and {_RANGE[1]:.1%} of the dense bytes. In memory, a stacked fold is larger than a "
            "quantised FFN that touches as many bytes: it keeps what it does not read.",
            table(head, lines),
        ]
    )


def zero_shot(compared: Compared) -> str:
    """Paired changes of accuracy against the dense model."""
    tasks = list(compared.record["tasks"]["items"])
    labels = [row for row in compared.rows if row.changes and row.method.reduction in (0.7, 0.8)]
    labels += [row for row in compared.rows if row.changes and row.method.reduction is None and row.ratio != 1]
    dense = compared.rows[0]
    lines = []
    for row in labels:
        changes = []
        for task in tasks:
            change, error = 100 * row.changes[task].value, 100 * row.changes[task].standard_error
            within = abs(row.changes[task].value) <= dense.scores[task].standard_error
            changes.append(f"{change:+.1f} ± {error:.1f}{'' if within else ' (!)'}")
        lines.append([row.method.label, *changes])
    errors = ", ".join(f"{task} {dense.scores[task].percent()}" for task in tasks)
    return "\n\n".join(
        [
            f"Zero-shot accuracy less the dense model's, in points, with the standard error paired by item; (!) where "
            f"the change is more than one standard error of the dense model's own accuracy. Dense: {errors}.",
            table(["method", *tasks], lines),
        ]
    )


def ablation_tables(results: dict[str, Any]) -> Iterator[str]:
    """One table per group."""
    groups: dict[str, list[ablation.Cell]] = {}
    for cell in ablation.cells():
        groups.setdefault(cell.group, []).append(cell)
    names = results["evaluations"]
    head = ["", *(f"/ dense on {name}" for name in names), "touched", "resident", "fixed", "predictor bits", "seconds"]
    for group, cells in groups.items():
        lines = []
        for cell in cells:
            found = results["cells"].get(cell.key)
            if found is None:
                continue
            ratios = (f"{found['ratio'][name]:.4f} ± {found['ratio_error'][name]:.4f}" for name in names)
            sizes = f"{found['touched']:.2%}", f"{found['resident']:.1%}", f"{found['fix_rate']:.2%}"
            bits = " ".join(map(str, found["bits"]))
            lines.append([cell.name, *ratios, *sizes, bits, f"{found['seconds']:.0f}"])
        if lines:
            yield f"### {group}\n\n{table(head, lines)}"


def plot_calibration(results: dict[str, Any], path: Path) -> None:
    """What more calibration text is worth."""
    cells = [cell for cell in ablation.cells() if cell.group.startswith("Calibration tokens")]
    found = [(cell.tokens, results["cells"][cell.key]) for cell in cells if cell.key in results["cells"]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, colour in zip(results["evaluations"], ("#0072B2", "#D55E00"), strict=True):
            y, errors = [f["ratio"][name] for _, f in found], [f["ratio_error"][name] for _, f in found]
            axes.errorbar([t for t, _ in found], y, yerr=errors, label=name, color=colour, marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks([t for t, _ in found])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:.0f}k"))
        axes.set_xlabel("calibration tokens")
        axes.set_ylabel("perplexity / dense")
        axes.set_title("bf16, reduction 0.78")
        axes.legend()
        figure.savefig(path, dpi=110)


def readme_part(compared: Compared, speed: Speed, real: Sequence[dict[str, Any]]) -> str:
    """The README's tables, and a sentence on speed."""
    wanted = {
        "dense": "dense",
        "gptq4-g128": "GPTQ, 4 bits",
        "tardis-int8@0.75": "TARDIS, int8",
        "gptq3-g128": "GPTQ, 3 bits",
        "tardis-int4@0.83": "TARDIS, int4",
        "gptq2-g128": "GPTQ, 2 bits",
        "tardis-int4@0.875": "TARDIS, int4",
        "tardis-int4@0.915": "TARDIS, int4",
        "tardis@0.78": "TARDIS, bf16",
        "tardis-paper@0.78": "fold as published, bf16",
        "sparsegpt@0.8": "SparseGPT, 80 % zeros",
    }
    found = sorted(((compared.find(label), name) for label, name in wanted.items()), key=lambda pair: -pair[0].touched)
    lines = [
        [name, f"{1 - row.touched:.1%}", f"{row.perplexity:.2f}", row.shown_ratio(), f"{row.resident:.1%}"]
        for row, name in found
    ]
    model, evaluation = compared.record["model"], compared.record["evaluation"]
    return "\n\n".join(
        [
            real_readme_part(real),
            f"{model['name']} in {model['dtype']}, {evaluation['tokens']:,} tokens of {evaluation['file']} in windows "
            f"of {evaluation['window']}: token perplexity {compared.rows[0].perplexity:.2f} dense. Reduction: share of "
            "the dense FFN bytes that a token no longer reads, everything counted. In memory: FFN bytes, as a share of "
            "the dense ones.",
            table(["FFNs", "reduction", "perplexity", "/ dense", "in memory"], lines),
            speed_sentence(speed.models),
        ]
    )


def speed_sentence(models: Mapping[str, dict[str, Any]]) -> str:
    """How much faster the folds of `BENCHES` decode than each rival."""
    eager, _, stacked, _ = (models[label] for label in BENCHES.values())
    plain = {(row["batch"], row["variant"]): row["folded_speed_up"]["value"] for row in eager["rows"]}
    int4 = next(row["folded_speed_up"]["value"] for row in stacked["rows"] if row["variant"] == "int4")
    return (
        f"Decoding on {eager['threads']} cores of an {eager['cpu']}, a model of Falcon-7B's shape with random weights "
        f"in bf16, folded so that 5 % of the neurons are fixed, is {plain[1, 'dense']:.1f} times as fast as in "
        f"transformers at batch 1 and {plain[8, 'dense']:.1f} times at batch 8. The dense model through our own "
        f"kernels is a stronger rival: {plain[1, 'kernels']:.1f} and {plain[8, 'kernels']:.1f} times. With everything "
        f"in int4, the fold is {int4:.1f} times as fast as the dense model in int4 at batch 1. "
        "All this was measured before [steps ran whole](docs/linears.md#the-step-around-them)."
    )


def replace_part(text: str, part: str) -> str:
    """The text with what is between `BEGIN` and `END` replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def packed_part(packed: dict[str, Any]) -> str:
    """Stacked folds through the kernels, against the same rounding simulated."""
    lines = [
        [
            f"{1 - float(reduction):.1%}",
            f"{found['touched']:.2%}",
            f"{found['resident']:.1%}",
            f"{found['reference']:.3f}",
            f"{found['kernels']:.3f}",
            f"{found['ratio']:.5f} ± {found['ratio_error']:.5f}",
            f"{found['kernels'] / packed['dense']:.4f}",
        ]
        for reduction, found in packed["folds"].items()
    ]
    head = ["budget", "touched", "resident", "simulated", "packed, by kernels", "kernels / simulated", "/ dense"]
    return (
        f"{packed['title']}; dense {packed['dense']:.2f}. The folds are stored in int4 (`--fold-dtype int4 --fallback "
        "int4`), saved, loaded, and run once through the readable reference, which writes the weights out and "
        f"multiplies by torch, and once through the {packed['machine']['isa']} kernels, which read the packed bits, "
        "folds and predictors in panels. "
        f"By `benchmarks/packed.py`.\n\n{table(head, lines)}"
    )


def prefill_part(prefill: dict[str, Any]) -> str:
    """What dense prompts change, and what they cost."""
    lines = [
        [
            f"{1 - float(reduction):.1%}",
            *(f"{found[mode]['ratio']:.4f} ± {found[mode]['error']:.4f}" for mode in ("exact", "folded")),
            f"{found['folded']['seconds'] / found['exact']['seconds']:.2f}",
        ]
        for reduction, found in prefill["folds"].items()
    ]
    head = ["budget", "/ dense behind exact prompts", "/ dense behind folded prompts", "seconds, folded / exact"]
    return (
        f"{prefill['title']} in windows of {prefill['window']}. The first half of a window is the prompt, the second, "
        "always folded, is judged. The prompts' times were taken once, one prompt at a time, on one thread. By "
        "`benchmarks/prefill.py`.\n\n" + table(head, lines)
    )


def kernels_part(kernels: Sequence[dict[str, Any]]) -> str:
    """One FFN, folded and dense."""
    lines = [
        [
            str(run["machine"]["threads"]),
            str(row["batch"]),
            row["variant"],
            f"{row['ms']:.2f}",
            _spread(row["ratio"], *row["ratio_quartiles"]),
            _spread(row["ratio_to_rows"], *row["ratio_to_rows_quartiles"]),
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['of_bandwidth']:.0%}",
        ]
        for run in kernels
        for row in run["rows"]
    ]
    first = kernels[0]
    head = ["threads", "batch", "", "ms", "faster than our dense kernel", "than the same row by row"]
    head += ["MB read", "GB/s", "of the read bandwidth"]
    return (
        f"d = {first['settings']['d']}, h = {first['settings']['h']}, {first['settings']['bits']}-bit predictor, "
        f"{first['settings']['fix_rate']:.0%} fixed, bfloat16; {first['machine']['cpu']}. Median of "
        f"{first['settings']['rounds']} rounds in which the variants take turns, ratios with their quartiles. By "
        "`benchmarks/ffn_kernels.py`.\n\n" + table(head, lines)
    )


def models_part(models: Mapping[str, dict[str, Any]]) -> str:
    """Whole models, folded and dense."""
    lines = [
        [
            label,
            str(row["batch"]),
            row["variant"],
            f"{row['tokens_per_second']:.2f}",
            "" if row["variant"] == "folded" else _spread(*row["folded_speed_up"].values()),
            f"{row['step_bytes'] / 2**20:,.0f}",
            f"{row['bytes_per_second'] / 1e9:.1f}",
        ]
        for label, run in models.items()
        for row in run["rows"]
    ]
    head = ["model and fold", "batch", "", "tokens/s", "the fold is faster by", "MiB per step", "GB/s"]
    return table(head, lines)


def _spread(value: float, low: float, high: float) -> str:
    return f"{value:.2f} [{low:.2f}-{high:.2f}]"


@dataclass(frozen=True)
class Speed:
    """What was measured of speed.

    Attributes:
        packed: by `packed.py`.
        prefill: by `prefill.py`.
        kernels: runs of `ffn_kernels.py`.
        models: runs of `tardis bench --json`, by what was run.
    """

    packed: dict[str, Any]
    prefill: dict[str, Any]
    kernels: list[dict[str, Any]]
    models: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Speed:
        """From the folder that the scripts write to."""

        def load(name: str) -> dict[str, Any]:
            found: dict[str, Any] = json.loads((folder / name).read_text())
            return found

        kernels = [load(path.name) for path in sorted(folder.glob("kernels-*.json"))]
        return cls(
            load("packed.json"), load("prefill.json"), kernels, {label: load(name) for name, label in BENCHES.items()}
        )


def page(compared: Compared, results: dict[str, Any], speed: Speed, real: Sequence[dict[str, Any]]) -> str:
    """docs/results.md."""
    record = compared.record
    scope = {"ffn": "the FFNs", "all": "all linear layers of the blocks"}[record["scope"]]
    tasks = ",".join(f"{name}:{n}" if n else name for name, n in record["tasks"]["items"].items())
    about = {"title": compared.title, "dtype": record["model"]["dtype"], "real": real_part(real)}
    head = HEAD.format(tasks=tasks, scope=scope, **about)
    return (
        "\n\n".join(
            [
                head.rstrip(),
                compared_table(compared),
                "## Against masks",
                against_masks(compared),
                "## Against quantisation",
                against_quantisers(compared),
                "## Zero-shot",
                zero_shot(compared),
                "## Packed, and through the kernels",
                packed_part(speed.packed),
                "## Prompts, exact and folded",
                prefill_part(speed.prefill),
                "## Speed of one FFN of Falcon-7B's shape",
                kernels_part(speed.kernels),
                SPEED,
                "## Speed of whole models",
                MODELS,
                models_part(speed.models),
                "## What each choice is worth",
                f"{results['title']}. One setting changed at a time; every row a fold of its own, its ratio to dense "
                "with a standard error paired by window. Where nothing else is said: error ranges, refit, predictor "
                "bits chosen for each layer, 65,536 calibration tokens of both texts. The defaults of `FoldConfig` "
                "win, or are within a standard error of what wins, but for the text: twice as much of it is a little "
                "better and takes twice the time. Seconds were taken with one thread while other work ran.",
                "![Perplexity against calibration tokens](images/calibration.png)",
                *ablation_tables(results),
            ]
        )
        + "\n"
    )


def main(compare: Path = COMPARE, ablation_file: Path = ABLATION) -> None:
    """Write the page, the pictures and the README's part."""
    compared, results = Compared.read(compare), json.loads(ablation_file.read_text())
    IMAGES.mkdir(parents=True, exist_ok=True)
    model, evaluation = compared.record["model"]["name"], compared.record["evaluation"]
    plot_curves(
        compared.rows, IMAGES / "compare.png", f"{model}, {evaluation['tokens']:,} tokens of {evaluation['file']}"
    )
    plot_calibration(results, IMAGES / "calibration.png")
    speed = Speed.read(SPEEDS)
    real = [json.loads(path.read_text()) for path in REAL]
    PAGE.write_text(page(compared, results, speed, real), encoding="utf-8")
    readme = replace_part(README.read_text(encoding="utf-8"), readme_part(compared, speed, real))
    README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
