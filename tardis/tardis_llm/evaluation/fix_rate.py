"""How many neurons a folded model fixes on the text that runs through it, and what it touches there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from ..errors import InvalidInputError
from ..ffn.weights import DenseFFN
from ..report import FoldReport
from ..runtime.modules import FoldedFFN
from ..runtime.placing import folded_ffns, folded_weights
from ..runtime.reference import fixed_neurons


@dataclass
class FixCounts:
    """Neurons fixed, and neurons that could have been, per folded FFN by its prefix."""

    fixed: dict[str, int] = field(default_factory=dict)
    neurons: dict[str, int] = field(default_factory=dict)

    @property
    def rates(self) -> dict[str, float]:
        """Mean share of neurons fixed per token.

        Raises:
            InvalidInputError: no token has run yet.
        """
        if not self.neurons or not all(self.neurons.values()):
            raise InvalidInputError("no token has run through a folded FFN; run the folded model inside count_fixes.")
        return {name: self.fixed[name] / total for name, total in self.neurons.items()}

    def add(self, name: str, fixed: Tensor) -> None:
        """Count fixed neurons [tokens, h] of one FFN."""
        self.fixed[name] += int(fixed.sum())
        self.neurons[name] += fixed.numel()


@contextmanager
def count_fixes(model: nn.Module) -> Iterator[FixCounts]:
    """Within the context, count the neurons that the model's folded FFNs fix, whatever runs.

    Every FFN predicts twice then, so it is for measuring, not for timing.

    Examples:
        >>> from tardis_llm.checkpoint.loading import load_model
        >>> folded = load_model("folded")
        >>> with count_fixes(folded) as counts:
        ...     output = folded(windows)
        >>> [0 < rate < 1 for rate in counts.rates.values()]
        [True, True]
    """
    ffns = folded_ffns(model)
    counts = FixCounts(dict.fromkeys(ffns, 0), dict.fromkeys(ffns, 0))

    def count(name: str, ffn: FoldedFFN, args: tuple[Tensor, DenseFFN]) -> None:
        x, dense = args
        counts.add(name, fixed_neurons(x.reshape(-1, x.shape[-1]), ffn.weights.beside(dense)))

    with _before_each(ffns, count):
        yield counts


@dataclass
class Union:
    """Share of the neurons that at least one token of a forward fixes, summed over forwards and FFNs."""

    share: float = 0.0
    forwards: int = 0

    @property
    def mean(self) -> float:
        """Mean share per forward and FFN; 0 before anything ran."""
        return self.share / max(self.forwards, 1)


@contextmanager
def count_union(model: nn.Module) -> Iterator[Union]:
    """Within the context, count the neurons that a batch fixes together, each once.

    Every FFN predicts twice then, so it is for measuring, not for timing.
    """
    union = Union()

    def count(name: str, ffn: FoldedFFN, args: tuple[Tensor, DenseFFN]) -> None:
        x, dense = args
        fixed = ffn.fixed(x.reshape(-1, x.shape[-1]).contiguous(), dense)
        union.share += float(fixed.any(0).float().mean())
        union.forwards += 1

    with _before_each(folded_ffns(model), count):
        yield union


@contextmanager
def _before_each(ffns: Mapping[str, FoldedFFN], note: Callable[..., None]) -> Iterator[None]:
    """Within the context, call `note` with name, FFN and arguments before each forward of an FFN."""
    with ExitStack() as stack:
        for name, ffn in ffns.items():
            stack.callback(ffn.register_forward_pre_hook(partial(note, name)).remove)
        yield


def measured(report: FoldReport, model: nn.Module, rates: dict[str, float]) -> FoldReport:
    """The report with `fix_rate` and `touched` as measured by `count_fixes`; everything else as it was.

    Args:
        report: report of the fold that made the model.
        model: the folded model.
        rates: fix rate by the prefix of the FFN.

    Raises:
        InvalidInputError: the report is not that of the model.

    Examples:
        >>> from tardis_llm.checkpoint.loading import load_model, load_report
        >>> folded = load_model("folded")
        >>> report = measured(load_report("folded"), folded, {"transformer.h.0.mlp": 0.1, "transformer.h.1.mlp": 0.3})
        >>> report.fix_rate
        0.2
    """
    ffns = folded_weights(model)
    if set(ffns) != {layer.prefix for layer in report.layers} or set(ffns) != set(rates):
        raise InvalidInputError("report and rates are not those of this model; use those of its own checkpoint.")
    layers = [
        dataclasses.replace(layer, fix_rate=rate, touched=ffns[layer.prefix].touched(rate))
        for layer in report.layers
        for rate in [rates[layer.prefix]]
    ]
    return dataclasses.replace(report, layers=layers)
