"""`tardis bench`: how fast a fold decodes, beside the dense model in the same process, turn by turn."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedModel

from ..architectures import FFNSite, FFNWeights, find_ffns
from ..config import Precision, Storage
from ..errors import InvalidInputError
from ..evaluation.shapes import SHAPES, random_folds, shaped_model
from ..evaluation.speed import (
    Decoder,
    Ratio,
    count_union,
    cpu_name,
    folded,
    read_bandwidth,
    step_bytes,
    take_turns,
    weight_bytes,
)
from ..loading import load_dense
from ..runtime.ffn import FoldedFFN
from . import output as show
from .fold import BITS
from .options import AsJson

_DENSE, _FOLDED = "dense", "folded"


@dataclass(frozen=True)
class Bench:
    """A model with its fold.

    Attributes:
        model: dense.
        sites: its FFNs.
        weights: of each, dense.
        ffns: the fold of each.
    """

    model: PreTrainedModel
    sites: list[FFNSite]
    weights: list[FFNWeights]
    ffns: list[FoldedFFN]

    @classmethod
    def of(cls, model: PreTrainedModel, bits: int, storage: Storage, fix_rate: float) -> Bench:
        """A dense model with random folds."""
        sites = find_ffns(model)
        weights = [site.weights() for site in sites]
        ffns = [ffn for _, ffn in random_folds(model, bits, storage, fix_rate)]
        return cls(model, sites, weights, ffns)

    def variant(self, name: str) -> AbstractContextManager[None]:
        """The model dense, or folded within the context."""
        pairs = list(zip(self.sites, self.ffns, strict=True))
        return folded(self.model, pairs) if name == _FOLDED else nullcontext()

    def prompt(self, batch: int, tokens: int) -> Tensor:
        """Random token ids [batch, tokens]."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(3))


def bench(
    shape: Annotated[str, typer.Option(help=f"Shape with random weights: {', '.join(SHAPES)}.")] = "",
    model: Annotated[str, typer.Option(help="Directory or hub name of a dense model, in place of a shape.")] = "",
    layers: Annotated[int | None, typer.Option(help="So many layers of the shape; all without.", min=1)] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 64,
    steps: Annotated[int, typer.Option(help="Tokens decoded per run.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Runs of each variant, taking turns.", min=2)] = 7,
    predictor_bits: Annotated[int, typer.Option(help="Of the predictor.")] = 2,
    fold_dtype: Annotated[Precision, typer.Option(help="Of the fold.")] = "bf16",
    fallback: Annotated[Precision, typer.Option(help="Of the weights that fixing reads.")] = "bf16",
    fix_rate: Annotated[float, typer.Option(help="Share of the neurons that a token fixes.")] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Time prompts and decoding of a model, dense and with a random fold that fixes a stated share of the neurons."""
    clock = show.Clock()
    sizes = _sizes(batch)
    if bool(shape) == bool(model):
        raise InvalidInputError(f"give --shape NAME, one of {', '.join(SHAPES)}, or --model DIR.")
    if not 0 <= fix_rate < 1:
        raise InvalidInputError(f"--fix-rate is {fix_rate}; give a share from 0 to below 1.")
    dense = shaped_model(shape, layers) if shape else load_dense(model, "bfloat16")
    storage = Storage(fold_bits=BITS[fold_dtype], fallback_bits=BITS[fallback])
    made = Bench.of(dense, predictor_bits, storage, fix_rate)
    bandwidth = read_bandwidth()
    name = shape or model
    show.say(escape(_describe(name, made, bandwidth)))
    with show.progress_bars() as progress:
        rows = [row for size in sizes for row in _measure(made, size, prompt, steps, rounds, progress)]
    if as_json:
        machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "read_bandwidth": bandwidth}
        show.print_json({"model": name, "layers": len(made.sites), **machine, "rows": rows, **clock.as_dict()})
        return
    _print(rows, bandwidth)
    show.say(clock.sentence())


def _sizes(batch: str) -> list[int]:
    try:
        sizes = [int(part) for part in batch.split(",")]
    except ValueError as error:
        raise InvalidInputError(f"--batch is {batch!r}; give sizes such as 1,8.") from error
    if min(sizes) < 1:
        raise InvalidInputError(f"--batch is {batch!r}; a batch has one sequence at least.")
    return sizes


def _describe(name: str, made: Bench, bandwidth: float) -> str:
    dense, other = weight_bytes(made.model, made.sites)
    return (
        f"{name}: {len(made.sites)} layers, FFNs {show.size(dense)}, other weights read per step {show.size(other)}; "
        f"{cpu_name()}, {torch.get_num_threads()} threads, reads memory at {bandwidth / 1e9:.1f} GB/s"
    )


def _measure(made: Bench, size: int, prompt: int, steps: int, rounds: int, progress: Any) -> Iterator[dict[str, Any]]:
    """Prefill and decoding at one batch size, both variants."""
    ids = made.prompt(size, prompt)
    decoders = {}
    for name in (_DENSE, _FOLDED):
        with made.variant(name):
            decoders[name] = Decoder(made.model, ids)

    def decode(name: str) -> float:
        with made.variant(name):
            return decoders[name].seconds(steps)

    def prefill(name: str) -> float:
        with made.variant(name):
            return Decoder(made.model, ids).prefill

    names = list(decoders)
    taken = take_turns({name: partial(decode, name) for name in names}, rounds, progress, f"decoding, batch {size}")
    first = take_turns({name: partial(prefill, name) for name in names}, rounds, progress, f"prompt, batch {size}")
    with made.variant(_FOLDED), count_union(made.model) as union:
        decoders[_FOLDED].seconds(steps)
    dense, other = weight_bytes(made.model, made.sites)
    read = {_DENSE: float(dense), _FOLDED: step_bytes(made.ffns, made.weights, union.mean)}
    for name in names:
        step = statistics.median(taken[name])
        yield {
            "batch": size,
            "variant": name,
            "tokens_per_second": size / step,
            "step_seconds": step,
            "speed_up": vars(Ratio.of(taken[_DENSE], taken[name])),
            "first_token_seconds": statistics.median(first[name]),
            "first_token_speed_up": vars(Ratio.of(first[_DENSE], first[name])),
            "step_bytes": read[name] + other,
            "bytes_per_second": (read[name] + other) / step,
            "union_fix_rate": union.mean if name == _FOLDED else None,
        }


def _print(rows: list[dict[str, Any]], bandwidth: float) -> None:
    made = show.table("Decoding", "batch", "", "tokens/s", "speed-up", "fixed", "MiB", "GB/s", "prompt")
    for row in rows:
        ratio = row["speed_up"]
        dense = row["variant"] == _DENSE
        made.add_row(
            str(row["batch"]),
            row["variant"],
            f"{row['tokens_per_second']:.2f}",
            "" if dense else f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
            "" if dense else f"{row['union_fix_rate']:.1%}",
            f"{row['step_bytes'] / 2**20:,.0f}",
            f"{row['bytes_per_second'] / 1e9:.1f}",
            f"{row['first_token_seconds']:.2f}",
            end_section=not dense,
        )
    show.out.print(made)
    show.out.print(
        "[dim]speed-up: median of the ratios of neighbouring runs, with their quartiles. fixed: share of the neurons "
        "that some token of the batch fixes. MiB: weights read per step, GB/s: per second; this machine reads "
        f"{bandwidth / 1e9:.1f}. prompt: seconds to the first token.[/]"
    )
