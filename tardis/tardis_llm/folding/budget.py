"""How one model-wide budget of bytes is split over the layers, so that the estimated loss is least."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InfeasibleBudgetError
from ..ffn.accounting import most_kept, planned
from ..ffn.weights import DenseFFN, Storage


@dataclass(frozen=True)
class Option:
    """One way to fold one layer.

    Attributes:
        bits: bits per weight of the predictor.
        fix_rate: share of neurons fixed.
        touched: bytes that a token reads.
        loss: estimated increase of the model's loss.
    """

    bits: int
    fix_rate: float
    touched: float
    loss: float


def split_budget(options: list[list[Option]], budget: float) -> list[Option]:
    """One option per layer, so that the total loss is least and the layers read no more than `budget` bytes.

    Starts at each layer's cheapest option and walks along the convex hulls of (touched, loss), steepest step first; a
    step that no longer fits is passed over for a smaller one.

    Args:
        options: for each layer, what it may choose.
        budget: bytes that a token may read, over all layers.

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


def check_static(ffns: list[DenseFFN], storage: Storage, reduction: float) -> None:
    """Check that a static fold keeps some neurons of every FFN at this reduction.

    Raises:
        InfeasibleBudgetError: it keeps none; says what uses the bytes.
    """
    for ffn in ffns:
        if most_kept(ffn, storage, reduction) < 1:
            raise InfeasibleBudgetError(
                f"a reduction of {reduction:.4g} is not feasible: beside the fold it leaves no room for "
                f"{min(storage.group_size, ffn.d)} kept neurons of an FFN with {ffn.h}. Lower --reduction, store the "
                "fold in fewer bits (--fold-dtype int4), or make the groups smaller (--group-size)."
            )


def check_feasible(ffns: list[DenseFFN], bits: tuple[int, ...], storage: Storage, reduction: float) -> tuple[int, ...]:
    """The predictor widths, of those allowed, that leave room for fixing at this reduction.

    Raises:
        InfeasibleBudgetError: none does; says the largest feasible reduction and what uses the bytes.
    """
    costs = {b: [planned(ffn, storage, b) for ffn in ffns] for b in bits if b <= (storage.fallback_bits or b)}
    dense = sum(ffn.nbytes for ffn in ffns)
    always = {b: sum(cost.always for cost in each) for b, each in costs.items()}
    feasible = tuple(b for b in costs if always[b] <= (1 - reduction) * dense)
    if feasible:
        return feasible
    least = min(costs)
    fold, predictor, lines = (
        sum(getattr(cost, part) for cost in costs[least]) / dense for part in ("fold", "predictor", "lines")
    )
    raise InfeasibleBudgetError(
        f"a reduction of {reduction:.4g} is not feasible: with nothing fixed at all the largest is "
        f"{math.floor((1 - always[least] / dense) * 1e4) / 1e4:.4f}. The limit is what every token reads: the fold "
        f"takes {fold:.2%} of the dense bytes, the {least}-bit predictor with its scales {predictor:.2%}, ranges "
        f"and lines with the up biases {lines:.2%}. Lower --reduction, or allow a predictor of fewer bits or "
        "larger groups."
    )
