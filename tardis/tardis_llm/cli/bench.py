"""`tardis bench`: how fast a fold decodes, beside its rivals in the same process, turn by turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from transformers import PreTrainedModel

from ..calibration.limits import check_length
from ..calibration.text import encode
from ..checkpoint.config_file import load_config, quantisation
from ..checkpoint.folded import holds_fold, record_crossover
from ..checkpoint.format import METHOD
from ..checkpoint.loading import DTYPES, dtype_name, load_dense, load_tokenizer
from ..errors import InvalidInputError
from ..evaluation.crossover import TOKEN_COUNTS
from ..evaluation.machine import Machine
from ..evaluation.shapes import SHAPES, RandomFold, shaped_model
from ..evaluation.speed import SpeedReport, Timing, VariantSpeed, measure_speed
from ..evaluation.variants import FOLDED, RIVALS, Variant, lay_out_all, variants_of_checkpoint, variants_of_dense
from . import output as show
from .options import AsJson, TextField, TextFile, check_precision, from_settings, read_texts

Model = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="Directory, GGUF file or hub name of a folded or dense model.")
]
Shape = Annotated[
    str, typer.Option(help=f"Instead of MODEL: a model with random weights, shaped like one of {', '.join(SHAPES)}.")
]
Layers = Annotated[int | None, typer.Option(help="Number of layers to make of the shape; default: all.", min=1)]
Against = Annotated[
    str,
    typer.Option(
        help=f"What to compare with, with commas between: {', '.join(RIVALS)}; and, for a folded MODEL, the dense "
        "model that it was folded from."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Measure everything in float32, bfloat16 or float16; default: as in the checkpoint, and bfloat16 for a "
        "shape."
    ),
]
Record = Annotated[
    bool, typer.Option(help="Write into the folded directory up to how many tokens at once folding pays.")
]


@from_settings
def bench(
    context: typer.Context,
    model: Model = "",
    shape: Shape = "",
    layers: Layers = None,
    against: Against = "dense",
    dtype: Dtype = None,
    *,
    timing: Timing,
    random_fold: RandomFold,
    text: TextFile = None,
    text_field: TextField = None,
    record: Record = False,
    as_json: AsJson = False,
) -> None:
    """Time prompts and decoding, folded and dense.

    A folded MODEL is measured as it is. A dense MODEL or a shape gets a random fold, whose ranges leave out a stated
    share of the neurons: so speed is known before anything is folded.

    How many neurons a folded MODEL fixes depends on the text: --text says where prompts are from. Without, they are
    random tokens, of which folds usually fix more.
    """
    clock = show.Clock()
    if bool(shape) == bool(model):
        raise InvalidInputError(f"give a MODEL, or --shape NAME, one of {', '.join(SHAPES)}.")
    if text is not None and not model:
        raise InvalidInputError("--text is for a MODEL: shapes have random weights, and no tokenizer.")
    checkpoint = bool(model) and quantisation(load_config(model)) == METHOD
    if record and not (checkpoint and holds_fold(Path(model))):
        raise InvalidInputError("--record writes into a folded directory; give one as MODEL.")
    rivals = _rivals(against, checkpoint)
    if checkpoint:
        variants = variants_of_checkpoint(model, rivals, dtype)
    else:
        variants = variants_of_dense(_dense(context, model, shape, layers, dtype), rivals, random_fold)
    if text is not None:
        variants = _behind(text, text_field, model, variants)
    report = _measure(shape or model, variants, timing)
    if record and report.pays_up_to is not None:
        record_crossover(Path(model), report.pays_up_to)
    if as_json:
        show.print_json({**report.as_dict(), "peak_bytes": clock.peak_memory, **clock.as_dict()})
        return
    _print(report)
    if report.crossover:
        show.say(_verdict(report) + (" Recorded: prefill auto runs FFNs dense beyond that." if record else ""))
    if checkpoint and text is None:
        show.say("Prompts were random tokens, of which folds usually fix more than of text; give --text for yours.")
    show.say(clock.sentence())


def _behind(text: str, field: str | None, model: str, variants: list[Variant]) -> list[Variant]:
    """The variants of a model with prompts out of a text."""
    ids = torch.tensor(encode(load_tokenizer(model), read_texts([text], field)[0].text))
    return [replace(variant, ids=ids) for variant in variants]


def _rivals(against: str, checkpoint: bool) -> list[str]:
    """The names in `against`. Unknown ones are refused, but for a folded MODEL, where they may be of models."""
    names = [part.strip() for part in against.split(",") if part.strip()]
    unknown = [name for name in names if name not in RIVALS]
    if unknown and not checkpoint:
        raise InvalidInputError(f"there is no variant {unknown[0]!r}; choose from {', '.join(RIVALS)}.")
    return names


def _dense(context: typer.Context, model: str, shape: str, layers: int | None, dtype: str | None) -> PreTrainedModel:
    """The dense model of a checkpoint or a shape, in a dtype that the parts of its fold can have beside it."""
    if not shape:
        loaded = load_dense(model, dtype)
        check_precision(context, loaded.dtype)
        return loaded
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInputError(f"--dtype is {dtype!r}; give one of {', '.join(DTYPES)}.")
    own: torch.dtype = getattr(torch, dtype or "bfloat16")
    check_precision(context, own)
    return shaped_model(shape, layers, own)


def _measure(name: str, variants: list[Variant], timing: Timing) -> SpeedReport:
    """The speed of the variants; says first what is measured on what machine."""
    model = variants[-1].model
    check_length(model, timing.prompt + timing.steps)
    lay_out_all(variants)
    machine = Machine.measured()
    show.say(escape(f"{name} in {dtype_name(model)}: {machine.sentence()}"))
    with show.progress_bars() as progress:
        return measure_speed(name, variants, timing, machine, progress)


def _verdict(report: SpeedReport) -> str:
    most, ratios = report.pays_up_to, report.crossover
    figures = ", ".join(f"{count}: {ratio.value:.2f}x" for count, ratio in ratios.items())
    said = f"Folding one FFN pays up to {most} tokens at once" if most else "Folding does not pay on this machine"
    return f"{said}{' or more' if most == TOKEN_COUNTS[-1] else ''} ({figures})."


def _print(report: SpeedReport) -> None:
    title = f"Decoding in {report.dtype}" + (", steps compiled" if report.compiled else "")
    made = show.table(title, "batch", "", "tokens/s", "fold is faster", "fixed", "MiB", "GB/s", "prompt, s")
    for row in report.rows:
        made.add_row(*_cells(row), end_section=row.variant == FOLDED)
    show.out.print(made)
    show.out.print(
        "[dim]fold is faster: median of the ratios of neighbouring runs, with their quartiles. fixed: share of the "
        "neurons that some token of the batch fixes. MiB: weights read per step, GB/s: per second; this machine reads "
        f"{report.machine.read_bandwidth / 1e9:.1f}. prompt: to the first token.[/]"
    )


def _cells(row: VariantSpeed) -> list[str]:
    ratio, fixed = row.folded_speed_up, row.union_fix_rate
    return [
        str(row.batch),
        row.variant,
        f"{row.tokens_per_second:.2f}",
        "" if row.variant == FOLDED else f"{ratio.value:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})",
        "" if fixed is None else f"{fixed:.1%}",
        f"{row.step_bytes / 2**20:,.0f}",
        f"{row.bytes_per_second / 1e9:.1f}",
        f"{row.first_token_seconds:.2f}",
    ]
