"""Fold one FFN statically: keep the neurons that a linear map says least of, in few bits, and fold all others.

    y = x C^T + c + sum over kept neurons i of value_i(v) W2[:, i]

No neuron is predicted, and every token computes the same ones. So it reads weights in stretches, where fixing reads
rows here and there, and saves time at every batch. What a folded neuron does on text unlike the calibration text is
lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.moments import SecondMoments
from ..calibration.tokens import Tokens, product
from ..config import FoldConfig
from ..ffn.neuron import value
from ..ffn.weights import DenseFFN, FoldedWeights
from .fold import FoldQuality, Inputs
from .refit import fit_fold, fold_error
from .ridge import affine_errors, linearity, ridge
from .rounding import quantise
from .statistics import Statistics, outputs

_LINE_DAMPING = 1e-3  # of the map that tells how linear a neuron is
_DAMPING = 1.0  # of W2, relative to the variance of the neuron: of a single one half would be made up for
_FOLD_DAMPING = 3e-3  # of the fold beside it, relative to the mean variance of the inputs


def fold_static(
    ffn: DenseFFN, inputs: Inputs, kept: int, config: FoldConfig, dtype: torch.dtype
) -> tuple[FoldedWeights, FoldQuality]:
    """A static fold that keeps so many neurons, and its quality on held-out tokens.

    Args:
        ffn: in fp32.
        inputs: that the FFN sees.
        kept: number of neurons, at least 1.
        config: settings; `fallback_bits` are those of the kept neurons.
        dtype: of the model.
    """
    neurons = error_of_lines(ffn, inputs).topk(kept).indices.sort().values
    weights = _without_fold(ffn, ffn.at(neurons), inputs, config, dtype)
    fit = Statistics.of(inputs.fit, inputs.fit_moments, ffn, weights)
    heldout = Statistics.of(inputs.heldout, inputs.heldout_moments, ffn, weights)
    weights, damping = fit_fold(ffn, weights, inputs.spectrum, fit, heldout, config.damping, config.rounding)
    quality = FoldQuality(
        fix_rate=kept / ffn.h,
        error=fold_error(weights, heldout),
        linearity=linearity(inputs.spectrum, fit.x, fit.output, heldout.x, heldout.output),
        damping=damping,
    )
    return weights, quality


def error_of_lines(ffn: DenseFFN, inputs: Inputs) -> Tensor:
    """[h] fp64, squared error of the output that each neuron leaves where the best affine map of x stands for it.

    Args:
        ffn: in fp32.
        inputs: that it sees.
    """
    x, values = inputs.fit_moments, SecondMoments.zeros(ffn.d, ffn.h, inputs.fit.device)
    for some in inputs.fit.chunks(len(ffn.w1)):
        values.add(some.x, value(product(some.x, ffn.w1, ffn.b1), ffn.act, ffn.k), some.weight)
    best = ridge(inputs.spectrum, x, values, x, values, dampings=(_LINE_DAMPING,))
    return affine_errors(best.weight, best.bias, x, values) * ffn.gain


def _without_fold(
    ffn: DenseFFN, kept: DenseFFN, inputs: Inputs, config: FoldConfig, dtype: torch.dtype
) -> FoldedWeights:
    """What is stored of a static fold, but for fold and bias, which have their form and no content.

    Args:
        ffn: in fp32.
        kept: its kept neurons.
        inputs, config, dtype: as of `fold_static`.
    """
    form = config.storage.static_format(ffn, kept.h)
    bits, size = form.bits, form.group_size
    up = quantise(kept.w1, bits, size, inputs.covariance if config.rounding == "gptq" else None)
    rounded = replace(kept, w1=up.dequantise())
    joint = _Joint.of(ffn, rounded, inputs.fit)
    spread = joint.hidden_covariance if config.rounding == "gptq" else None
    down = quantise(joint.refitted_down(), bits, size, spread)
    empty = FoldedWeights.empty(form, ffn.d, ffn.h, dtype, ffn.w1.device)
    bias = None if kept.b1 is None or not form.kept_bias else kept.b1.to(dtype)
    return replace(empty, kept_up=up, kept_down=down, kept_bias=bias)


@dataclass(frozen=True)
class _Joint:
    """Moments of what kept neurons put out and of the inputs, side by side, alone and beside the outputs wanted.

    Attributes:
        kept: the neurons, W1 as it is stored.
        gram: of [hidden, x] beside itself.
        wanted: of [hidden, x] beside the outputs.
    """

    kept: DenseFFN
    gram: SecondMoments
    wanted: SecondMoments

    @classmethod
    def of(cls, ffn: DenseFFN, kept: DenseFFN, tokens: Tokens) -> _Joint:
        """Stream the tokens through the kept neurons, and through all where no output is wanted of another model."""
        size = kept.h + ffn.d
        gram, wanted = SecondMoments.zeros(size, size, tokens.device), SecondMoments.zeros(size, ffn.d, tokens.device)
        for some in tokens.chunks(len(ffn.w1)):
            hidden = value(product(some.x, kept.w1, kept.b1), kept.act, kept.k)
            features = torch.cat([hidden, some.x.float()], dim=1)
            y = outputs(ffn, some.x) if some.target is None else some.target
            gram.add(features, features, some.weight)
            wanted.add(features, y, some.weight)
        return cls(kept, gram, wanted)

    @property
    def hidden_covariance(self) -> Tensor:
        """[m, m] fp32, mean product of what the kept neurons put out."""
        m = self.kept.h
        return (self.gram.cross[:m, :m] / self.gram.count).float()

    def refitted_down(self) -> Tensor:
        """[d, m] fp32: W2 of the kept neurons by ridge regression beside a fold, drawn towards what it is.

        So they make up for what no fold does of the others. The penalty is relative to the variance of each neuron, as
        that of the neuron behind the first token's huge activation is far beyond all others.
        """
        m, d = self.kept.h, self.kept.d
        prior = torch.cat([self.kept.w2.T.double(), self.kept.w2.new_zeros(d, d, dtype=torch.float64)])
        gram = self.gram.centred
        variance = gram.diagonal()
        damping = variance.clone()
        damping[:m], damping[m:] = _DAMPING * variance[:m], _FOLD_DAMPING * variance[m:].mean()
        left = self.wanted.centred - gram @ prior
        change = torch.cholesky_solve(left, torch.linalg.cholesky(gram + torch.diag(damping + 1e-30)))
        return (prior + change)[:m].T.float().contiguous()
