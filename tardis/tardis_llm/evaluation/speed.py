"""What `tardis bench` measures: prompts and decoding of several forms of a model, which take turns in one process."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.loading import dtype_name
from ..errors import InvalidInputError
from ..ffn.weights import nbytes
from ..report import Progress
from ..runtime.linears.head import PredictedHead
from ..runtime.linears.lowbit import LowBitLinear
from ..runtime.modules import FoldedFFN
from ..runtime.placing import FoldedDown, GatedFFN, KeptLinear, Parts, folded_ffns
from ..runtime.prefill import Prefill, set_prefill
from .crossover import ffn_speed_ups, pays_up_to
from .decoder import Decoder
from .fix_rate import count_union
from .machine import Machine
from .turns import Ratio, take_turns
from .variants import FOLDED, Variant


@dataclass(frozen=True)
class Timing:
    """What is timed of every variant.

    Attributes:
        batch_sizes: batch sizes to measure, which are numbers of sequences that are decoded at once.
        prompt: tokens of the prompt.
        prefill: where the folded model sends prompts: through its folds ("folded"), its dense FFNs ("exact"), or by
            what is faster for so many tokens ("auto").
        steps: tokens decoded per run.
        rounds: runs of every variant, which take turns.
        compiled: run each decoding step of every variant as one compiled graph.
    """

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    prompt: int = field(default=64, metadata={"min": 1})
    prefill: Prefill = "folded"
    steps: int = field(default=8, metadata={"min": 1})
    rounds: int = field(default=7, metadata={"min": 2})
    compiled: bool = False

    def __post_init__(self) -> None:
        if min(self.batch_sizes) < 1:
            raise InvalidInputError(f"the batch sizes are {self.batch_sizes}; a batch has one sequence at least.")


@dataclass(frozen=True)
class VariantSpeed:
    """The speed of one variant at one batch size.

    Attributes:
        batch: sequences at once.
        variant: name of the variant.
        tokens_per_second: tokens decoded per second, over the whole batch.
        step_seconds: median seconds of a decoding step.
        folded_speed_up: how many times faster the folded model decodes.
        first_token_seconds: median seconds from a prompt to its first token.
        folded_first_token_speed_up: how many times sooner the folded model has the first token.
        step_bytes: bytes of weights that a step reads.
        bytes_per_second: bytes of weights that are read per second.
        union_fix_rate: share of the neurons that some token of the batch fixes; None for what is not folded.
    """

    batch: int
    variant: str
    tokens_per_second: float
    step_seconds: float
    folded_speed_up: Ratio
    first_token_seconds: float
    folded_first_token_speed_up: Ratio
    step_bytes: float
    bytes_per_second: float
    union_fix_rate: float | None


@dataclass(frozen=True)
class SpeedReport:
    """What `measure_speed` found.

    Attributes:
        model: name of the model.
        dtype: name of the dtype that all variants compute in.
        compiled: whether steps ran as compiled graphs.
        machine: what it was measured on.
        rows: every variant at every batch size.
        crossover: by tokens at once, how many times faster than dense one folded FFN is; empty where the dense weights
            are not there.
    """

    model: str
    dtype: str
    compiled: bool
    machine: Machine
    rows: list[VariantSpeed]
    crossover: dict[int, Ratio]

    @property
    def pays_up_to(self) -> int | None:
        """The most tokens at once up to which folding an FFN is faster; None where the dense weights are not there."""
        return pays_up_to(self.crossover) if self.crossover else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values; those of the machine beside the others."""
        values = asdict(self)
        machine = values.pop("machine")
        return {**values, **machine, "pays_up_to": self.pays_up_to}


def measure_speed(
    model: str, variants: Sequence[Variant], timing: Timing, machine: Machine, progress: Progress
) -> SpeedReport:
    """Time prompts and decoding of several variants.

    Args:
        model: name for the report.
        variants: forms of one model; the last is the folded one.
        timing: what to time.
        machine: what it runs on.
        progress: told of the rounds done.

    Raises:
        InvalidInputError: a variant cannot be compiled, or cannot send prompts where `timing` says.
    """
    rows = [row for size in timing.batch_sizes for row in _rows(variants, size, timing, progress)]
    folded = variants[-1]
    with folded.within():
        stacked = any(ffn.stacked for ffn in folded_ffns(folded.model).values())
        crossover = {} if stacked else ffn_speed_ups(folded.model, progress)
    return SpeedReport(model, dtype_name(folded.model), timing.compiled, machine, rows, crossover)


