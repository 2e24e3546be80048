"""Bytes: what an FFN costs dense and folded, and how one model-wide budget is split over its layers.

`touched` is what one token reads at batch 1: the fold, the predictor with its scales, the ranges and lines, the up bias
(the range test needs all of it), and the W1 row and W2 column of each fixed neuron; where these are stored in few bits,
what the predictor has of the row is read already. `resident` is what stays in memory, fallback weights included.
Everything is counted as stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Storage
from ..errors import InfeasibleBudgetError

_SCALE_BYTES = 2
_RANGE_BYTES = 2  # per number; four numbers a neuron


@dataclass(frozen=True)
class FFNShape:
    """The sizes of one FFN that its bytes depend on.

    Attributes:
        d: width of input and output.
        h: neurons.
        weight_bytes: bytes per dense weight.
        biases: whether up and down have biases.
    """

    d: int
    h: int
    weight_bytes: int
    biases: bool

    @property
    def dense(self) -> int:
        """Bytes of the dense FFN."""
        return self.weight_bytes * (2 * self.d * self.h + (self.d + self.h if self.biases else 0))

    def fold(self, storage: Storage) -> int:
        """Bytes of the fold and its bias."""
        weight = self._rows(self.d, storage.fold_bits, storage.group_size)
        return weight + self.weight_bytes * self.d

    def per_neuron(self, bits: int, storage: Storage) -> int:
        """Bytes that fixing one neuron reads: W1 row, without the predictor's bits if it shares them, and W2 column.

        Args:
            bits: of the predictor.
        """
        column = self._rows(1, storage.fallback_bits, storage.group_size)
        if storage.fallback_bits is None:
            return 2 * column
        return column + self._rows(1, storage.fallback_bits - bits, storage.group_size)

    def always(self, bits: int, storage: Storage, range_bytes: int = _RANGE_BYTES) -> int:
        """Bytes that every token reads: fold, predictor, ranges and lines, up bias."""
        predictor = self._rows(self.h, bits, storage.group_size)
        bias = self.weight_bytes * self.h if self.biases else 0
        return self.fold(storage) + predictor + 4 * range_bytes * self.h + bias

    def touched(self, bits: int, storage: Storage, fix_rate: float) -> float:
        """Bytes that a token reads on average."""
        return self.always(bits, storage) + fix_rate * self.h * self.per_neuron(bits, storage)

    def affordable_fix_rate(self, bits: int, storage: Storage, reduction: float) -> float:
        """The fix rate at which this FFN reads `1 - reduction` of its dense bytes; negative if there is none."""
        left = (1 - reduction) * self.dense - self.always(bits, storage)
        return min(1.0, left / (self.h * self.per_neuron(bits, storage)))

    def _rows(self, count: int, bits: int | None, group_size: int) -> int:
        """Bytes of rows of d weights: dense for no bits given, nothing for zero bits."""
        if bits is None:
            return count * self.d * self.weight_bytes
        if not bits:
            return 0
        return count * (bits * math.ceil(self.d / 8) + math.ceil(self.d / min(group_size, self.d)) * _SCALE_BYTES)


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
    ranges = sum(4 * _RANGE_BYTES * shape.h for shape in shapes)
    raise InfeasibleBudgetError(
        f"a reduction of {reduction:.4g} is not feasible: with nothing fixed at all the largest is "
        f"{math.floor((1 - always / dense) * 1e4) / 1e4:.4f}. The limit is what every token reads: the fold takes "
        f"{fold / dense:.2%} of the dense bytes, the {least}-bit predictor with its scales and the biases "
        f"{(always - fold - ranges) / dense:.2%}, ranges and lines {ranges / dense:.2%}. Lower --reduction, or allow a "
        "predictor of fewer bits or larger groups."
    )
