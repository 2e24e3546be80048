"""`tardis bench`: how fast a fold decodes, beside its rivals in the same process, turn by turn."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from transformers import PreTrainedModel

from ..allocator import use_huge_pages
from ..calibration.text import check_length
from ..checkpoint.folded import is_folded, record_crossover
from ..checkpoint.format import METHOD
from ..checkpoint.loading import DTYPES, load_config, load_dense, load_model, quantisation
from ..config import Precision
from ..errors import InvalidInputError
from ..evaluation.shapes import SHAPES, random_folds, shaped_model
from ..evaluation.speed import (
    CROSSOVER_TOKENS,
    Decoder,
    Ratio,
    count_union,
    cpu_name,
    crossover,
    pays_up_to,
    read_bandwidth,
    step_bytes,
    take_turns,
)
from ..evaluation.variants import KINDS, Variant, folded_variant, loaded_variants, rival
from ..ffn.weights import Storage
from ..runtime.linears.placing import low_bit_copies
from ..runtime.placing import folded_ffns, lay_out
from ..runtime.prefill import Prefill, set_prefill
from . import output as show
from .fold import BITS, check_precision
from .options import AsJson

_FOLDED = "folded"


def bench(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Folded or dense model, directory or hub name.")] = "",
    shape: Annotated[str, typer.Option(help=f"Shape with random weights: {', '.join(SHAPES)}.")] = "",
    layers: Annotated[int | None, typer.Option(help="So many layers of the shape; all without.", min=1)] = None,
    against: Annotated[
        str,
        typer.Option(help=f"Rivals, from {', '.join(KINDS)}; and the dense MODEL that a folded one is compared with."),
    ] = "dense",
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,2,4,8,16,32",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 64,
    prefill: Annotated[
        Prefill, typer.Option(help="Prompts through the fold, the dense FFNs, or what is faster.")
    ] = "folded",
    steps: Annotated[int, typer.Option(help="Tokens decoded per run.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Runs of each variant, taking turns.", min=2)] = 7,
    predictor_bits: Annotated[int, typer.Option(help="Of the predictor of a random fold.")] = 2,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16, of all variants. As in the checkpoint without; bfloat16 of a shape.",
            show_default=False,
        ),
    ] = None,
    fold_dtype: Annotated[
        Precision | None, typer.Option(help="Of a random fold; the model's own without.", show_default=False)
    ] = None,
    fallback: Annotated[
        Precision | None, typer.Option(help="Of the weights that fixing reads in it; likewise.", show_default=False)
    ] = None,
    linears: Annotated[
        Precision | None, typer.Option(help="Of the layers outside the FFNs beside it; likewise.", show_default=False)
    ] = None,
    fix_rate: Annotated[float, typer.Option(help="Share of the neurons that a token fixes in a random fold.")] = 0.05,
    compile: Annotated[
        bool, typer.Option("--compile", help="Run the steps of every variant as one compiled graph.")
    ] = False,
    record: Annotated[bool, typer.Option(help="Write into the folded directory where folding stops paying.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time prompts and decoding, folded and dense.

    A folded directory is measured as it is. A shape, or a dense model, gets a random fold whose ranges leave out a
    stated share of the neurons, so that speed is known before anything is folded.
    """
    clock = show.Clock()
    sizes = _sizes(batch)
    if bool(shape) == bool(model):
        raise InvalidInputError(f"give a MODEL, or --shape NAME, one of {', '.join(SHAPES)}.")
    if not 0 <= fix_rate < 1:
        raise InvalidInputError(f"--fix-rate is {fix_rate}; give a share from 0 to below 1.")
    checkpoint = bool(model) and quantisation(load_config(model)) == METHOD
    if record and not (checkpoint and is_folded(Path(model))):
        raise InvalidInputError("--record writes into a folded directory; give one as MODEL.")
    kinds = _kinds(against, checkpoint)
    if checkpoint:
        variants = _variants_of_checkpoint(model, kinds, dtype)
    else:
        dense = _dense_model(model, shape, layers, dtype, (fold_dtype, fallback, linears))
        storage = Storage(fold_bits=BITS[fold_dtype], fallback_bits=BITS[fallback])
        variants = _variants_of_dense(dense, kinds, predictor_bits, storage, BITS[linears], fix_rate)
    check_length(variants[0].model, prompt + steps)
    for variant in variants:
        with variant.within():
            lay_out(variant.model)
            use_huge_pages(variant.model)
    bandwidth = read_bandwidth()
    name, measured = shape or model, _name(variants[-1].model.dtype)
    show.say(escape(_describe(name, measured, bandwidth)))
    with show.progress_bars() as progress:
        runs = _Runs(prompt, prefill, steps, rounds, compile)
        rows = [row for size in sizes for row in _measure(variants, size, runs, progress)]
        paying = _crossover(variants[-1], progress)
    if record and paying:
        record_crossover(Path(model), pays_up_to(paying))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if as_json:
        machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "read_bandwidth": bandwidth}
        faster = {str(count): vars(ratio) for count, ratio in paying.items()}
        found = {"rows": rows, "crossover": faster, "pays_up_to": pays_up_to(paying) if paying else None}
        what = {"model": name, "dtype": measured, "compiled": compile}
        show.print_json({**what, **machine, "peak_bytes": peak, **found, **clock.as_dict()})
        return
    _print(f"Decoding in {measured}" + (", steps compiled" if compile else ""), rows, bandwidth)
    if paying:
        show.say(_verdict(paying, record))
    show.say(clock.sentence())


