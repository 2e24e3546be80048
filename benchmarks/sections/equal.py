"""Decoding at equal quality: the output of `benchmarks/equal_quality.py`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sections.markdown import spread, table
from tardis_llm.evaluation.tasks import Metric, TaskScore
from tardis_llm.evaluation.turns import Ratio

DENSE, FOLD = "dense", "tardis"
QUALITY, TASKS, SPEED = "equal_quality_{}.json", "equal_tasks_{}.json", "equal_speed_{}_*.json"

ABOUT = """For each rival, the fold whose perplexity is no worse on a text, and of several such folds the fastest; the
ratio of their decoding speeds is that of neighbouring runs, with its quartiles. Nothing is chosen but the folds'
budgets. What is judged is what decodes: every linear layer is in few bits, attention and head included. `int4` and
`int3` are the model by our own kernels, rounded by GPTQ, the head in int4, which in `int4-head` and in folds since
format version 7 has a predictor (the one with 85% fewer bytes here); three bits are read from bit planes, not
from panels, so that `int3` is smaller than `int4` and slower. Files of llama.cpp are made by its own
quantiser, without an importance matrix, out of the same weights; `pure` has the head, too, in the type of the name.
Perplexities of files are of their weights written out and judged by us; those by llama.cpp's own logits stand beside.
Inputs of our linear layers had 16 bits; with 8, as now, int4 of Qwen2.5-Coder-0.5B loses 0.001 to 0.002 nats more.
By `benchmarks/equal_quality.py`."""

FROM_A_FILE = """The dense weights of the real models were written out of a Q4_K_M file. So that file loses nothing
against them, as no other form could: its row says how fast a fold is at no loss at all."""

K_TYPES = """llama.cpp's K types want rows of a multiple of 256 weights; these models' are 896 and 640 wide, and most of
what is called Q3_K_M or Q2_K is Q4_0. In Qwen2.5-Coder-0.5B's files the head has 8 bits."""

STAND_IN = """The sample is too small to be timed. In its place decodes Falcon-7B's shape with {layers} layers and
random weights; its random folds have the sample's fix rates, and predictors of the sample's mean bits, rounded up."""


def equal_parts(folder: Path) -> Iterator[str]:
    """The section, of the files that `equal_quality.py` wrote into a folder; nothing where there are none."""
    files = sorted(folder.glob(QUALITY.format("*")))
    if not files:
        return
    yield "## At equal quality"
    yield ABOUT
    entries = {name for file in files for name in _read(file)["entries"]}
    if "q4_k_m" in entries:
        yield FROM_A_FILE
    if {"q3_k_m", "q2_k"} & entries:
        yield K_TYPES
    for file in files:
        subject, quality = file.stem.removeprefix("equal_quality_"), _read(file)
        yield f"### {subject}"
        yield quality_table(quality)
        if (path := folder / TASKS.format(subject)).exists():
            yield tasks_table(_read(path))
        for path in sorted(folder.glob(SPEED.format(subject))):
            yield from speed_parts(quality["entries"], _read(path))


def equal_readme_part(folder: Path, subject: str) -> Iterator[str]:
    """The README's table: quality and speed of a real model, whole, by the first run that timed it."""
    quality = _read(folder / QUALITY.format(subject))
    speed = _read(sorted(folder.glob(SPEED.format(subject)))[0])
    entries, settings, seconds = quality["entries"], quality["settings"], speed["seconds"]
    texts = list(settings["tokens"])
    lines = [["dense, perplexity", *(f"{_perplexity(entries, DENSE, text):.2f}" for text in texts), ""]]
    for name in sorted(seconds, key=lambda name: statistics.median(seconds[name])):
        bold = "**" if name.startswith(FOLD) else ""
        increases = (f"{_increase(entries, name, text):+.3f}" for text in texts)
        lines.append([f"{bold}{_shown(name)}{bold}", *increases, _pace(speed, name)])
    yield (
        f"{subject}, whole, as it decodes: increase of the loss in nats per token, {settings['tokens'][texts[0]]:,} "
        f"tokens of each text, and tokens per second on {speed['threads']} threads of an {speed['cpu']}. "
        f"{_calibrated(settings)}. [More](docs/results.md#at-equal-quality)."
    )
    yield table(["", *texts, "tokens/s"], lines)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def quality_table(quality: dict[str, Any]) -> str:
    """Every entry by its perplexity on the first text, with the increase of the loss over the dense model in nats."""
    entries, settings = quality["entries"], quality["settings"]
    texts = list(settings["tokens"])
    lines = []
    for name in sorted(entries, key=lambda name: _perplexity(entries, name, texts[0])):
        found = entries[name]
        shares = [f"{found[key]:.1%}" if key in found else "" for key in ("kept", "fix_rate", "touched")]
        lines.append([_shown(name), *(_cell(entries, name, text) for text in texts), *shares])
    sizes = ", ".join(f"{text} {tokens:,}" for text, tokens in settings["tokens"].items())
    return (
        f"Perplexity, and in brackets the increase of the loss in nats per token; tokens judged: {sizes}, in windows "
        f"of {settings['window']}. {_calibrated(settings)}.\n\n"
        + table(["", *texts, "kept", "of the others fixed", "FFN bytes touched"], lines)
    )


