"""Least-squares lines: for each neuron the `slope * z + offset` nearest to `act(z)` where its range holds."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration.neurons import BinnedMoments, PairMoments
from ..calibration.sums import divisor


def fit_lines(moments: BinnedMoments, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset, both [h] fp64, of the least-squares line of each neuron over the bins inside its range.

    Where the inside holds no spread of z, the line is constant.

    Args:
        moments: of the neurons.
        inside: [h, BINS] bool.
    """
    n, z, zz, a, az = (moments.sums[1:6] * inside).sum(-1)
    n = divisor(n)
    variance = zz / n - (z / n) ** 2
    covariance = az / n - a * z / n**2
    flat = variance <= 1e-10 * (zz / n)  # above the rounding of sums over a million tokens
    slope = torch.where(flat, 0.0, covariance / variance.clamp_min(1e-300))
    return slope, (a - slope * z) / n


def fit_gated_lines(moments: PairMoments) -> tuple[Tensor, Tensor]:
    """Slopes [2 h], those of the gates first, and offset [h], fp64, of the least-squares line of each gated neuron.

    Args:
        moments: of the neurons.
    """
    n, g, u, gg, gu, uu, a, ag, au = moments.sums
    n = divisor(n)
    g, u, a = g / n, u / n, a / n
    gg, uu, gu, ag, au = gg / n - g * g, uu / n - u * u, gu / n - g * u, ag / n - a * g, au / n - a * u
    gg, uu = (each + 1e-9 * each.mean() + 1e-30 for each in (gg, uu))  # a flat input has no slope
    determinant = (gg * uu - gu * gu).clamp_min(1e-9 * gg * uu)
    slope_g, slope_u = (uu * ag - gu * au) / determinant, (gg * au - gu * ag) / determinant
    return torch.cat([slope_g, slope_u]), a - slope_g * g - slope_u * u


def squared_residuals(moments: BinnedMoments, slope: Tensor, offset: Tensor) -> Tensor:
    """[h, BINS] fp64: in each bin the weighted sum of `(act(z) - slope z - offset)^2` over its tokens."""
    n, z, zz, a, az, aa = moments.sums[1:]
    s, o = slope[:, None].double(), offset[:, None].double()
    return (aa - 2 * s * az - 2 * o * a + s * s * zz + 2 * s * o * z + o * o * n).clamp_min(0)
