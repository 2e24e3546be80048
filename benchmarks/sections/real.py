"""What compressing real models costs: the output of `benchmarks/real_models.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sections.markdown import table

_TEXTS = ("wikitext2", "lambada", "code")


def real_part(runs: Sequence[dict[str, Any]]) -> str:
    """What compressing real models costs, on text like that of the calibration and on code."""
    settings, machine = runs[0]["settings"], runs[0]["machine"]
    parts = [
        f"Increase of the loss in nats per token over the dense model, whose perplexity is in the first row; "
        f"{settings['tokens']:,} tokens of each text in windows of {settings['window']}, bf16 models out of Q4_K_M "
        f"files. Calibrated on {settings['calibration']:,} tokens of Wikipedia and novels, and no code. The FFNs alone "
        "are compressed, everything counted; groups of 128. Folds have the same fix rate in every layer, a 2-bit "
        "predictor, 3 bits beside it, and fold and W2 in 4 bits. `+affine+refit+weigh` are our own tricks lent to "
        f"GPTQ: it is calibrated as folds are. On an {machine['cpu']}{_noted(runs[0])}, by `benchmarks/real_models.py`."
    ]
    for run in runs:
        if run is not runs[0]:
            parts.append(_calibrated_on(run))
        for model, found in run["models"].items():
            parts.append(real_table(model, found["methods"], _tasks_of(found["methods"])))
    return "\n\n".join(parts)


def _calibrated_on(run: dict[str, Any]) -> str:
    return f"Calibrated on {run['settings']['calibration']:,} tokens, on an {run['machine']['cpu']}{_noted(run)}:"


def _noted(run: dict[str, Any]) -> str:
    """What tells a run from others of another version, if a person wrote it into its file."""
    return f", {run['note']}" if "note" in run else ""


def real_readme_part(run: dict[str, Any]) -> str:
    """The README's table: the first model of a run."""
    settings = run["settings"]
    model, found = next(iter(run["models"].items()))
    return (
        f"{model}, FFNs alone compressed: share of their bytes that a token reads, everything counted, and increase of "
        "the loss in nats per token over the dense model, whose perplexity is in the first row; "
        f"{settings['tokens']:,} tokens of each text. Calibrated on {settings['calibration']:,} tokens of prose, and "
        "no code. [More](docs/results.md#real-models).\n\n" + real_table("FFNs", found["methods"], [])
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
