"""The neurons that a fold keeps, in few bits, with W2 of these fitted beside everything else that the fold computes.

    y = x C^T + c + fix(x) + sum over kept neurons i of value_i(v) W2[:, i]

W1 is rounded, and W2 is solved by ridge regression together with a fold C, which is then left out: so the kept neurons
make up for what no fold does of the others, and for the rounding of their own W1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.moments import SecondMoments
from ..calibration.tokens import Tokens, product
from ..config import FoldConfig
from ..ffn.neuron import value
from ..ffn.weights import DenseFFN, FoldedWeights
from .fold import Inputs
from .rounding import quantise
from .statistics import outputs

_DAMPING = 1.0  # of W2, relative to the variance of the neuron: of a single one half would be made up for
_FOLD_DAMPING = 3e-3  # of the fold beside it, relative to the mean variance of the inputs


def keep(
    ffn: DenseFFN,
    neurons: Tensor,
    weights: FoldedWeights,
    inputs: Inputs,
    config: FoldConfig,
    fixing: Callable[[Tensor], Tensor] | None = None,
) -> FoldedWeights:
    """The weights with these neurons kept, in `config.fallback_bits`.

    Args:
        ffn: in fp32, all its neurons.
        neurons: [m] numbers of those to keep.
        weights: all else, of the groups' size that kept neurons have, too; fold and bias are not read.
        inputs: that the FFN sees.
        config: settings.
        fixing: for inputs [tokens, d], what fixing adds [tokens, d]; None where no neuron is predicted.
    """
    assert config.fallback_bits is not None, "kept neurons are in few bits"
    bits, size, kept = config.fallback_bits, min(config.group_size, ffn.d), ffn.at(neurons)
    spread = config.rounding == "gptq"
    up = quantise(kept.w1, bits, size, inputs.covariance if spread else None)
    joint = _Joint.of(ffn, replace(kept, w1=up.dequantise()), inputs.fit, fixing)
    covariance = joint.hidden_covariance if spread else None
    down = quantise(joint.refitted_down(), bits, min(size, len(neurons)), covariance)
    return replace(weights, kept_up=up, kept_down=down, kept_bias=up_bias(kept, weights.dtype))


def up_bias(ffn: DenseFFN, dtype: torch.dtype) -> Tensor | None:
    """[k h] the up bias as it is stored; None where there is none, which in fp32 is one of zeros."""
    return None if ffn.b1 is None or not bool(ffn.b1.any()) else ffn.b1.to(dtype)


@dataclass(frozen=True)
class _Joint:
    """Moments of what kept neurons put out and of the inputs, side by side, alone and beside the outputs wanted.

    Attributes:
        kept: the neurons, W1 as it is stored.
        gram: of [hidden, x] beside itself.
        wanted: of [hidden, x] beside the outputs that fixing leaves.
    """

    kept: DenseFFN
    gram: SecondMoments
    wanted: SecondMoments

    @classmethod
    def of(cls, ffn: DenseFFN, kept: DenseFFN, tokens: Tokens, fixing: Callable[[Tensor], Tensor] | None) -> _Joint:
        """Stream the tokens through the kept neurons, and through all where no output is wanted of another model."""
        size = kept.h + ffn.d
        gram, wanted = SecondMoments.zeros(size, size, tokens.device), SecondMoments.zeros(size, ffn.d, tokens.device)
        for some in tokens.chunks(len(ffn.w1)):
            hidden = value(product(some.x, kept.w1, kept.b1), kept.act, kept.k)
            features = torch.cat([hidden, some.x.float()], dim=1)
            y = outputs(ffn, some.x) if some.target is None else some.target
            gram.add(features, features, some.weight)
            wanted.add(features, y if fixing is None else y.float() - fixing(some.x), some.weight)
        return cls(kept, gram, wanted)

    @property
    def hidden_covariance(self) -> Tensor:
        """[m, m] fp32, mean product of what the kept neurons put out."""
        m = self.kept.h
        return (self.gram.cross[:m, :m] / self.gram.count).float()

    def refitted_down(self) -> Tensor:
        """[d, m] fp32: W2 of the kept neurons by ridge regression beside a fold, drawn towards what it is.

        The penalty is relative to the variance of each neuron, as that of the neuron behind the first token's huge
        activation is far beyond all others.
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
