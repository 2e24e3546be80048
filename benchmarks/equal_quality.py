"""Decoding at equal quality: for each rival the fold whose perplexity is no worse, and how fast both decode.

    python benchmarks/equal_quality.py quality SUBJECT [--only NAME...] [--reductions R...]
    python benchmarks/equal_quality.py speed SUBJECT [--only NAME...] [--threads 2] [--batch 1] [--layers 8]

SUBJECT is `sample`, the GELU model that ships with TARDIS, or a real model of `real_models.py`. What is judged is what
decodes, whole: every linear layer is in few bits, attention and head included.

    tardis-int4@R     folded so that a token reads 1 - R of the FFN's bytes; the rest of the model in int4
    int4, int3        by our own kernels; rounded by GPTQ, the head in int4
    q4_k_m            the file that the dense weights were written out of, which therefore loses nothing
    q4_0, q3_k_m, q2_k and q4_0-pure    files that llama.cpp's own quantiser makes of the same weights, see
                      `llama_library.py`; `pure` has the head, too, in the type that gives the file its name

`quality` measures what is not measured yet, and writes every figure at once. A GGUF file is judged twice: with its
weights written out, by us, and by llama.cpp's own logits. Folds are kept in `--folds`, and an interrupted one goes on.
`speed` times all that `quality` has judged, in turns, as `llama_cpp.py` does. The sample is too small to be timed: in
its place stands Falcon-7B's shape with random weights, with the sample's fix rates and predictors.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import real_models
from llama_cpp import add_speed_options, bytes_of, file_of_shape, measured_on, model_of_shape, taken_in_turns
from llama_library import CACHE, Llama, own_perplexity, quantised
from tardis_llm import FoldConfig, fold, save_folded
from tardis_llm.allocator import keep_freed_memory
from tardis_llm.baselines import apply_baseline
from tardis_llm.calibration.inputs import ids_of
from tardis_llm.calibration.text import Windows
from tardis_llm.checkpoint.loading import load_dense, load_model, load_report, load_tokenizer
from tardis_llm.evaluation.machine import cpu_name
from tardis_llm.evaluation.perplexity import token_perplexity
from tardis_llm.evaluation.shapes import RandomFold, random_linears
from tardis_llm.evaluation.variants import Variant, loaded_variants, random_rival, random_variant, swapped
from tardis_llm.files import read_json, write_json
from tardis_llm.pipeline.linears import Covariances, low_bit_copy
from tardis_llm.runtime.linears.lowbit import GROUP_SIZE
from tardis_llm.runtime.linears.placing import linear_layers, put_linears
from tardis_llm.runtime.placing import lay_out
from tardis_llm.sample import model_dir

RESULTS = Path(__file__).parent / "results"
FOLDS = CACHE.parent / "equal_quality"
DENSE, FOLD = "dense", "tardis-int4"
OURS = {"int4": 4, "int3": 3}  #: bits of the linear layers in the blocks
SHAPE = "falcon-7b"  #: what stands in for the sample where speed is measured
_HEAD_BITS, _HEAD_TOKENS = 4, 8_192  # of the head of `OURS`, and calibration tokens that it is rounded by


@dataclass(frozen=True)
class Subject:
    """A model that is judged.

    Attributes:
        load: makes it anew, dense in bf16, with its tokenizer.
        length: tokens of a window.
        tokens: of each text that is judged on.
        texts: names of these.
        group: weights of a fold that share a scale.
        reductions: of the folds, if nothing else is asked for.
        file: gives the GGUF file that its weights are from; None where there is none.
        files: types that llama.cpp quantises it to.
    """

    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    length: int
    tokens: int
    texts: tuple[str, ...]
    group: int
    reductions: tuple[float, ...]
    file: Callable[[], Path] | None
    files: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All that is judged beside folds."""
        return [DENSE, *OURS, *(["q4_k_m"] if self.file else []), *self.files]


