"""Streamed statistics of an FFN's inputs: second moments, and moments of its neurons.

Everything is accumulated chunk by chunk in fp64, so memory does not grow with the number of tokens. All of it is sums
over tokens, which is what makes statistics of different texts add up. A token may count for more or less than others:
see `Tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidInputError
from ..ffn.activations import activation

#: bins per neuron, and how many standard deviations they span to each side; the outermost bins are open
BINS, SPAN = 96, 5.0
#: tokens of a chunk: enough for efficient matrix products, few enough that temporaries stay below 16 MiB
_CHUNK_TOKENS, _CHUNK_ELEMENTS = 512, 2**22


def chunk_size(width: int) -> int:
    """How many tokens at once have [tokens, width] temporaries that stay small."""
    return min(_CHUNK_TOKENS, max(1, _CHUNK_ELEMENTS // width))


def chunks(x: Tensor, width: int) -> Iterator[Tensor]:
    """Split x [tokens, ...] into chunks whose [chunk, width] temporaries stay small."""
    return iter(x.split(chunk_size(width)))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` in fp32 for x [tokens, in], weight [out, in] and bias [out] in fp32.

    Inputs in bf16, which are what a model in bf16 gives, are multiplied in bf16 where the processor is made for it:
    several times as fast, and rounded by far less than any low-bit copy.
    """
    if x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        y = F.linear(x, weight.bfloat16()).float()
        return y if bias is None else y + bias
    return F.linear(x.float(), weight, bias)


@dataclass
class Sums:
    """Statistics that are sums over tokens: those of disjoint tokens add up, and old tokens can come to count less.

    A dataclass of tensors, numbers and other sums. Whatever `_GIVEN` names says what is summed, and must agree.
    """

    _GIVEN: ClassVar[frozenset[str]] = frozenset()

    def merge(self, other: Self) -> Self:
        """The statistics of both texts, as if they had been one.

        Raises:
            InvalidInputError: they are of other FFNs, or of other bins.

        Example:
            >>> one, two = SecondMoments.zeros(2, 2), SecondMoments.zeros(2, 2)
            >>> one.add(torch.ones(3, 2), torch.ones(3, 2))
            >>> two.add(torch.zeros(5, 2), torch.zeros(5, 2))
            >>> one.merge(two).count
            8
        """
        return self._plus(other, 1)

    def subtract(self, other: Self) -> Self:
        """The statistics without those of a text that is part of them: the inverse of `merge`, but for fp64 rounding.

        Raises:
            InvalidInputError: they are of other FFNs, or of other bins.
        """
        return self._plus(other, -1)

    def decay(self, share: float) -> Self:
        """The statistics in which every token so far counts `share` of what it did; counts are no whole numbers then.

        Raises:
            InvalidInputError: the share is not from 0 to 1.
        """
        if not 0 <= share <= 1:
            raise InvalidInputError(f"statistics are decayed to {share!r} of their weight; give a share from 0 to 1.")
        return replace(self, **{name: _scaled(value, share) for name, value in self._sums()})

    def _sums(self) -> list[tuple[str, Any]]:
        names = [field.name for field in fields(self) if field.name not in self._GIVEN]
        return [(name, getattr(self, name)) for name in names]

    def _plus(self, other: Self, sign: int) -> Self:
        for name in self._GIVEN:
            if not _equal(getattr(self, name), getattr(other, name)):
                raise InvalidInputError(f"statistics of another {name} do not add up; gather both for the same fold.")
        summed = {name: _summed(value, getattr(other, name), sign) for name, value in self._sums()}
        return replace(self, **summed)


def _scaled(value: Any, share: float) -> Any:
    return value.decay(share) if isinstance(value, Sums) else value * share


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def _summed(one: Any, other: Any, sign: int) -> Any:
    if isinstance(one, Sums):
        return one._plus(other, sign)
    if isinstance(one, Tensor) and one.shape != other.shape:
        raise InvalidInputError(
            f"statistics of shape {list(other.shape)} do not add up with those of shape {list(one.shape)}; gather both "
            "for the same fold."
        )
    return one + sign * other


def divisor(count: Tensor) -> Tensor:
    """Counts to divide sums by: 1 in place of 0, where the sums are 0, too."""
    return count.masked_fill(count <= 0, 1)


