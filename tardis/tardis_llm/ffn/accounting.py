"""Bytes: what an FFN costs dense and folded. Every byte that is ever reported is counted here, as it is stored.

dense      weights and biases of the dense FFN
touched    what one token reads at batch 1: the fold, the predictor with its scales, ranges and lines, the up bias
           (the range test needs all of it), and the W1 rows and W2 column of each fixed neuron; where these are in
           few bits, what the predictor has of the rows is read already. Neurons that are kept are read always
resident   what stays in memory, fallback weights included
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .weights import DenseFFN, FoldedWeights, Storage, nbytes


@dataclass(frozen=True)
class Cost:
    """Bytes of one FFN.

    Attributes:
        dense: of the dense FFN.
        resident: of the folded one, in memory.
        fold: of the fold and its bias.
        predictor: of the predictor with its scales.
        lines: of ranges and lines, and of the up bias.
        kept: of the neurons that every token computes.
        fixing: of what a token reads beside these four, if it fixes every neuron.
    """

    dense: int
    resident: int
    fold: int
    predictor: int
    lines: int
    kept: int
    fixing: int

    @property
    def always(self) -> int:
        """Bytes that every token reads."""
        return self.fold + self.predictor + self.lines + self.kept

    def touched(self, fix_rate: float) -> float:
        """Bytes that a token reads on average, where it fixes this share of the neurons."""
        return self.always + fix_rate * self.fixing

    def affordable_fix_rate(self, reduction: float) -> float:
        """The fix rate at which a token reads `1 - reduction` of the dense bytes; negative if there is none."""
        return min(1.0, ((1 - reduction) * self.dense - self.always) / self.fixing)


def cost(dense: DenseFFN, folded: FoldedWeights) -> Cost:
    """Bytes of an FFN that is folded.

    Args:
        dense: as it was.
        folded: with or without the dense weights beside it.
    """
    folded = folded.beside(dense)
    resident = folded.nbytes + (0 if folded.stacked else nbytes(dense.b2))
    fold, lines = nbytes(folded.fold, folded.bias), nbytes(folded.neurons, folded.b1)
    return Cost(dense.nbytes, resident, fold, folded.predictor.nbytes, lines, folded.keeps, folded.fixing)


def planned(dense: DenseFFN, storage: Storage, bits: int) -> Cost:
    """Bytes of an FFN if it were folded and stored so, with a predictor of so many bits."""
    form = storage.format(dense.activation, bits, gated=dense.k == 2)
    return cost(dense, FoldedWeights.empty(form, dense.d, dense.h, dense.w1.dtype, torch.device("meta")))


def most_kept(dense: DenseFFN, storage: Storage, reduction: float) -> int:
    """The most neurons that a static fold may keep, in whole groups; 0 or less where the fold alone is too large."""

    def always(kept: int) -> int:
        form = storage.static_format(dense, kept)
        return cost(dense, FoldedWeights.empty(form, dense.d, dense.h, dense.w1.dtype, torch.device("meta"))).always

    step = min(storage.group_size, dense.d)
    each = always(2 * step) - always(step)
    budget = round((1 - reduction) * dense.nbytes)
    return min((1 + (budget - always(step)) // each) * step, dense.h)
