"""Decoding at equal quality: for each rival the fold whose perplexity is no worse, and how fast both decode.

    python benchmarks/equal_quality.py quality SUBJECT [--only NAME...] [--reductions R...]
    python benchmarks/equal_quality.py tasks SUBJECT [--only NAME...] [--tasks NAME...] [--items N]
    python benchmarks/equal_quality.py speed SUBJECT [--only NAME...] [--threads 2] [--batch 1] [--layers 8]

SUBJECT is `sample`, the GELU model that ships with TARDIS, or a real model of `real_models.py`. What is judged is what
decodes, whole: every linear layer is in few bits, attention and head included.

    tardis-int4@R     folded so that a token reads 1 - R of the FFN's bytes; the rest of the model in int4
    tardis-mixed-int4@R     the same, but the neurons that would be fixed most often are always computed
    tardis-static-int4@R    the same, but the neurons that are computed exactly are the same for every token
    int4, int3        by our own kernels; rounded by GPTQ, the head in int4
    int4-head         int4 whose head has a predictor, as folds have
    q4_k_m            the file that the dense weights were written out of, which therefore loses nothing
    q4_0, q3_k_m, q2_k and q4_0-pure    files that llama.cpp's own quantiser makes of the same weights, see
                      `llama_library.py`; `pure` has the head, too, in the type that gives the file its name

`quality` measures what is not measured yet, and writes every figure at once. A GGUF file is judged twice: with its
weights written out, by us, and by llama.cpp's own logits. Folds are kept in `--folds`, and an interrupted one goes on.
`tasks` runs lm-eval's zero-shot tasks on the same, one after the other; what was run before is not run again.
`speed` times all that `quality` has judged, in turns, as `llama_cpp.py` does. The sample is too small to be timed: in
its place stands Falcon-7B's shape with random weights, with the sample's fix rates and predictors.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel

import real_models
from equal_models import folded_model, gguf_file, in_type, rounded
from equal_speed import SHAPE, speed
from equal_subjects import DENSE, KINDS, OURS, SUBJECTS
from llama_cpp import add_speed_options
from llama_library import CACHE, own_perplexity
from tardis_llm.allocator import keep_freed_memory
from tardis_llm.checkpoint.loading import load_dense, load_model, load_report
from tardis_llm.evaluation.machine import cpu_name
from tardis_llm.evaluation.perplexity import token_perplexity
from tardis_llm.evaluation.tasks import TASKS, TaskScore, run_tasks
from tardis_llm.files import read_json, write_json
from tardis_llm.runtime.placing import lay_out

RESULTS = Path(__file__).parent / "results"
FOLDS = CACHE.parent / "equal_quality"


class Judge:
    """Measures perplexities of a subject, compressed in many ways.

    Args:
        name: key of `SUBJECTS`.
        chosen: `tokens`, `calibration`, `code`, `data`, `cache` and `folds` of the command line.
    """

    def __init__(self, name: str, chosen: argparse.Namespace) -> None:
        self.name, self.subject, self.chosen = name, SUBJECTS[name], chosen
        _, self.tokenizer = self.subject.load()
        self.calibration = real_models.calibration(
            self.tokenizer, chosen.data, chosen.calibration, self.subject.length, chosen.code
        )

    @cached_property
    def windows(self) -> dict[str, torch.Tensor]:
        """What is judged on, by the names of the texts."""
        tokens = self.chosen.tokens or self.subject.tokens
        found = real_models.texts(self.tokenizer, self.chosen.data, tokens, self.subject.length)
        return {text: found[text] for text in self.subject.texts}

    def model(self, name: str) -> PreTrainedModel:
        """The subject as `name` says."""
        if name == DENSE:
            return self.subject.load()[0]
        if name in OURS:
            return rounded(self.subject.load()[0], name, self.calibration)
        if name.startswith(tuple(KINDS)):
            model = load_model(str(self._fold(name)))
            lay_out(model)  # as for decoding
            return model
        if self.subject.file is None:
            return in_type(self.subject.load()[0], gguf.GGMLQuantizationType.Q4_0)
        return load_dense(str(self._file(name)), "bfloat16")

    def judged(self, name: str) -> dict[str, Any]:
        """The figures of the subject as `name` says."""
        figures = self._figures(self.model(name))
        if name.startswith(tuple(KINDS)):
            return figures | self._about_fold(name)
        if name in (DENSE, *OURS) or self.subject.file is None:
            return figures
        path = self._file(name)
        own = {text: own_perplexity(path, some, self.chosen.cache).as_dict() for text, some in self.windows.items()}
        return {**figures, "own": own, "bytes": path.stat().st_size}

    def _fold(self, name: str) -> Path:
        return folded_model(self.name, name, self.calibration, self.chosen)

    def _file(self, name: str) -> Path:
        return gguf_file(self.name, name, self.chosen.cache)

    def _about_fold(self, name: str) -> dict[str, Any]:
        report = load_report(str(self._fold(name)))
        assert report is not None, "it was saved with its report"
        shares = {"fix_rate": report.fix_rate, "kept": report.kept, "touched": 1 - report.reduction}
        return {"bits": [layer.bits for layer in report.layers], **shares}

    def _figures(self, model: PreTrainedModel) -> dict[str, Any]:
        found = {text: token_perplexity(model, windows) for text, windows in self.windows.items()}
        return {
            "perplexity": {text: {**each.as_dict(), "losses": each.losses.tolist()} for text, each in found.items()}
        }


def quality(chosen: argparse.Namespace) -> None:
    """Judge what is not judged yet."""
    judge, path = Judge(chosen.subject, chosen), chosen.results / f"equal_quality_{chosen.subject}.json"
    settings = {"window": judge.subject.length, "tokens": {text: some.numel() for text, some in judge.windows.items()}}
    found = _known(path, settings | {"calibration": chosen.calibration, "code": chosen.code})
    entries = found["entries"]
    for name in named(chosen):
        if name not in entries:
            entries[name] = judge.judged(name)
            write_json(path, found)
        print(line(name, entries), flush=True)


def tasks(chosen: argparse.Namespace) -> None:
    """Run what tasks were not run yet, on the dense model too: changes are told against it, item by item."""
    judge, path = Judge(chosen.subject, chosen), chosen.results / f"equal_tasks_{chosen.subject}.json"
    length = judge.subject.length
    settings = {"window": length, "items": chosen.items, "calibration": chosen.calibration, "code": chosen.code}
    found = _known(path, settings)
    for name in dict.fromkeys([DENSE, *named(chosen)]):
        scores = found["entries"].setdefault(name, {})
        missing = [task for task in chosen.tasks if task not in scores]
        model = judge.model(name) if missing else None
        for task in missing:
            assert model is not None, "there is something to run it on"
            data = chosen.data / "eval"
            (score,) = run_tasks(model, judge.tokenizer, [task], data, chosen.items, length, real_models.show)
            scores[task] = recorded(score)
            write_json(path, found)
        print(f"{name:20}", "  ".join(f"{task} {scores[task]['value']:.1%}" for task in chosen.tasks), flush=True)


def recorded(score: TaskScore) -> dict[str, Any]:
    """A score as it is written down: of each item, in order, whether it was right."""
    kept = {name: getattr(score, name) for name in ("metric", "value", "standard_error", "items")}
    return {**kept, "correct": "".join(f"{right:.0f}" for right in score.correct)}


def named(chosen: argparse.Namespace) -> list[str]:
    """Names of what is to be judged."""
    subject = SUBJECTS[chosen.subject]
    folds = [f"{kind}@{reduction:g}" for kind in KINDS for reduction in chosen.reductions or subject.reductions]
    return chosen.only or [*subject.names, *folds]


def _known(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What is written down of these settings, by this machine from now on."""
    known = read_json(path) if path.exists() else {}
    entries = known["entries"] if known.get("settings") == settings else {}
    return {
        "settings": settings,
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        "entries": entries,
    }