@dataclass(frozen=True)
class Tokens:
    """What an FFN sees of a text, and what is wanted of it.

    Attributes:
        x: [tokens, d] inputs, in any float dtype.
        target: [tokens, d] outputs wanted; None for those of the dense FFN at x.
        weight: [tokens] fp32, by which a token's squared error counts; None for 1.
    """

    x: Tensor
    target: Tensor | None = None
    weight: Tensor | None = None

    def chunks(self, width: int) -> Iterator[Tokens]:
        """The tokens in parts whose [tokens, width] temporaries stay small."""
        size = chunk_size(width)
        for start in range(0, len(self.x), size):
            at = slice(start, start + size)
            target, weight = (None if part is None else part[at] for part in (self.target, self.weight))
            yield Tokens(self.x[at], target, weight)


@dataclass
class SecondMoments(Sums):
    """Count, sum and `X^T Y` of streamed rows: `X` beside itself for a Gram matrix, or beside targets.

    Attributes:
        count: tokens seen, each by its weight.
        x_sum: [d] sum of x.
        y_sum: [k] sum of y.
        cross: [d, k] sum of x y^T.
        y_square: sum of |y|^2.
    """

    count: float
    x_sum: Tensor
    y_sum: Tensor
    cross: Tensor
    y_square: float = 0.0

    @classmethod
    def zeros(cls, d: int, k: int) -> SecondMoments:
        """Moments of no tokens, for d inputs and k targets."""
        x_sum, y_sum, cross = (torch.zeros(shape, dtype=torch.float64) for shape in ((d,), (k,), (d, k)))
        return cls(0, x_sum, y_sum, cross)

    @classmethod
    def of(cls, tokens: Tokens) -> SecondMoments:
        """Moments of the inputs of tokens beside themselves."""
        x = tokens.x
        moments = cls.zeros(x.shape[1], x.shape[1])
        moments.add(x, x, tokens.weight)
        return moments

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add rows x [tokens, d] and y [tokens, k] in any float dtype; half precision is computed with in fp32.

        Args:
            x, y: rows.
            weight: [tokens] by which each row counts; None for 1.
        """
        width = max(x.shape[1], y.shape[1])
        for some in Tokens(x, y, weight).chunks(width):
            assert some.target is not None, "that is y"
            rows, targets = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (some.x, some.target))
            self._add(rows, targets, some.weight)

    def _add(self, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        weighted = x if weight is None else x * weight[:, None].to(x.dtype)
        squares = (y * y).sum(1, dtype=torch.float64)
        self.count += len(x) if weight is None else float(weight.sum(dtype=torch.float64))
        self.x_sum += weighted.sum(0, dtype=torch.float64)
        self.y_sum += y.sum(0, dtype=torch.float64) if weight is None else (weight.double() @ y.double())
        self.cross += weighted.T @ y
        self.y_square += float(squares.sum() if weight is None else weight.double() @ squares)

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
        spread = self.y_square - float(self.y_sum.square().sum()) / self.count
        return max(spread / self.count, 1e-30)


@dataclass
class BinnedMoments(Sums):
    """Per neuron and bin of `u`, the moments from which any line's error in any interval follows exactly.

    `u` is what a range is tested on: the predicted pre-activation `zhat`. Inside a bin, with `a = act(z)`,
    `sum (a - s z - o)^2` for every line (s, o) is a combination of the six sums below, so lines and ranges are
    fitted without another pass over the tokens, and the noise of the predictor is part of the statistics. A token's
    weight is in all of them but the count, which tells how much a range fixes.

    Attributes:
        activation: of the neurons, a name that `activation` takes.
        edge: [h] lower edge of the first bin.
        width: [h] width of a bin.
        sums: [7, h, BINS] fp64: count, then weighted 1, z, z^2, a, a z, a^2.
        tokens: tokens seen, a fraction after `decay`.
    """

    _GIVEN = frozenset({"activation", "edge", "width"})
    activation: str
    edge: Tensor
    width: Tensor
    sums: Tensor
    tokens: float = 0

    @classmethod
    def around(cls, activation: str, mean: Tensor, deviation: Tensor) -> BinnedMoments:
        """Empty bins over mean +- SPAN deviations, both [h] fp32."""
        deviation = deviation.clamp_min(1e-6 * (1 + mean.abs()))
        sums = torch.zeros(7, len(mean), BINS, dtype=torch.float64)
        return cls(activation, mean - SPAN * deviation, 2 * SPAN / BINS * deviation, sums)

    def add(self, u: Tensor, z: Tensor, weight: Tensor | None = None) -> None:
        """Add tokens: u and z are [tokens, h] fp32, weight [tokens] or None for 1."""
        u, z = u.T.contiguous(), z.T.contiguous()
        bins = ((u - self.edge[:, None]) / self.width[:, None]).clamp_(0, BINS - 1).long()
        a, z = activation(self.activation)(z).double(), z.double()
        one = torch.ones_like(z)
        w = one if weight is None else weight.double().expand_as(z)
        wz, wa = w * z, w * a
        for total, value in zip(self.sums, (one, w, wz, wz * z, wa, wa * z, wa * a), strict=True):
            total.scatter_add_(1, bins, value)
        self.tokens += u.shape[1]

    @property
    def count(self) -> Tensor:
        """[h, BINS] tokens per bin."""
        return self.sums[0]

    def edges(self) -> Tensor:
        """[h, BINS + 1] fp32: the bins' edges; the first is -inf and the last inf, as the outer bins are open."""
        steps = torch.arange(BINS + 1, dtype=torch.float32)
        edges = self.edge[:, None] + self.width[:, None] * steps
        edges[:, 0], edges[:, -1] = -torch.inf, torch.inf
        return edges


