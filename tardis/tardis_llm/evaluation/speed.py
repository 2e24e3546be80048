"""Speed of decoding, measured so that it cannot flatter: variants of one model take turns in one process.

A machine's speed drifts while it is measured, so two models are only compared by runs next to each other: a speed-up is
the median of the ratios of neighbouring runs, given with their quartiles.
"""

from __future__ import annotations

import inspect
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures import FFNSite, FFNWeights
from ..runtime.ffn import FoldedFFN, fixed_neurons, folded_ffns, install, uninstall
from ..session import Progress

_BANDWIDTH_BYTES = 2**29  # far more than any cache
_BANDWIDTH_RUNS = 5


@dataclass(frozen=True)
class Ratio:
    """How many times faster one variant is than another.

    Attributes:
        value: median of the ratios of neighbouring runs.
        low, high: their quartiles.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> Ratio:
        """From seconds of runs that took turns, two at least."""
        ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
        low, value, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(value, low, high)


@contextmanager
def folded(model: PreTrainedModel, folds: Sequence[tuple[FFNSite, FoldedFFN]]) -> Iterator[None]:
    """Within the context, the model's FFNs are folded; its dense weights stay where they are."""
    for site, ffn in folds:
        install(model, site, ffn)
    try:
        yield
    finally:
        for site, _ in folds:
            uninstall(model, site)


def take_turns(
    runs: dict[str, Callable[[], float]], rounds: int, progress: Progress, stage: str
) -> dict[str, list[float]]:
    """Seconds of each run by name, `rounds` of each, one after the other; one round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        progress(stage, number, rounds + 1)
        for name, run in runs.items():
            taken = run()
            if number:
                seconds[name].append(taken)
    progress(stage, rounds + 1, rounds + 1)
    return seconds


class Decoder:
    """Decodes a batch step by step behind a prompt, always from the same place.

    Args:
        model: in eval mode, as it is when the decoder is made: its cache is what the prompt leaves.
        prompt: [batch, tokens] token ids.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, prompt: Tensor) -> None:
        self.model, self.length = model, prompt.shape[1]
        start = time.perf_counter()
        output = model(input_ids=prompt, use_cache=True, **_last_logits(model))
        self.prefill = time.perf_counter() - start
        self.cache = output.past_key_values
        self.first = output.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def seconds(self, steps: int) -> float:
        """Seconds per step over `steps` greedy steps; the cache is then cut back to the prompt."""
        ids = self.first
        start = time.perf_counter()
        for _ in range(steps):
            output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
            ids = output.logits[:, -1:].argmax(-1)
        taken = (time.perf_counter() - start) / steps
        self.cache.crop(self.length)
        return taken


def _last_logits(model: PreTrainedModel) -> dict[str, Any]:
    """The argument that keeps a prompt's logits to its last token, where the model has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@dataclass
class Union:
    """Share of the neurons that at least one token of a forward fixes, summed over forwards and FFNs."""

    share: float = 0.0
    forwards: int = 0

    @property
    def mean(self) -> float:
        """Per forward and FFN; 0 before anything ran."""
        return self.share / max(self.forwards, 1)


@contextmanager
def count_union(model: nn.Module) -> Iterator[Union]:
    """Within the context, count what a batch reads together. Every FFN predicts twice then: not for timing."""
    union = Union()

    def count(ffn: FoldedFFN, args: tuple[Tensor, FFNWeights]) -> None:
        x, dense = args
        fixed = fixed_neurons(x.reshape(-1, x.shape[-1]), ffn.weights, dense.b1)
        union.share += float(fixed.any(0).float().mean())
        union.forwards += 1

    with ExitStack() as stack:
        for ffn in folded_ffns(model).values():
            stack.callback(ffn.register_forward_pre_hook(partial(count)).remove)
        yield union


def step_bytes(ffns: Sequence[FoldedFFN], dense: Sequence[FFNWeights], share: float) -> float:
    """Bytes of FFN weights that a step reads where a share of the neurons is fixed.

    Args:
        ffns: folded FFNs.
        dense: the weights of each before it was folded; the up bias is read, and without low-bit fallback W1 and W2.
        share: of the neurons, that at least one token of the step fixes.
    """
    total = 0.0
    for ffn, weights in zip(ffns, dense, strict=True):
        stored = sum(tensor.nbytes for tensor in ffn.state_dict().values())
        fallback = ffn.fallback.nbytes if ffn.fallback else weights.w1.nbytes + weights.w2.nbytes
        always = stored - (fallback if ffn.fallback else 0) + (weights.b1.nbytes if weights.b1 is not None else 0)
        total += always + share * fallback
    return total


def weight_bytes(model: PreTrainedModel, sites: Sequence[FFNSite]) -> tuple[int, int]:
    """Bytes of weights that a step of decoding reads: of the FFNs, and of everything else but unused embeddings."""
    ffn = {part.data_ptr(): part.nbytes for site in sites for part in site.weights() if part is not None}
    head = model.get_output_embeddings()
    skipped = {
        module.weight.data_ptr()
        for module in model.modules()
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight)
    }
    other = {p.data_ptr(): p.nbytes for p in model.parameters() if p.data_ptr() not in skipped | ffn.keys()}
    return sum(ffn.values()), sum(other.values())


def cpu_name() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read_bandwidth() -> float:
    """Bytes per second at which this machine reads memory, with torch's threads: the best of a few sums."""
    data = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32)
    best = 0.0
    for _ in range(_BANDWIDTH_RUNS):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best
