"""Activations too small to matter are set to zero while the model runs, and what need not be read for them is counted.

The modules here are for measuring what that costs: every weight is still multiplied.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.inputs import token_count
from ..calibration.stream import Stream
from ..calibration.text import Windows
from ..calibration.tokens import chunks
from ..families.sites import FFNSite
from ..report import Progress
from .ffns import checked_sites, matrices_of, unchanged
from .inputs import stream_of
from .matrices import Scope
from .report import BaselineReport

_CHILD = "skip"
_PATTERNS = 2**15  # of bf16 without its sign, in the order of the magnitudes


class Skip(nn.Module):
    """Sets what is below a threshold to zero.

    Attributes:
        threshold: magnitudes from here on stay.
        saves: bytes of each matrix, by its full name, that would not be read if everything were zero.
    """

    def __init__(self, threshold: float, saves: dict[str, int]) -> None:
        super().__init__()
        self.threshold = threshold  # no buffer: a model's tensors stay those of its checkpoint
        self.saves = saves

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape with zeros in it."""
        return x.masked_fill(x.abs() < self.threshold, 0)


def skip_inputs(layer: nn.Module, skip: Skip) -> None:
    """Let a layer get its inputs with zeros in them."""
    layer.add_module(_CHILD, skip)
    layer.register_forward_pre_hook(_before)


def skip_outputs(layer: nn.Module, skip: Skip) -> None:
    """Let a layer give its outputs with zeros in them."""
    layer.add_module(_CHILD, skip)
    layer.register_forward_hook(_behind)


def _before(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.get_submodule(_CHILD)(args[0]), *args[1:])


def _behind(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    kept: Tensor = layer.get_submodule(_CHILD)(output)
    return kept


@dataclass
class Magnitudes:
    """How many values have which magnitude, rounded to bf16: quantiles without keeping the values.

    Attributes:
        counts: [2^15] by the bits of the magnitude.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(_PATTERNS, dtype=torch.long))

    def add(self, x: Tensor) -> None:
        """Add values [tokens, n] of any float dtype."""
        for chunk in chunks(x, x.shape[1]):
            bits = chunk.abs().bfloat16().view(torch.int16).flatten()
            self.counts += torch.bincount(bits.int(), minlength=_PATTERNS).cpu()

    def threshold(self, share: float) -> float:
        """The least number that this share of the magnitudes, or a little more, is below; 0 for a share of 0."""
        if share <= 0:
            return 0.0
        below = self.counts.cumsum(0)
        bits = torch.searchsorted(below, torch.tensor(share * float(below[-1]) - 1e-6)) + 1
        return float(bits.clamp_max(_PATTERNS - 1).to(torch.int16).view(torch.bfloat16))


@dataclass
class SkipCounts:
    """What the skips of a model left, by the full names of the modules that they belong to."""

    skips: dict[str, Skip]
    kept: dict[str, int]
    seen: dict[str, int]

    def add(self, name: str, skip: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Count what is not zero; called as a forward hook."""
        self.kept[name] += int(output.count_nonzero())
        self.seen[name] += output.numel()

    @property
    def rates(self) -> dict[str, float]:
        """Share of the values of each skip that is zero; 0 where nothing ran."""
        return {name: 1 - self.kept[name] / self.seen[name] if self.seen[name] else 0.0 for name in self.skips}

    def measured(self, report: BaselineReport) -> BaselineReport:
        """The report of the model, with `touched` by what was counted; as it was for a model without skips."""
        if not self.skips:
            return report
        rates = self.rates
        saved: dict[str, float] = {}
        for name, skip in self.skips.items():
            saved |= {matrix: rates[name] * nbytes for matrix, nbytes in skip.saves.items()}
        layers = [replace(row, touched=row.dense - saved.get(row.name, 0.0)) for row in report.layers]
        return replace(report, layers=layers)


@contextmanager
def count_skips(model: nn.Module) -> Iterator[SkipCounts]:
    """Within the context, count what the skips of a model set to zero, whatever runs."""
    skips = {name.rpartition(".")[0]: module for name, module in model.named_modules() if isinstance(module, Skip)}
    counts = SkipCounts(skips, dict.fromkeys(skips, 0), dict.fromkeys(skips, 0))
    with ExitStack() as hooks:
        for name, skip in skips.items():
            hooks.callback(skip.register_forward_hook(partial(counts.add, name)).remove)
        yield counts


def skip_layerwise(
    model: PreTrainedModel,
    windows: Windows,
    name: str,
    asked: float,
    scope: Scope,
    progress: Progress,
    install: Callable[[FFNSite, Tensor, float], None],
) -> BaselineReport:
    """Make FFN after FFN skip, each behind those before it, and count on the held-out windows what they read.

    Args:
        model: of a supported family, in eval mode.
        windows: calibration tokens.
        name: of the method.
        asked: share of the weights to skip.
        scope: must be "ffn".
        progress: told of each block.
        install: makes one FFN skip, given its inputs [tokens, d] and the share.

    Raises:
        UnsupportedModelError: the family is not supported.
        InvalidInputError: another scope, weights or inputs that are not finite, or a model in training mode.
    """
    sites = checked_sites(model, name, scope)
    with tempfile.TemporaryDirectory() as scratch:
        stream, heldout = (stream_of(model, some, scratch) for some in windows)
        for done, site in enumerate(sites):
            progress(f"compressing with {name}", done, len(sites))
            install(site, stream.ffn_inputs(site), asked)
            if done + 1 < len(sites):
                stream.advance()
        progress(f"compressing with {name}", len(sites), len(sites))
        rows = [unchanged(matrix) for site in sites for matrix in matrices_of(site)]
        report = BaselineReport(name, "ffn", asked, token_count(windows.fit), rows)
        return _read_on(heldout, len(sites), model, report)


def _read_on(stream: Stream, blocks: int, model: PreTrainedModel, report: BaselineReport) -> BaselineReport:
    with count_skips(model) as counts:
        for _ in range(blocks):
            stream.advance()
    return counts.measured(report)