@dataclass
class PairMoments(Sums):
    """Per gated neuron, the weighted moments of its predicted (g, u) and its output: a line follows from them.

    Attributes:
        sums: [9, h] fp64: 1, g, u, g^2, g u, u^2, a, a g, a u for the output a.
    """

    sums: Tensor

    @classmethod
    def zeros(cls, h: int) -> PairMoments:
        """Moments of no tokens."""
        return cls(torch.zeros(9, h, dtype=torch.float64))

    def add(self, v: Tensor, a: Tensor, weight: Tensor | None = None) -> None:
        """Add tokens: predicted v [tokens, 2 h] and outputs a [tokens, h], fp32; weight [tokens] or None for 1."""
        g, u = v.chunk(2, -1)
        w = torch.ones(len(v)) if weight is None else weight
        products = (torch.ones_like(g), g, u, g * g, g * u, u * u, a, a * g, a * u)
        for total, product in zip(self.sums, products, strict=True):
            total += w @ product


#: bins of a `ScoreHistogram`: steps of 1/64 octave over 40 octaves around the unit
_STEPS, _OCTAVES = 64, 40


@dataclass
class ScoreHistogram(Sums):
    """How many neurons of an FFN have which predicted score, and what leaving them out costs.

    Attributes:
        unit: a typical score, in the middle of the bins.
        sums: [2, bins] fp64: pairs of a token and a neuron, and their weighted squared error in the FFN's output.
        tokens: tokens seen, a fraction after `decay`.
    """

    _GIVEN = frozenset({"unit"})
    unit: float
    sums: Tensor
    tokens: float = 0

    @classmethod
    def around(cls, unit: float) -> ScoreHistogram:
        """Empty bins around a typical score."""
        return cls(unit, torch.zeros(2, _STEPS * _OCTAVES, dtype=torch.float64))

    def add(self, score: Tensor, error: Tensor) -> None:
        """Add predicted scores and weighted squared errors, both [tokens, h] fp32."""
        bins = ((score / self.unit).log2_().mul_(_STEPS).add_(_STEPS * _OCTAVES // 2)).nan_to_num_(1e9, 1e9, 0.0)
        bins = bins.clamp_(0, self.sums.shape[1] - 1).long().flatten()
        self.sums[0] += torch.bincount(bins, minlength=self.sums.shape[1])
        self.sums[1] += torch.bincount(bins, error.flatten().double(), self.sums.shape[1])
        self.tokens += len(score)

    def rate_above(self) -> Tensor:
        """[bins + 1] share of the pairs in bins from each on: the fix rate with that edge as threshold."""
        return F.pad(self.sums[0].flip(0).cumsum(0).flip(0), (0, 1)) / self.sums[0].sum().clamp_min(1)

    def error_below(self) -> Tensor:
        """[bins + 1] mean squared error per token of the bins below each edge, neurons taken as uncorrelated."""
        return F.pad(self.sums[1].cumsum(0), (1, 0)) / max(self.tokens, 1)

    def edge(self, number: Tensor | int) -> Tensor:
        """The lower edge of a bin; that of the first is 0 and that behind the last is infinite."""
        at = torch.as_tensor(number, dtype=torch.float64)
        value = self.unit * torch.exp2((at - _STEPS * _OCTAVES // 2) / _STEPS)
        return value.where(at > 0, 0.0).where(at < self.sums.shape[1], torch.inf)


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