def _real(name: str) -> Subject:
    return Subject(
        load=lambda: real_models.load(name),
        length=real_models.LENGTH,
        tokens=real_models.TOKENS,
        texts=("wikitext2", "lambada", "code"),
        group=128,
        reductions=(0.8, 0.834, 0.86),
        file=lambda: real_models.fetch(name),
        files=("q4_0", "q4_0-pure", "q3_k_m", "q2_k"),
    )


def _sample() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = str(model_dir())
    return load_dense(path, "bfloat16"), load_tokenizer(path)


SUBJECTS = {
    "sample": Subject(
        _sample, 256, 131_072, ("wikitext2", "lambada"), 256, (0.8, 0.83, 0.85, 0.875, 0.9), None, ("q4_0-pure",)
    ),
    **{name: _real(name) for name in real_models.MODELS},
}


class Judge:
    """Measures perplexities of a subject, compressed in many ways.

    Args:
        name: key of `SUBJECTS`.
        chosen: `calibration`, `data`, `cache` and `folds` of the command line.
    """

    def __init__(self, name: str, chosen: argparse.Namespace) -> None:
        self.name, self.subject, self.chosen = name, SUBJECTS[name], chosen
        _, tokenizer = self.subject.load()
        length, tokens = self.subject.length, chosen.tokens or self.subject.tokens
        found = real_models.texts(tokenizer, chosen.data, tokens, length)
        self.windows = {text: found[text] for text in self.subject.texts}
        self.calibration = real_models.calibration(tokenizer, chosen.data, chosen.calibration, length)

    def judged(self, name: str) -> dict[str, Any]:
        """The figures of the subject as `name` says."""
        if name == DENSE:
            return self._figures(self.subject.load()[0])
        if name in OURS:
            return self._figures(rounded(self.subject.load()[0], OURS[name], self.calibration))
        if name.startswith(FOLD):
            return self._folded(name)
        if self.subject.file is None:
            return self._figures(in_type(self.subject.load()[0], gguf.GGMLQuantizationType.Q4_0))
        return self._file(gguf_file(self.name, name, self.chosen.cache))

    def _folded(self, name: str) -> dict[str, Any]:
        directory = folded_model(self.name, name, self.calibration, self.chosen)
        model, report = load_model(str(directory)), load_report(str(directory))
        assert report is not None, "it was saved with its report"
        lay_out(model)  # as for decoding
        bits = [layer.bits for layer in report.layers]
        return {**self._figures(model), "fix_rate": report.fix_rate, "bits": bits, "touched": 1 - report.reduction}

    def _file(self, path: Path) -> dict[str, Any]:
        own = {text: own_perplexity(path, windows, self.chosen.cache) for text, windows in self.windows.items()}
        figures = self._figures(load_dense(str(path), "bfloat16"))
        return {**figures, "own": {text: each.as_dict() for text, each in own.items()}, "bytes": path.stat().st_size}

    def _figures(self, model: PreTrainedModel) -> dict[str, Any]:
        found = {text: token_perplexity(model, windows) for text, windows in self.windows.items()}
        return {
            "perplexity": {text: {**each.as_dict(), "losses": each.losses.tolist()} for text, each in found.items()}
        }