def _rows(variants: Sequence[Variant], size: int, timing: Timing, progress: Progress) -> list[VariantSpeed]:
    """Decoding and prompts of every variant at one batch size."""
    runs = {variant.name: _Run(variant, size, timing) for variant in variants}
    step, first = {n: r.step_seconds for n, r in runs.items()}, {n: r.first_seconds for n, r in runs.items()}
    steps = take_turns(step, timing.rounds, progress, f"decoding, batch {size}")
    firsts = take_turns(first, timing.rounds, progress, f"prompt, batch {size}")
    return [run.speed(steps, firsts) for run in runs.values()]


class _Run:
    """A variant with a batch of so many prompts, to be timed again and again."""

    def __init__(self, variant: Variant, size: int, timing: Timing) -> None:
        self.variant, self.timing, self.prompt = variant, timing, variant.prompt(size, timing.prompt)
        with variant.within():
            self.decoder = Decoder(variant.model, self.prompt, timing.steps if timing.compiled else None)

    def step_seconds(self) -> float:
        """Seconds of a decoding step."""
        with self.variant.within():
            return self.decoder.seconds(self.timing.steps)

    def first_seconds(self) -> float:
        """Seconds from the prompt to its first token."""
        model = self.variant.model
        with self.variant.within():
            self.decoder.warm_up()
            if self.variant.name != FOLDED:
                return Decoder(model, self.prompt).prefill
            set_prefill(model, self.timing.prefill)
            try:
                return Decoder(model, self.prompt).prefill
            finally:
                set_prefill(model, "folded")

    def speed(self, steps: Mapping[str, Sequence[float]], firsts: Mapping[str, Sequence[float]]) -> VariantSpeed:
        """The figures of the variant, out of the seconds of all."""
        name, size = self.variant.name, len(self.prompt)
        step = statistics.median(steps[name])
        with self.variant.within(), count_union(self.variant.model) as union:
            self.decoder.step_eagerly()
            read = step_bytes(self.variant.model, union.mean)
        return VariantSpeed(
            batch=size,
            variant=name,
            tokens_per_second=size / step,
            step_seconds=step,
            folded_speed_up=Ratio.of(steps[name], steps[FOLDED]),
            first_token_seconds=statistics.median(firsts[name]),
            folded_first_token_speed_up=Ratio.of(firsts[name], firsts[FOLDED]),
            step_bytes=read,
            bytes_per_second=read / step,
            union_fix_rate=union.mean if name == FOLDED else None,
        )


def step_bytes(model: PreTrainedModel, share: float = 0.0) -> float:
    """Bytes of weights that a step of decoding reads: all but embeddings, and fallback weights of fixed neurons only.

    Args:
        model: dense or folded.
        share: of the neurons, that at least one token of the step fixes.
    """
    head = model.get_output_embeddings()
    seen: set[int] = set()

    def read(module: nn.Module) -> float:
        if isinstance(module, FoldedDown | GatedFFN):
            return _ffn_bytes(module.parts, share)
        if isinstance(module, LowBitLinear):
            return module.nbytes
        if isinstance(module, PredictedHead):
            return module.touched
        total = 0.0
        for parameter in module.parameters(recurse=False):
            embedding = isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight)
            if not embedding and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                total += parameter.nbytes
        children = (child for child in module.children() if not isinstance(child, FoldedFFN | KeptLinear))
        downs = (child for child in module.children() if isinstance(child, FoldedDown))
        return total + sum(map(read, [*children, *downs]))

    return read(model)


def _ffn_bytes(parts: Parts, share: float) -> float:
    """Bytes that a folded FFN reads as it lies in memory, if it fixes this share of the neurons, or none if exact."""
    dense, ffn = parts.dense, parts.ffn
    return dense.nbytes if ffn.exact else ffn.current.beside(dense).touched(share) + nbytes(dense.b2)