def line(name: str, entries: dict[str, Any]) -> str:
    """A row of the table of perplexities, with their increase in nats over the dense model's."""
    parts = []
    for text, found in entries[name]["perplexity"].items():
        increase = math.log(found["value"] / entries[DENSE]["perplexity"][text]["value"]) if DENSE in entries else 0.0
        own = f", by its logits {entries[name]['own'][text]['value']:.3f}" if "own" in entries[name] else ""
        parts.append(f"{text} {found['value']:.3f} ({increase:+.4f}{own})")
    return f"{name:20} {'  '.join(parts)}"


WHAT = {"quality": quality, "tasks": tasks, "speed": speed}


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge, run tasks, or time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--only", nargs="+", help="entries; default: all")
    parser.add_argument("--reductions", type=float, nargs="+", help="of folds; default: the subject's")
    parser.add_argument("--tokens", type=int, help="of each text that is judged on; default: the subject's")
    parser.add_argument("--calibration", type=int, default=32_768, help="tokens (default: %(default)s)")
    parser.add_argument("--code", type=float, default=0.0, help="share of them that are code (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=real_models.TASKS, help="(default: %(default)s)")
    parser.add_argument("--items", type=int, default=real_models.ITEMS, help="of each task (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=real_models.DATA, help="(default: %(default)s)")
    parser.add_argument("--folds", type=Path, default=FOLDS, help="folder for folds (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for figures (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help=f"of {SHAPE} (default: %(default)s)")
    add_speed_options(parser)
    chosen = parser.parse_args(arguments)
    keep_freed_memory()
    WHAT[chosen.what](chosen)


if __name__ == "__main__":
    main()
