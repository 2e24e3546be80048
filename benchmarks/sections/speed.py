"""Speed: the output of `packed.py`, `prefill.py`, `ffn_kernels.py` and `tardis bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sections.markdown import spread, table

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
in both. The table has the later run.

The "1.6 times over int4" was won against linear layers in NF4 by bitsandbytes, and with 5 % fixed, a share that was
chosen. What int4 by our own kernels and llama.cpp do is [above](#beside-llamacpp)."""


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
            spread(row["ratio"], *row["ratio_quartiles"]),
            spread(row["ratio_to_rows"], *row["ratio_to_rows_quartiles"]),
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
            "" if row["variant"] == "folded" else spread(*row["folded_speed_up"].values()),
            f"{row['step_bytes'] / 2**20:,.0f}",
            f"{row['bytes_per_second'] / 1e9:.1f}",
        ]
        for label, run in models.items()
        for row in run["rows"]
    ]
    head = ["model and fold", "batch", "", "tokens/s", "the fold is faster by", "MiB per step", "GB/s"]
    return table(head, lines)
