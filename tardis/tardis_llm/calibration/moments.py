"""Streamed second moments of an FFN's inputs, alone and beside targets.

Everything is accumulated chunk by chunk in fp64, so memory does not grow with the number of tokens. A token may count
for more or less than others: see `Tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sums import Sums
from .tokens import Tokens


@dataclass
class SecondMoments(Sums):
    """Count, sum and `X^T Y` of streamed rows: `X` beside itself for a Gram matrix, or beside targets.

    Attributes:
        count: tokens seen, each by its weight.
        x_sum: [d] sum of x.
        y_sum: [k] sum of y.
        cross: [d, k] sum of x y^T.
        y_square: [k] sum of the squares of y.
    """

    count: float
    x_sum: Tensor
    y_sum: Tensor
    cross: Tensor
    y_square: Tensor

    @classmethod
    def zeros(cls, d: int, k: int, device: torch.device | None = None) -> SecondMoments:
        """Moments of no tokens, for d inputs and k targets, on a device; default: the CPU."""
        shapes = (d,), (k,), (d, k), (k,)
        return cls(0, *(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @classmethod
    def of(cls, tokens: Tokens) -> SecondMoments:
        """Moments of the inputs of tokens beside themselves."""
        x = tokens.x
        moments = cls.zeros(x.shape[1], x.shape[1], tokens.device)
        moments.add(x, x, tokens.weight)
        return moments

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add rows x [tokens, d] and y [tokens, k] in any float dtype; half precision is computed with in fp32.

        Args:
            x, y: rows, on any device.
            weight: [tokens] by which each row counts; None for 1.
        """
        width = max(x.shape[1], y.shape[1])
        for some in Tokens(x, y, weight, self.cross.device).chunks(width):
            assert some.target is not None, "that is y"
            rows, targets = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (some.x, some.target))
            self._add(rows, targets, some.weight)

    def _add(self, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        weighted = x if weight is None else x * weight[:, None].to(x.dtype)
        counts = torch.ones(len(x), device=x.device) if weight is None else weight
        self.count += float(counts.sum(dtype=torch.float64))
        self.x_sum += weighted.sum(0, dtype=torch.float64)
        self.y_sum += counts.double() @ y.double()
        self.cross += weighted.T @ y
        self.y_square += counts.double() @ y.double().square()

    @property
    def centred(self) -> Tensor:
        """[d, k] covariance times count: `sum (x - mean x)(y - mean y)^T`."""
        return self.cross - torch.outer(self.x_sum, self.y_sum) / (self.count or 1)

    @property
    def mean_product(self) -> Tensor:
        """[d, k] fp32, mean of x y^T."""
        return (self.cross / self.count).float()

    @property
    def y_variance(self) -> float:
        """Mean of `|y - mean y|^2`, never quite zero."""
        spread = self.y_square - self.y_sum.square() / self.count
        return max(float(spread.sum()) / self.count, 1e-30)


def pre_activation_moments(x: SecondMoments, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, both [h] fp32, of `x w^T + b` from the Gram moments of x alone.

    Args:
        x: moments of x beside itself.
        w: [h, d] fp32.
        b: [h] fp32.
    """
    mean = (x.x_sum / x.count).float()
    covariance = (x.centred / x.count).float()
    variance = ((w @ covariance) * w).sum(1).clamp_min(0)
    return w @ mean + b, variance.sqrt()
