"""Refit: the fold (C, c) that fits best what fixing leaves, by ridge regression in closed form.

With `target = y - fix(x)` the fold minimises `|x C^T + c - target|^2` plus a penalty on C, from streamed second
moments alone. The damping is chosen on tokens that the regression has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.moments import SecondMoments

#: penalties tried, relative to the mean variance of the inputs
DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

_NOISE = 1e-8  # of the inputs' mean square: a variance below it is the rounding of fp32 sums


@dataclass(frozen=True)
class Refit:
    """A refitted fold.

    Attributes:
        weight: [d_out, d_in] fp32, C.
        bias: [d_out] fp32, c.
        damping: the penalty chosen, relative to the mean variance of the inputs.
    """

    weight: Tensor
    bias: Tensor
    damping: float


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues [d] and eigenvectors [d, d], fp64, of the centred moments of the inputs."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, x: SecondMoments) -> Spectrum:
        """Of moments of x beside itself."""
        values, vectors = torch.linalg.eigh(x.centred)
        return cls(values.clamp_min(0), vectors)


def refit(
    spectrum: Spectrum, x: SecondMoments, y: SecondMoments, x_held: SecondMoments, y_held: SecondMoments
) -> Refit:
    """Ridge regression of the target on x, its damping chosen on held-out tokens.

    Args:
        spectrum: of x.
        x: moments of the inputs beside themselves.
        y: moments of the inputs beside the target.
        x_held, y_held: the same on held-out tokens.
    """
    rotated = spectrum.vectors.T @ y.centred
    scale = float(spectrum.values.mean())
    floor = _NOISE * float(x.cross.diagonal().mean()) + 1e-30
    candidates = []
    for damping in DAMPINGS:
        ridge = (spectrum.values + damping * scale + floor)[:, None]
        weight = (spectrum.vectors @ (rotated / ridge)).T
        bias = (y.y_sum - weight @ x.x_sum) / x.count
        candidates.append(Refit(weight, bias, damping))
    best = min(candidates, key=lambda fit: affine_error(fit.weight, fit.bias, x_held, y_held))
    return Refit(best.weight.float(), best.bias.float(), best.damping)


def affine_error(weight: Tensor, bias: Tensor, x: SecondMoments, y: SecondMoments) -> float:
    """Mean over tokens of `|x C^T + c - y|^2`, from moments alone.

    Args:
        weight: [k, d], C.
        bias: [k], c.
        x: moments of x beside itself.
        y: moments of x beside y.
    """
    C, c = weight.double(), bias.double()
    square = ((C @ x.cross) * C).sum() + 2 * c @ (C @ x.x_sum) + x.count * (c @ c)
    mixed = (C * y.cross.T).sum() + c @ y.y_sum
    return float(square - 2 * mixed + y.y_square) / x.count
