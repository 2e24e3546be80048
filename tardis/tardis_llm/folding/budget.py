"""How one model-wide budget of bytes is split over the layers, so that the estimated loss is least."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Storage
from ..errors import InfeasibleBudgetError
from ..ffn.accounting import RANGE_BYTES, FFNShape


@dataclass(frozen=True)
class Option:
    """One way to fold one layer.

    Attributes:
        bits: of the predictor.
        fix_rate: share of neurons fixed.
        touched: bytes per token.
        loss: estimated increase of the model's loss.
    """

    bits: int
    fix_rate: float
    touched: float
    loss: float


def split_budget(options: list[list[Option]], budget: float) -> list[Option]:
    """One option per layer, of least total loss within `budget` touched bytes.

    Starts at each layer's cheapest option and walks along the convex hulls of (touched, loss), steepest step first; a
    step that no longer fits is passed over for a smaller one.

    Args:
        options: for each layer, what it may choose.
        budget: bytes over all layers.

    Raises:
        InfeasibleBudgetError: even the cheapest options exceed the budget.
    """
    hulls = [convex_hull(layer) for layer in options]
    chosen = [0] * len(hulls)
    left = budget - sum(hull[0].touched for hull in hulls)
    if left < 0:
        raise InfeasibleBudgetError(
            f"the cheapest fold of these layers reads {budget - left:,.0f} bytes a token, {-left:,.0f} more than "
            "allowed; lower the reduction."
        )
    steps = [
        ((hull[k].loss - hull[k + 1].loss) / (hull[k + 1].touched - hull[k].touched), layer, k + 1)
        for layer, hull in enumerate(hulls)
        for k in range(len(hull) - 1)
    ]
    for _, layer, k in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        cost = hulls[layer][k].touched - hulls[layer][chosen[layer]].touched
        if cost <= left:
            left -= cost
            chosen[layer] = k
    return [hull[k] for hull, k in zip(hulls, chosen, strict=True)]


def convex_hull(options: list[Option]) -> list[Option]:
    """The options on the lower convex hull of (touched, loss), by rising bytes and falling loss."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.touched, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (b.loss - a.loss) / max(b.touched - a.touched, 1e-9)


def check_feasible(
    shapes: list[FFNShape], bits: tuple[int, ...], storage: Storage, reduction: float
) -> tuple[int, ...]:
    """The predictor widths, of those allowed, that leave room for fixing at this reduction.

    Raises:
        InfeasibleBudgetError: none does; says the largest feasible reduction and what uses the bytes.
    """
    dense = sum(shape.dense for shape in shapes)
    bits = tuple(b for b in bits if b <= (storage.fallback_bits or b))
    feasible = tuple(b for b in bits if sum(s.always(b, storage) for s in shapes) <= (1 - reduction) * dense)
    if feasible:
        return feasible
    least = min(bits)
    always = sum(shape.always(least, storage) for shape in shapes)
    fold = sum(shape.fold(storage) for shape in shapes)
    ranges = sum(4 * RANGE_BYTES * shape.h for shape in shapes)
    raise InfeasibleBudgetError(
        f"a reduction of {reduction:.4g} is not feasible: with nothing fixed at all the largest is "
        f"{math.floor((1 - always / dense) * 1e4) / 1e4:.4f}. The limit is what every token reads: the fold takes "
        f"{fold / dense:.2%} of the dense bytes, the {least}-bit predictor with its scales and the biases "
        f"{(always - fold - ranges) / dense:.2%}, ranges and lines {ranges / dense:.2%}. Lower --reduction, or allow a "
        "predictor of fewer bits or larger groups."
    )