def tasks_table(found: dict[str, Any]) -> str:
    """Accuracies of the dense model, and of every entry how much they are above or below, with the paired error."""
    entries, settings = found["entries"], found["settings"]
    scores = {name: {task: _score(task, some) for task, some in entry.items()} for name, entry in entries.items()}
    dense = scores.pop(DENSE)
    lines = [["dense, accuracy", *(Metric(score.value, score.standard_error).percent() for score in dense.values())]]
    for name, own in scores.items():
        cells = (_above(own[task], dense[task]) if task in own else "" for task in dense)
        lines.append([_shown(name), *cells])
    return (
        f"Zero-shot accuracy by lm-eval in per cent, and its change against the dense model in points, each with its "
        f"standard error, that of changes paired by item; {settings['items']:,} items of each task.\n\n"
        + table(["", *(f"{task}, {score.metric}" for task, score in dense.items())], lines)
    )


def _score(task: str, found: dict[str, Any]) -> TaskScore:
    correct = tuple(map(float, found["correct"]))
    return TaskScore(task, found["metric"], found["value"], found["standard_error"], found["items"], correct=correct)


def _above(score: TaskScore, dense: TaskScore) -> str:
    change, error = score.difference(dense)
    return f"{100 * change:+.1f} ± {100 * error:.1f}"


def _calibrated(settings: dict[str, Any]) -> str:
    text = f"Wikipedia, novels and {settings['code']:.0%} code" if settings["code"] else "Wikipedia and novels"
    return f"Calibrated on {settings['calibration']:,} tokens of {text}"


def _increase(entries: dict[str, Any], name: str, text: str) -> float:
    """Of the loss over the dense model, in nats."""
    return math.log(_perplexity(entries, name, text) / _perplexity(entries, DENSE, text))


def _cell(entries: dict[str, Any], name: str, text: str) -> str:
    value = _perplexity(entries, name, text)
    own = entries[name].get("own")
    beside = f"; own logits {own[text]['value']:.2f}" if own else ""
    return f"{value:.2f}" if name == DENSE else f"{value:.2f} ({_increase(entries, name, text):+.3f}{beside})"


def speed_parts(entries: dict[str, Any], speed: dict[str, Any]) -> Iterator[str]:
    """For each rival how much faster the fold is that is no worse, by the text that it is no worse on."""
    texts = list(entries[DENSE]["perplexity"])
    seconds = speed["seconds"]
    yield (
        f"Decoding on {speed['threads']} threads of an {speed['cpu']} that reads memory at "
        f"{speed['read_bytes_per_second'] / 1e9:.0f} GB/s, batch {speed['batch']}."
        + (f" {STAND_IN.format(layers=speed['layers'])}" if speed["layers"] else "")
    )
    lines = []
    for rival in (name for name in seconds if not name.startswith(FOLD)):
        if rival not in entries:
            lines.append([_shown(rival), _pace(speed, rival), *("not judged" for _ in texts)])
            continue
        matches = (_match(entries, seconds, rival, text) for text in texts)
        lines.append([_shown(rival), _pace(speed, rival), *(_matched(speed, rival, fold) for fold in matches)])
    yield table(["rival", "tokens/s", *(f"fold no worse on {text}" for text in texts)], lines)
    folds = [name for name in seconds if name.startswith(FOLD)]
    yield "Tokens per second of the folds: " + ", ".join(f"{name} {_pace(speed, name)}" for name in folds) + "."


def _match(entries: dict[str, Any], seconds: dict[str, list[float]], rival: str, text: str) -> str | None:
    """The fastest fold whose perplexity on a text is no worse than a rival's; None if none is so good."""
    worst = _perplexity(entries, rival, text)
    good = [name for name in seconds if name.startswith(FOLD) and _perplexity(entries, name, text) <= worst]
    return min(good, key=lambda name: statistics.median(seconds[name]), default=None)


def _matched(speed: dict[str, Any], rival: str, fold: str | None) -> str:
    if fold is None:
        return "none"
    ratio = Ratio.of(speed["seconds"][rival], speed["seconds"][fold])
    return f"**{spread(ratio.value, ratio.low, ratio.high)}** {fold}"


def _pace(speed: dict[str, Any], name: str) -> str:
    return f"{speed['batch'] / statistics.median(speed['seconds'][name]):.1f}"


def _perplexity(entries: dict[str, Any], name: str, text: str) -> float:
    value: float = entries[name]["perplexity"][text]["value"]
    return value


def _shown(name: str) -> str:
    return (
        name
        if name == DENSE or name.startswith((FOLD, "int"))
        else f"llama.cpp {name.upper().replace('-PURE', ', pure')}"
    )
