"""Make docs/results.md, its pictures and the README's table out of measured results. No figure is typed by hand.

    python benchmarks/results.py [--compare DIR] [--ablation-file FILE]

`DIR` is the output of `tardis compare`, of which compare.json and table.csv are read; `FILE` that of
`benchmarks/ablation.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from sections.choices import ablation_tables, plot_calibration
from sections.comparison import Compared, against_masks, against_quantisers, compared_table, zero_shot
from sections.equal import equal_parts, equal_readme_part
from sections.llama import llama_parts
from sections.markdown import table
from sections.real import real_part, real_readme_part
from sections.speed import MODELS, SPEED, Speed, kernels_part, models_part, packed_part, prefill_part, speed_sentence
from tardis_llm.evaluation.curves import plot_curves

ROOT = Path(__file__).parent.parent
COMPARE, ABLATION = ROOT / "benchmarks/results/compare", ROOT / "benchmarks/results/ablation.json"
SPEEDS = ROOT / "benchmarks/results"
#: a run of real_models.py each: the first is today's, and in the README; others are of other versions, or other tokens
REAL = [SPEEDS / f"real_models{which}.json" for which in ("_amd", "", "_65536", "_half")]
PAGE, README, IMAGES = ROOT / "docs/results.md", ROOT / "README.md", ROOT / "docs/images"
BEGIN, END = "<!-- results: made by benchmarks/results.py -->", "<!-- end of results -->"
HEAD = """# Results

Every figure on this page is measured, and the page is made by a script:

    tardis compare MODEL -o benchmarks/results/compare --text FILE... --eval-text FILE --tasks {tasks} --task-data DIR
    python benchmarks/ablation.py MODEL --wikipedia FILE... --novels FILE... --evaluation FILE --lambada FILE
    python benchmarks/packed.py MODEL --text FILE... --evaluation FILE
    python benchmarks/prefill.py MODEL --text FILE... --evaluation FILE
    python benchmarks/ffn_kernels.py --batch 1,8 --output benchmarks/results/kernels-1.json
    tardis bench --shape falcon-7b ... [--compile] --json
    python benchmarks/real_models.py
    python benchmarks/equal_quality.py quality SUBJECT, and then speed SUBJECT
    python benchmarks/llama_cpp.py --shape falcon-7b ... --output benchmarks/results/llama_cpp_NAME.json
    python benchmarks/results.py

`benchmarks/everything.sh` lists these commands in full, with how long each of them takes.

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
                *equal_parts(SPEEDS),
                *llama_parts(SPEEDS),
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


def readme_part(compared: Compared, speed: Speed, real: dict[str, Any]) -> str:
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
            *equal_readme_part(SPEEDS, "qwen2.5-coder-0.5b"),
            real_readme_part(real),
            f"{model['name']} in {model['dtype']}, {evaluation['tokens']:,} tokens of {evaluation['file']} in windows "
            f"of {evaluation['window']}: token perplexity {compared.rows[0].perplexity:.2f} dense. Reduction: share of "
            "the dense FFN bytes that a token no longer reads, everything counted. In memory: FFN bytes, as a share of "
            "the dense ones.",
            table(["FFNs", "reduction", "perplexity", "/ dense", "in memory"], lines),
            speed_sentence(speed.models),
        ]
    )


def replace_part(text: str, part: str) -> str:
    """The text with what is between `BEGIN` and `END` replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


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
    readme = replace_part(README.read_text(encoding="utf-8"), readme_part(compared, speed, real[0]))
    README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
