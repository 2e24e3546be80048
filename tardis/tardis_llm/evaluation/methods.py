"""The methods that can be compared, by name: folds of several kinds, every baseline, and the dense model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .. import baselines
from ..baselines import BaselineReport, Scope
from ..calibration.text import Windows
from ..config import FoldConfig
from ..errors import InvalidInputError
from ..pipeline.fold import fold
from ..report import FoldReport, Progress

DENSE = "dense"
#: settings of each kind of fold, beside the reduction
FOLDS: dict[str, dict[str, Any]] = {
    "tardis": {},
    "tardis-paper": {"policy": "coverage", "refit": False, "predictor_bits": 2},
    "tardis-int8": {"select": "dynamic", "fold_bits": 8, "fallback_bits": 8},
    "tardis-int4": {"select": "dynamic", "fold_bits": 4, "fallback_bits": 4},
    "tardis-mixed-int4": {"select": "mixed", "fold_bits": 4, "fallback_bits": 4},
    "tardis-static-int4": {
        **{"select": "static", "fold_bits": 4, "fallback_bits": 4},
        **{"predictor_bits": None, "remainder_bits": None, "split": "uniform"},  # of dynamic folds beside it
    },
}
NAMES = (*FOLDS, *baselines.NAMES)


@dataclass(frozen=True)
class Method:
    """A method and how much it is to remove.

    Attributes:
        name: a name in `NAMES`, or "dense".
        reduction: for folds, the share of FFN bytes that a token no longer reads; for masks and what skips, the share
            of weights removed or skipped; None for what has a fixed size.
    """

    name: str
    reduction: float | None = None

    @property
    def label(self) -> str:
        """Name and reduction, as `parse` reads them."""
        return self.name if self.reduction is None else f"{self.name}@{self.reduction:g}"


def parse(names: str, reductions: Sequence[float]) -> list[Method]:
    """Methods out of "tardis,wanda@0.7,gptq4": with @ at that reduction, otherwise at each of `reductions`.

    Raises:
        InvalidInputError: an unknown name, or a reduction that is none or does not suit the method.
    """
    found: list[Method] = []
    for part in filter(None, (part.strip() for part in names.split(","))):
        name, _, given = part.partition("@")
        found += _at(name, [_number(part, given)] if given else list(reductions), bool(given))
    if not found:
        raise InvalidInputError(f"no methods named; choose from {', '.join(NAMES)}.")
    return list(dict.fromkeys(found))


def _at(name: str, reductions: list[float], explicit: bool) -> list[Method]:
    """The method `name` at each reduction, or once if it has a fixed size."""
    if name not in FOLDS:
        if name == DENSE:
            return []  # is always measured
        if name not in baselines.NAMES and not name.startswith(("rtn", "gptq")):
            raise InvalidInputError(f"there is no method {name!r}; choose from {', '.join(NAMES)}.")
        name = baselines.full_name(name)
        if not baselines.needs_reduction(name):
            if explicit:
                raise InvalidInputError(f"{name} has a fixed size; leave out @ and what follows it.")
            return [Method(name)]
    for reduction in reductions:
        if not 0 < reduction < 1:
            raise InvalidInputError(f"{name} is asked for a reduction of {reduction}; give one between 0 and 1.")
    return [Method(name, reduction) for reduction in reductions]


def _number(part: str, given: str) -> float:
    try:
        return float(given)
    except ValueError as error:
        raise InvalidInputError(f"{part!r} has no number behind @; write for example tardis@0.8.") from error


def apply_method(
    method: Method,
    model: PreTrainedModel,
    windows: Windows,
    config: FoldConfig,
    scope: Scope,
    work: Path,
    progress: Progress,
) -> FoldReport | BaselineReport:
    """Apply a method to a model in place.

    Args:
        method: other than "dense".
        config: settings of a fold that its kind does not set.
        scope: what baselines compress; folds are of FFNs only.
        work: folder that keeps finished layers of a fold; what it holds already is used.

    Raises:
        InfeasibleBudgetError: the method does not fit into so few bytes.
        InvalidInputError, UnsupportedModelError: as `fold` and `apply_baseline`.
    """
    if method.name not in FOLDS:
        return baselines.apply_baseline(method.name, model, windows, method.reduction, scope, progress)
    settings = replace(config, reduction=method.reduction or config.reduction, **FOLDS[method.name])
    return fold(model, windows, settings, work, resume=True, progress=progress)
