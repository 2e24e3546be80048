"""How many neurons a folded model fixes on the text that runs through it, and what it touches there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
        """Mean share of the neurons predicted that are fixed per token, of each fold that predicts.

        Raises:
            InvalidInputError: no token has run yet.
        """
        if not all(self.neurons.values()):
            raise InvalidInputError("no token has run through a folded FFN; run the folded model inside count_fixes.")
        return {name: self.fixed[name] / total for name, total in self.neurons.items()}

    @property
    def mean(self) -> float:
        """Share of all neurons that were fixed; 0 before anything ran."""
        return sum(self.fixed.values()) / max(sum(self.neurons.values()), 1)

    def add(self, name: str, fixed: Tensor) -> None:
        """Count fixed neurons [..., h] of one FFN."""
        self.fixed[name] += int(fixed.sum())
        self.neurons[name] += fixed.numel()


def count_fixes(model: nn.Module) -> AbstractContextManager[FixCounts]:
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
    return _counted(model, lambda x, ffn, dense: fixed_neurons(x, ffn.weights.beside(dense)))


def count_union(model: nn.Module) -> AbstractContextManager[FixCounts]:
    """Within the context, count the neurons that the tokens of a forward fix together, each once.

    Every FFN predicts twice then, so it is for measuring, not for timing.
    """
    return _counted(model, lambda x, ffn, dense: ffn.fixed(x.contiguous(), dense).any(0))


@contextmanager
def _counted(model: nn.Module, fixed: Callable[[Tensor, FoldedFFN, DenseFFN], Tensor]) -> Iterator[FixCounts]:
    """Within the context, count what `fixed` makes of the inputs [tokens, d] of each forward of a folded FFN."""
    ffns = {name: ffn for name, ffn in folded_ffns(model).items() if not ffn.static}  # static ones fix nothing
    counts = FixCounts(dict.fromkeys(ffns, 0), dict.fromkeys(ffns, 0))

    def count(name: str, ffn: FoldedFFN, args: tuple[Tensor, DenseFFN]) -> None:
        x, dense = args
        counts.add(name, fixed(x.reshape(-1, x.shape[-1]), ffn, dense))

    with ExitStack() as hooks:
        for name, ffn in ffns.items():
            hooks.callback(ffn.register_forward_pre_hook(partial(count, name)).remove)
        yield counts


def measured(report: FoldReport, model: nn.Module, rates: dict[str, float]) -> FoldReport:
    """The report with `fix_rate` and `touched` as measured by `count_fixes`; everything else as it was.

    Args:
        report: report of the fold that made the model.
        model: the folded model.
        rates: fix rate by the prefix of the FFN; of static folds there is none, and the report says what they keep.

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
    predicted = {name for name, ffn in ffns.items() if not ffn.static}
    if set(ffns) != {layer.prefix for layer in report.layers} or predicted != set(rates):
        raise InvalidInputError("report and rates are not those of this model; use those of its own checkpoint.")
    layers = [
        dataclasses.replace(layer, fix_rate=rate, touched=ffns[layer.prefix].touched(rate))
        for layer in report.layers
        for rate in [rates.get(layer.prefix, layer.fix_rate)]
    ]
    return dataclasses.replace(report, layers=layers)
