"""Ridge regression in closed form, from streamed second moments alone.

The affine map `x C^T + c` minimises its squared error plus a penalty on how far C is from a prior. How heavy the
penalty is, the damping, is chosen on tokens that the regression has not seen, for each output by itself: one may follow
the inputs closely, where another is mostly noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.moments import SecondMoments

#: penalties tried, relative to the mean variance of the inputs
DAMPINGS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)

_NOISE = 1e-8  # of the inputs' mean square: a variance below it is the rounding of fp32 sums


@dataclass(frozen=True)
class AffineMap:
    """What ridge regression finds.

    Attributes:
        weight: [k, d] fp32, C.
        bias: [k] fp32, c.
        damping: [k] the penalty chosen, relative to the mean variance of the inputs.
    """

    weight: Tensor
    bias: Tensor
    damping: Tensor


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of the centred moments of inputs.

    Attributes:
        values: [d] fp64, none negative.
        vectors: [d, d] fp64, one column for each value.
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, x: SecondMoments) -> Spectrum:
        """Decompose the moments of x beside itself."""
        values, vectors = torch.linalg.eigh(x.centred)
        return cls(values.clamp_min(0), vectors)


def ridge(
    spectrum: Spectrum,
    x: SecondMoments,
    y: SecondMoments,
    x_held: SecondMoments,
    y_held: SecondMoments,
    prior: Tensor | None = None,
    dampings: Sequence[float] = DAMPINGS,
) -> AffineMap:
    """Ridge regression of a target on x, the damping of each output chosen on held-out tokens.

    Args:
        spectrum: of x.
        x: moments of the inputs beside themselves.
        y: moments of the inputs beside the target.
        x_held: moments of held-out inputs beside themselves.
        y_held: moments of held-out inputs beside their target.
        prior: [k, d] weight that the penalty draws towards, which tells where little text leaves much open; default:
            zero.
        dampings: penalties to choose from.
    """
    V = spectrum.vectors
    prior = torch.zeros_like(y.cross.T) if prior is None else prior.double()
    mean_x, mean_y = x.x_sum / x.count, y.y_sum / x.count
    rotated = V.T @ (y.centred - x.centred @ prior.T)
    floor = _NOISE * float(x.cross.diagonal().mean()) + 1e-30
    size = float(spectrum.values.mean())
    # The error on held-out tokens in the eigenvectors' coordinates, where each candidate costs one product.
    x_around = _about(x_held, mean_x, mean_x)
    gram, cross = V.T @ x_around @ V, V.T @ (_about(y_held, mean_x, mean_y) - x_around @ prior.T)

    def change(damping: float | Tensor) -> Tensor:
        return rotated / (spectrum.values[:, None] + (damping * size + floor))

    def held_out_error(damping: float) -> Tensor:
        delta = change(damping)
        return (delta * (gram @ delta - 2 * cross)).sum(0)

    best = torch.stack([held_out_error(damping) for damping in dampings]).argmin(0)
    chosen = torch.tensor(dampings, dtype=torch.float64).to(best.device)[best]
    weight = prior + (V @ change(chosen)).T
    return AffineMap(weight.float(), (mean_y - weight @ mean_x).float(), chosen)


def _about(moments: SecondMoments, x: Tensor, y: Tensor) -> Tensor:
    """[d, k] sum of `(x_t - x)(y_t - y)^T` over the tokens of the moments, about the given points."""
    return (
        moments.cross
        - torch.outer(moments.x_sum, y)
        - torch.outer(x, moments.y_sum)
        + moments.count * torch.outer(x, y)
    )


def affine_errors(weight: Tensor, bias: Tensor, x: SecondMoments, y: SecondMoments) -> Tensor:
    """[k] fp64, mean over tokens of the square of each output of `x C^T + c - y`, from moments alone.

    Args:
        weight: [k, d], C.
        bias: [k], c.
        x: moments of x beside itself.
        y: moments of x beside y.
    """
    C, c = weight.double(), bias.double()
    square = ((C @ x.cross) * C).sum(1) + 2 * c * (C @ x.x_sum) + x.count * c.square()
    mixed = (C * y.cross.T).sum(1) + c * y.y_sum
    return (square - 2 * mixed + y.y_square) / x.count


def affine_error(weight: Tensor, bias: Tensor, x: SecondMoments, y: SecondMoments) -> float:
    """Mean over tokens of `|x C^T + c - y|^2`, from moments alone; arguments as `affine_errors`."""
    return float(affine_errors(weight, bias, x, y).sum())


def linearity(
    spectrum: Spectrum, x: SecondMoments, y: SecondMoments, x_held: SecondMoments, y_held: SecondMoments
) -> float:
    """Squared error that the best affine map of x leaves of y, over the variance of y, on held-out tokens.

    The arguments are those of `ridge`.
    """
    best = ridge(spectrum, x, y, x_held, y_held)
    return affine_error(best.weight, best.bias, x_held, y_held) / y_held.y_variance
