"""Statistics of one FFN's inputs from which its fold is solved, gathered in constant memory.

They depend on what is fixed (predictor, ranges, lines and the weights that fixing reads) but not on the fold (C, c), so
they stay true when the fold is exchanged for a refitted one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.moments import SecondMoments
from ..calibration.sums import Sums
from ..calibration.tokens import Tokens, product
from ..ffn.neuron import value
from ..ffn.weights import DenseFFN, FoldedWeights, written_out


@dataclass
class Statistics(Sums):
    """What the inputs of one FFN ask of its fold.

    Statistics of different tokens add up (`merge`), can be taken apart (`subtract`) and can count for less (`decay`).

    Example:
        >>> from tardis_llm.checkpoint.loading import load_model
        >>> from tardis_llm.families.sites import find_ffns
        >>> from tardis_llm.runtime.placing import folded_ffns
        >>> site = find_ffns(model)[0]
        >>> dense, folded = site.weights(), folded_ffns(load_model("folded"))[site.prefix].weights
        >>> day, night = (Statistics.zeros(dense.d, dense.h) for _ in range(2))
        >>> day.add(torch.randn(512, dense.d), dense, folded)
        >>> night.add(torch.randn(8, 32, dense.d), dense, folded)
        >>> day.decay(0.5).merge(night).x.count
        512.0

    Attributes:
        neurons: h, of the FFN.
        x: moments of the inputs beside themselves.
        left: moments of the inputs beside what fixing leaves to the fold, `y - fix(x)`.
        output: moments of the inputs beside the output wanted, y.
        fixed: share of the neurons predicted that are fixed, summed over the tokens.
        tokens: seen, whatever their weight.
    """

    _GIVEN = frozenset({"neurons"})

    neurons: int
    x: SecondMoments
    left: SecondMoments
    output: SecondMoments
    fixed: float = 0.0
    tokens: float = 0.0

    @classmethod
    def zeros(cls, d: int, h: int, device: torch.device | None = None) -> Statistics:
        """Statistics of no tokens, for an FFN of width d with h neurons, on a device; default: the CPU."""
        x, left, output = (SecondMoments.zeros(d, d, device) for _ in range(3))
        return cls(h, x, left, output)

    @classmethod
    def of(cls, tokens: Tokens, moments: SecondMoments, dense: DenseFFN, folded: FoldedWeights) -> Statistics:
        """Statistics of inputs whose moments are known.

        Args:
            tokens: the inputs, and what is wanted of them.
            moments: of the inputs beside themselves.
            dense: the FFN that was folded, in any float dtype.
            folded: what stands for it, but for fold and bias, whose content is not read.
        """
        statistics = replace(cls.zeros(dense.d, dense.h, tokens.device), x=moments)
        statistics._add_targets(tokens, dense, folded)
        return statistics

    @property
    def fix_rate(self) -> float:
        """Mean share of the neurons predicted that are fixed, per token."""
        return self.fixed / self.tokens

    @torch.no_grad()
    def add(self, x: Tensor, dense: DenseFFN, folded: FoldedWeights, weight: Tensor | None = None) -> None:
        """Add inputs, streamed through the dense FFN and through the fixing.

        Args:
            x: [..., d] in any float dtype.
            dense: the FFN that was folded, in any float dtype.
            folded: what stands for it; the content of its fold and bias is not read.
            weight: [...] by which each token counts; None for 1.
        """
        tokens = Tokens(x.flatten(0, -2), None, None if weight is None else weight.flatten().float())
        self.x.add(tokens.x, tokens.x, tokens.weight)
        self._add_targets(tokens, dense, folded)

    def _add_targets(self, tokens: Tokens, dense: DenseFFN, folded: FoldedWeights) -> None:
        ffn = dense.in_fp32()
        computed = exactly(ffn, folded)
        for some in tokens.chunks(len(ffn.w1)):
            x, y = some.x.float(), some.target
            if y is None:
                y = F.linear(value(product(some.x, ffn.w1, ffn.b1), ffn.act, ffn.k), ffn.w2, ffn.b2)
            y = y.float()
            exact, fixed = computed(some.x)
            self.output.add(x, y, some.weight)
            self.left.add(x, y - exact, some.weight)
            self.fixed += fixed
            self.tokens += len(x)


#: what a folded FFN computes exactly for inputs x [tokens, d], and the share of neurons that it fixes, over the tokens
Exactly = Callable[[Tensor], tuple[Tensor, float]]


def exactly(ffn: DenseFFN, folded: FoldedWeights) -> Exactly:
    """All that a folded FFN computes exactly, but for its fold.

    Args:
        ffn: that was folded, in fp32.
        folded: what stands for it; fold and bias are not read.
    """
    if not folded.kept:
        return fixing(ffn, folded)
    kept = folded.kept_ffn(folded.dtype).in_fp32()
    if folded.static:
        return lambda x: (outputs(kept, x), 0.0)
    fixes = fixing(folded.predicted_ffn(folded.dtype).in_fp32(), folded)

    def computed(x: Tensor) -> tuple[Tensor, float]:
        fixed, share = fixes(x)
        return outputs(kept, x) + fixed, share

    return computed


def fixing(ffn: DenseFFN, folded: FoldedWeights) -> Exactly:
    """Fixing, with W1 and W2 as it reads them: those of the FFN, or what stands for them in the model's dtype.

    Args:
        ffn: the neurons that are predicted, in fp32.
        folded: what stands for them; fold, bias and kept neurons are not read.
    """
    neurons, w_hat = folded.neurons.map(Tensor.float), written_out(folded.predictor)
    w1, w2 = (w.float() for w in folded.fallback(folded.dtype)) if folded.stacked else (ffn.w1, ffn.w2)

    def computed(x: Tensor) -> tuple[Tensor, float]:
        outside = neurons.outside(product(x, w_hat, ffn.b1))
        residual = neurons.residual(product(x, w1, ffn.b1)) * outside
        share = float(outside.sum()) / neurons.count
        return product(residual.to(x.dtype), w2, None), share  # in the dtype in which they meet W2

    return computed


def outputs(ffn: DenseFFN, x: Tensor) -> Tensor:
    """Outputs [tokens, d] fp32 of an FFN in fp32 for inputs x [tokens, d], by products in the dtype of x."""
    hidden = value(product(x, ffn.w1, ffn.b1), ffn.act, ffn.k)
    return product(hidden.to(x.dtype), ffn.w2, ffn.b2)