def rounded(model: PreTrainedModel, bits: int, calibration: Windows) -> PreTrainedModel:
    """A dense model with every linear layer rounded by GPTQ, in place: those of the blocks to `bits`, the head to 4.

    Those of the blocks have zero points, which the format that decodes lacks: a little in the rival's favour.
    """
    apply_baseline(f"gptq{bits}-g{GROUP_SIZE}", model, calibration, scope="all")
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    ids = ids_of(calibration.fit)
    with torch.no_grad(), Covariances({name: head}) as seen:
        for window in ids[: max(1, _HEAD_TOKENS // ids.shape[1])]:
            model(input_ids=window[None], use_cache=False)
    put_linears(model, {name: low_bit_copy(head, _HEAD_BITS, GROUP_SIZE, seen.of(name))})
    return model


@torch.no_grad()
def in_type(model: PreTrainedModel, kind: gguf.GGMLQuantizationType) -> PreTrainedModel:
    """A dense model with every linear layer rounded as GGUF files of a type have it; the embedding stays as it is."""
    for layer in linear_layers(model, ffn=True).values():
        weight = layer.get_parameter("weight").data
        rows = (weight if isinstance(layer, nn.Linear) else weight.T).float().contiguous()
        levels = torch.from_numpy(gguf.dequantize(gguf.quantize(rows.numpy(), kind), kind)).to(weight.dtype)
        layer.weight = nn.Parameter(levels if isinstance(layer, nn.Linear) else levels.T.contiguous())
    return model


def gguf_file(subject: str, name: str, cache: Path) -> Path:
    """The GGUF file of a subject that an entry of a table stands for, made unless it is there."""
    file = SUBJECTS[subject].file
    assert file is not None, "subjects without a file have no entries of files"
    kind, _, pure = name.partition("-")
    if name == "q4_k_m":
        return file()
    return quantised(file(), kind, cache / f"{subject}-{name}.gguf", cache, bool(pure))


def folded_model(subject: str, name: str, calibration: Windows, chosen: argparse.Namespace) -> Path:
    """The directory of a fold, made unless it is there; what an interrupted run has left is used."""
    directory: Path = chosen.folds / f"{subject}-{name}"
    if (directory / "config.json").exists():
        return directory
    model, tokenizer = SUBJECTS[subject].load()
    config = FoldConfig(
        reduction=float(name.partition("@")[2]),
        group_size=SUBJECTS[subject].group,
        fold_bits=4,
        fallback_bits=4,
        linear_bits=4,
        sequence_length=SUBJECTS[subject].length,
        tokens=chosen.calibration,
    )
    work = directory.with_name(f"{directory.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    report = fold(model, calibration, config, work, resume=True, progress=real_models.show)
    save_folded(model, report, directory, tokenizer)
    shutil.rmtree(work)
    return directory


def quality(chosen: argparse.Namespace) -> None:
    """Judge what is not judged yet."""
    subject, path = SUBJECTS[chosen.subject], chosen.results / f"equal_quality_{chosen.subject}.json"
    judge = Judge(chosen.subject, chosen)
    settings = {"window": subject.length, "tokens": {text: part.numel() for text, part in judge.windows.items()}}
    settings["calibration"] = chosen.calibration
    known = read_json(path) if path.exists() else {}
    entries: dict[str, Any] = known["entries"] if known.get("settings") == settings else {}
    folds = [f"{FOLD}@{reduction:g}" for reduction in chosen.reductions or subject.reductions]
    for name in chosen.only or [*subject.names, *folds]:
        if name not in entries:
            entries[name] = judge.judged(name)
            machine = {"cpu": cpu_name(), "threads": torch.get_num_threads()}
            write_json(path, {"settings": settings, "machine": machine, "entries": entries})
        print(line(name, entries), flush=True)


def line(name: str, entries: dict[str, Any]) -> str:
    """A row of the table of perplexities, with their increase in nats over the dense model's."""
    parts = []
    for text, found in entries[name]["perplexity"].items():
        increase = math.log(found["value"] / entries[DENSE]["perplexity"][text]["value"]) if DENSE in entries else 0.0
        own = f", by its logits {entries[name]['own'][text]['value']:.3f}" if "own" in entries[name] else ""
        parts.append(f"{text} {found['value']:.3f} ({increase:+.4f}{own})")
    return f"{name:20} {'  '.join(parts)}"


def speed(chosen: argparse.Namespace) -> None:
    """Time what was judged, in turns."""
    torch.set_num_threads(chosen.threads)
    entries = read_json(chosen.results / f"equal_quality_{chosen.subject}.json")["entries"]
    names = [name for name in chosen.only or entries if name != DENSE]
    ours = variants(chosen.subject, {name: entries[name] for name in names if is_ours(name)}, chosen)
    files = {name: _timed_file(name, chosen) for name in names if not is_ours(name)}
    llamas = {name: Llama(file, chosen.threads, chosen.batch, chosen.cache) for name, file in files.items()}
    try:
        decoded, prompted = taken_in_turns(ours, llamas, chosen)
    finally:
        for llama in llamas.values():
            llama.close()
    sizes = {name: bytes_of(variant) for name, variant in ours.items()}
    sizes |= {name: llama.about["bytes"] for name, llama in llamas.items()}
    for name, seconds in decoded.items():
        tokens = chosen.batch / statistics.median(seconds)
        print(f"{name:20} {tokens:7.2f} tokens/s  first token {statistics.median(prompted[name]):6.3f} s")
    layers = chosen.layers if SUBJECTS[chosen.subject].file is None else None
    name = f"equal_speed_{chosen.subject}{f'_{layers}' if layers else ''}_{chosen.threads}_{chosen.batch}.json"
    found = {"seconds": decoded, "first_seconds": prompted, "bytes": sizes}
    write_json(chosen.results / name, {"subject": chosen.subject, "layers": layers, **measured_on(chosen), **found})


def is_ours(name: str) -> bool:
    """Whether our kernels decode it."""
    return name in OURS or name.startswith(FOLD)


def variants(subject: str, entries: dict[str, Any], chosen: argparse.Namespace) -> dict[str, Variant]:
    """What our kernels decode, by name: real folds, or random ones of `SHAPE` with the sample's fix rates."""
    real = SUBJECTS[subject].file is not None
    model = SUBJECTS[subject].load()[0] if real else model_of_shape(SHAPE, chosen.layers)
    made = {}
    for name, found in entries.items():
        if name in OURS:
            made[name] = _random_dense(name, model)
        elif real:
            made[name] = loaded_variants(load_model(str(chosen.folds / f"{subject}-{name}")))[0]
        else:
            bits = math.ceil(statistics.mean(found["bits"]))
            made[name] = random_variant(model, RandomFold(bits, 4, 4, 4, found["fix_rate"]))
    return made


def _random_dense(name: str, model: PreTrainedModel) -> Variant:
    """A dense model in few bits that are random, which takes as long as rounded ones."""
    if name == "int4":
        return random_rival(name, model)
    head = model.get_output_embeddings()
    outside = {key: layer for key, layer in linear_layers(model).items() if layer is head}
    others = random_linears(model, OURS[name], ffn=True)
    others |= {key: layer for key, layer in random_linears(model, _HEAD_BITS).items() if key in outside}
    return Variant(name, model, lambda: swapped(model, others))


def _timed_file(name: str, chosen: argparse.Namespace) -> Path:
    if SUBJECTS[chosen.subject].file is None:
        return file_of_shape(SHAPE, chosen.layers, chosen.cache)
    return gguf_file(chosen.subject, name, chosen.cache)


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge, or time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--only", nargs="+", help="entries; default: all")
    parser.add_argument("--reductions", type=float, nargs="+", help="of folds; default: the subject's")
    parser.add_argument("--tokens", type=int, help="of each text that is judged on; default: the subject's")
    parser.add_argument("--calibration", type=int, default=32_768, help="tokens (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=real_models.DATA, help="(default: %(default)s)")
    parser.add_argument("--folds", type=Path, default=FOLDS, help="folder for folds (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for figures (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help=f"of {SHAPE} (default: %(default)s)")
    add_speed_options(parser)
    chosen = parser.parse_args(arguments)
    keep_freed_memory()
    (quality if chosen.what == "quality" else speed)(chosen)


if __name__ == "__main__":
    main()