def _kinds(against: str, checkpoint: bool) -> list[str]:
    """The rivals asked for. What is none is refused before a model is made; beside a checkpoint it may be a model."""
    kinds = [part.strip() for part in against.split(",") if part.strip()]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown and not checkpoint:
        raise InvalidInputError(f"there is no variant {unknown[0]!r}; choose from {', '.join(KINDS)}.")
    return kinds


def _variants_of_dense(
    model: PreTrainedModel, kinds: Sequence[str], bits: int, storage: Storage, linears: int | None, fix_rate: float
) -> list[Variant]:
    """The rivals, then a random fold."""
    rivals = [rival(kind, model) for kind in kinds]
    folds = list(random_folds(model, bits, storage, fix_rate))
    others = low_bit_copies(model, linears) if linears else None
    return [*rivals, folded_variant(model, folds, others)]


def _variants_of_checkpoint(directory: str, kinds: Sequence[str], dtype: str | None) -> list[Variant]:
    """The rivals, then the folded model. Rivals are made of the dense model that is among them, if one is."""
    folded, own_dense = loaded_variants(load_model(directory, dtype))
    names = [kind for kind in kinds if kind not in KINDS]
    if len(names) > 1:
        raise InvalidInputError(f"--against names {' and '.join(names)}; give one dense model, and kinds of it.")
    if names:
        dense = load_dense(names[0], _name(folded.model.dtype))
        made = [kind for kind in kinds if kind in KINDS]
        return [*(rival(kind, dense) for kind in dict.fromkeys(["dense", *made])), folded]
    if list(kinds) != ["dense"] or own_dense is None:
        raise InvalidInputError(
            f"{directory} has no dense weights for {', '.join(kinds)}; name the model that it was folded from, as in "
            f"--against MODEL,{','.join(kinds)}."
        )
    return [own_dense, folded]


def _sizes(batch: str) -> list[int]:
    try:
        sizes = [int(part) for part in batch.split(",")]
    except ValueError as error:
        raise InvalidInputError(f"--batch is {batch!r}; give sizes such as 1,8.") from error
    if min(sizes) < 1:
        raise InvalidInputError(f"--batch is {batch!r}; a batch has one sequence at least.")
    return sizes


def _dense_model(
    model: str, shape: str, layers: int | None, dtype: str | None, parts: Sequence[Precision | None]
) -> PreTrainedModel:
    """Of a shape or a checkpoint, in a dtype that the parts of its fold can have beside it."""
    if shape:
        own = _dtype_of_shape(dtype)
        check_precision(own, *parts)
        return shaped_model(shape, layers, own)
    loaded = load_dense(model, dtype)
    check_precision(loaded.dtype, *parts)
    return loaded


def _dtype_of_shape(dtype: str | None) -> torch.dtype:
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInputError(f"--dtype is {dtype!r}; give one of {', '.join(DTYPES)}.")
    found: torch.dtype = getattr(torch, dtype or "bfloat16")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(name: str, dtype: str, bandwidth: float) -> str:
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads, reads memory at {bandwidth / 1e9:.1f} GB/s"
    return f"{name} in {dtype}: {machine}"


def _crossover(variant: Variant, progress: Any) -> dict[int, Ratio]:
    """How much faster its FFNs are than dense ones, by tokens; empty where the dense weights are not there."""
    with variant.within():
        if any(ffn.stacked for ffn in folded_ffns(variant.model).values()):
            return {}
        return crossover(variant.model, progress)


def _verdict(ratios: dict[int, Ratio], recorded: bool) -> str:
    most = pays_up_to(ratios)
    figures = ", ".join(f"{count}: {ratio.value:.2f}x" for count, ratio in ratios.items())
    said = f"Folding one FFN pays up to {most} tokens at once" if most else "Folding does not pay on this machine"
    if most == CROSSOVER_TOKENS[-1]:
        said += " or more"
    return f"{said} ({figures})." + (" Recorded: prefill auto runs FFNs dense beyond that." if recorded else "")


@dataclass(frozen=True)
class _Runs:
    """What is timed of every variant: the options of `bench` by these names."""

    prompt: int
    prefill: Prefill
    steps: int
    rounds: int
    compiled: bool


def _measure(variants: Sequence[Variant], size: int, runs: _Runs, progress: Any) -> Iterator[dict[str, Any]]:
    """Prefill and decoding of every variant at one batch size."""
    decoders, room = {}, runs.steps if runs.compiled else None
    for variant in variants:
        with variant.within():
            decoders[variant.name] = Decoder(variant.model, variant.prompt(size, runs.prompt), room)

    def decode(variant: Variant) -> float:
        with variant.within():
            return decoders[variant.name].seconds(runs.steps)

    def first_token(variant: Variant) -> float:
        ids = variant.prompt(size, runs.prompt)
        with variant.within():
            decoders[variant.name].settle()
            if variant.name != _FOLDED:
                return Decoder(variant.model, ids).prefill
            set_prefill(variant.model, runs.prefill)
            try:
                return Decoder(variant.model, ids).prefill
            finally:
                set_prefill(variant.model, "folded")

    turns = partial(take_turns, rounds=runs.rounds, progress=progress)
    taken = turns({v.name: partial(decode, v) for v in variants}, stage=f"decoding, batch {size}")
    first = turns({v.name: partial(first_token, v) for v in variants}, stage=f"prompt, batch {size}")
    own, own_first = taken[_FOLDED], first[_FOLDED]
    for variant in variants:
        name, step = variant.name, statistics.median(taken[variant.name])
        with variant.within(), count_union(variant.model) as union:
            decoders[name].step_eagerly()
            read = step_bytes(variant.model, union.mean)
        yield {
            "batch": size,
            "variant": name,
            "tokens_per_second": size / step,
            "step_seconds": step,
            "folded_speed_up": vars(Ratio.of(taken[name], own)),
            "first_token_seconds": statistics.median(first[name]),
            "folded_first_token_speed_up": vars(Ratio.of(first[name], own_first)),
            "step_bytes": read,
            "bytes_per_second": read / step,
            "union_fix_rate": union.mean if name == _FOLDED else None,
        }


def _print(title: str, rows: list[dict[str, Any]], bandwidth: float) -> None:
    made = show.table(title, "batch", "", "tokens/s", "fold is faster", "fixed", "MiB", "GB/s", "prompt, s")
    for row in rows:
        ratio, folded = row["folded_speed_up"], row["variant"] == _FOLDED
        made.add_row(
            str(row["batch"]),
            row["variant"],
            f"{row['tokens_per_second']:.2f}",
            "" if folded else f"{ratio['value']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})",
            f"{row['union_fix_rate']:.1%}" if folded else "",
            f"{row['step_bytes'] / 2**20:,.0f}",
            f"{row['bytes_per_second'] / 1e9:.1f}",
            f"{row['first_token_seconds']:.2f}",
            end_section=folded,
        )
    show.out.print(made)
    show.out.print(
        "[dim]fold is faster: median of the ratios of neighbouring runs, with their quartiles. fixed: share of the "
        "neurons that some token of the batch fixes. MiB: weights read per step, GB/s: per second; this machine reads "
        f"{bandwidth / 1e9:.1f}. prompt: to the first token.[/]"
    )
