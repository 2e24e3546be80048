"""Fold one FFN: from its weights and the inputs it sees to everything that the folded FFN stores.

    y = x C^T + c + sum over fixed neurons i of r_i(z_i) W2[:, i],   r_i(z) = act(z) - slope_i z - offset_i

The inputs are streamed three times: second moments (for the predictor's rounding), moments of the neurons binned by
predicted pre-activation (for lines and ranges), and moments against what fixing leaves (for the refit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.moments import BinnedMoments, SecondMoments, chunks, pre_activation_moments
from ..config import FoldConfig, Rounding
from ..ffn.neuron import Neurons
from ..ffn.packed import PackedMatrix
from ..ffn.weights import DenseFFN, FoldedWeights, Storage, written_out
from .ranges import Ranges, coverage_ranges_at, error_ranges, error_ranges_at, highest_price
from .refit import DAMPINGS, Spectrum, affine_error, refit
from .rounding import quantise
from .stack import quantise_fallback, store_fold
from .statistics import Statistics, Targets, input_moments, target_moments


@dataclass(frozen=True)
class Inputs:
    """Inputs of one FFN [tokens, d], in any float dtype: those to fit on and those kept apart.

    Their second moments are taken once, when first asked for.
    """

    fit: Tensor
    heldout: Tensor

    @cached_property
    def fit_moments(self) -> SecondMoments:
        """Second moments of `fit`."""
        return input_moments(self.fit)

    @cached_property
    def covariance(self) -> Tensor:
        """[d, d] fp32, mean of x x^T over `fit`."""
        return (self.fit_moments.cross / self.fit_moments.count).float()

    @cached_property
    def heldout_moments(self) -> SecondMoments:
        """Second moments of `heldout`."""
        return input_moments(self.heldout)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigenvalues and eigenvectors of the centred `fit_moments`, for every ridge regression on them."""
        return Spectrum.of(self.fit_moments)


@dataclass(frozen=True)
class FoldQuality:
    """How well one FFN folded.

    Attributes:
        fix_rate: mean share of neurons fixed per token, held-out tokens.
        error: squared output error over the output's variance, held-out tokens.
        linearity: the same for the best affine map alone, no neuron fixed.
        damping: of the refit; None without refit.
    """

    fix_rate: float
    error: float
    linearity: float
    damping: float | None


@dataclass(frozen=True)
class Predicted:
    """A predictor with the statistics of the neurons, binned by what it predicts.

    Attributes:
        predictor: as stored.
        fit, heldout: binned moments with the same bins.
    """

    predictor: PackedMatrix
    fit: BinnedMoments
    heldout: BinnedMoments


def predict(ffn: DenseFFN, inputs: Inputs, bits: int, config: FoldConfig) -> Predicted:
    """Round W1 to `bits`, and bin the neurons by what the rounded copy predicts."""
    predictor = quantise(ffn.w1, bits, config.group_size, _spread_errors(inputs, config))
    w_hat = predictor.dequantise()
    mean, deviation = pre_activation_moments(inputs.fit_moments, w_hat, ffn.biases[0])
    fit, heldout = (BinnedMoments.around(ffn.activation, mean, deviation) for _ in range(2))
    for moments, tokens in ((fit, inputs.fit), (heldout, inputs.heldout)):
        for chunk in chunks(tokens, len(ffn.w1)):
            chunk = chunk.float()
            moments.add(F.linear(chunk, w_hat, ffn.b1), F.linear(chunk, ffn.w1, ffn.b1))
    return Predicted(predictor, fit, heldout)


def _spread_errors(inputs: Inputs, config: FoldConfig) -> Tensor | None:
    """The covariance by which rounding errors are spread, if they are."""
    return inputs.covariance if config.rounding == "gptq" else None


def choose_ranges(ffn: DenseFFN, predicted: Predicted, fix_rate: float, config: FoldConfig) -> Ranges:
    """Ranges and lines by the configured policy, at a fix rate met on the held-out tokens."""
    choose = error_ranges_at if config.policy == "error" else coverage_ranges_at
    return choose(predicted.fit, predicted.heldout, ffn.gain, fix_rate)


def error_curve(ffn: DenseFFN, predicted: Predicted, points: int) -> list[tuple[float, float]]:
    """(fix rate, squared output error left in range) on held-out tokens, at prices from fixing none to nearly all."""
    curve = []
    top = 1.05 * highest_price(predicted.fit, ffn.gain)
    for price in (top * torch.logspace(0, -7, points, dtype=torch.float64)).tolist():
        ranges = error_ranges(predicted.fit, ffn.gain, price)
        curve.append((ranges.fix_rate(predicted.heldout), ranges.error(predicted.heldout, ffn.gain)))
    return curve


@dataclass(frozen=True)
class Solved:
    """A folded FFN with what its quality follows from.

    Attributes:
        weights: what to store.
        fit, heldout: what the fold had to explain.
        damping: of the refit; None without.
    """

    weights: FoldedWeights
    fit: Targets
    heldout: Targets
    damping: float | None


def solve(
    ffn: DenseFFN, inputs: Inputs, predicted: Predicted, ranges: Ranges, config: FoldConfig, dtype: torch.dtype
) -> Solved:
    """The fold for given predictor and ranges.

    With `config.refit`, (C, c) is solved by ridge regression on what fixing leaves; otherwise it is that of the lines,
    as in the paper.

    Args:
        config: settings.
        dtype: of the model, in which the fold is stored unless `config` says otherwise.
    """
    neurons = stored_neurons(ranges.neurons)
    spread = _spread_errors(inputs, config)
    predictor, w_hat = predicted.predictor, predicted.predictor.dequantise()
    up, down = quantise_fallback(ffn.w1, ffn.w2, predictor, config.storage, spread)
    weights = FoldedWeights(None, None, predictor, neurons, down, up)
    fixing = weights.fallback(dtype) if weights.stacked else (ffn.w1, ffn.w2)
    fit = target_moments(ffn, inputs.fit, w_hat, neurons, *fixing)
    heldout = target_moments(ffn, inputs.heldout, w_hat, neurons, *fixing)
    if config.refit:
        known = Statistics(inputs.fit_moments, fit), Statistics(inputs.heldout_moments, heldout)
        dampings = DAMPINGS if config.damping is None else (config.damping,)
        solved, damping = _refitted(ffn, weights, *known, inputs.spectrum, config.storage, dtype, spread, dampings)
        return Solved(solved, fit, heldout, damping)
    b1, b2 = ffn.biases
    bias = ffn.w2 @ (neurons.slope.float() * b1 + neurons.offset.float()) + b2
    fold = store_fold(_fold_of_lines(ffn, neurons), config.storage, dtype, spread)
    return Solved(replace(weights, fold=fold, bias=bias.to(dtype)), fit, heldout, None)


def _fold_of_lines(ffn: DenseFFN, neurons: Neurons) -> Tensor:
    """[d, d] fp32, W2 diag(slope) W1."""
    return (ffn.w2 * neurons.slope.float()) @ ffn.w1


def _refitted(
    ffn: DenseFFN,
    weights: FoldedWeights,
    fit: Statistics,
    heldout: Statistics,
    spectrum: Spectrum,
    storage: Storage,
    dtype: torch.dtype,
    spread: Tensor | None,
    dampings: Sequence[float],
) -> tuple[FoldedWeights, float]:
    """The weights with the fold that ridge regression finds, and the damping that it chose."""
    x, left, prior = fit.x, fit.targets.left, _fold_of_lines(ffn, weights.neurons)
    solved = refit(spectrum, x, left, heldout.x, heldout.targets.left, prior, dampings)
    fold = store_fold(solved.weight, storage, dtype, spread)
    bias = (left.y_sum - written_out(fold).to(dtype).double() @ x.x_sum) / x.count
    return replace(weights, fold=fold, bias=bias.to(dtype)), solved.damping


def refit_layer(
    dense: DenseFFN,
    folded: FoldedWeights,
    statistics: Statistics,
    heldout: Statistics | None = None,
    damping: float = 1e-3,
    rounding: Rounding = "gptq",
) -> FoldedWeights:
    """A fold solved anew for other inputs; its predictor, ranges, lines and fallback weights stay.

    Args:
        dense: the FFN as it was before it was folded, in any float dtype.
        folded: its present fold.
        statistics: of the inputs, by `gather`; those of several texts merged, old ones decayed.
        heldout: of other inputs, to choose the damping on.
        damping: of the regression without held-out statistics, relative to the mean variance of the inputs.
        rounding: of a fold in few bits: "gptq" or "nearest".

    Returns:
        The new fold, in the format of the present one: what `FoldedFFN.swap` takes.

    Example:
        >>> from tardis_llm.folding.statistics import gather
        >>> dense, x = DenseFFN(torch.randn(64, 16), None, torch.randn(16, 64), None, "gelu"), torch.randn(512, 16)
        >>> neurons = Neurons("gelu", *(bound * torch.ones(64) for bound in (-1, 1)), torch.ones(64), torch.zeros(64))
        >>> folded = FoldedWeights(torch.zeros(16, 16), torch.zeros(16), quantise(dense.w1, 2, 16), neurons)
        >>> refit_layer(dense, folded, gather(dense, folded, x)).fold.shape
        torch.Size([16, 16])
    """
    form, known = folded.format, heldout or statistics
    assert folded.bias is not None, "a stored fold has a bias"
    spread = (statistics.x.cross / statistics.x.count).float() if rounding == "gptq" else None
    storage, dampings = Storage(form.group_size, form.fold_bits), DAMPINGS if heldout else (damping,)
    spectrum = Spectrum.of(statistics.x)
    how = spectrum, storage, folded.bias.dtype, spread, dampings
    return _refitted(dense.in_fp32(), folded, statistics, known, *how)[0]


def finish(
    ffn: DenseFFN, inputs: Inputs, predicted: Predicted, ranges: Ranges, config: FoldConfig, dtype: torch.dtype
) -> tuple[FoldedWeights, FoldQuality]:
    """`solve`, and the quality of the result on held-out tokens."""
    solved = solve(ffn, inputs, predicted, ranges, config, dtype)
    x, heldout, weights = inputs.heldout_moments, solved.heldout, solved.weights
    assert weights.fold is not None, "solving gives a fold"
    assert weights.bias is not None, "solving gives a fold"
    affine = refit(inputs.spectrum, inputs.fit_moments, solved.fit.output, x, heldout.output)
    variance = heldout.output.y_variance
    quality = FoldQuality(
        fix_rate=heldout.fix_rate,
        error=affine_error(written_out(weights.fold).to(dtype), weights.bias, x, heldout.left) / variance,
        linearity=affine_error(affine.weight, affine.bias, x, heldout.output) / variance,
        damping=solved.damping,
    )
    return weights, quality


def stored_neurons(neurons: Neurons) -> Neurons:
    """Ranges and lines in fp16, or as they are, in fp32, if a finite value overflows fp16.

    Ranges are rounded outwards: they keep what they contain, so that rounding fixes no more than the budget allows.
    """
    if not all(torch.equal(torch.isfinite(v.half()), torch.isfinite(v)) for v in neurons.tensors):
        return neurons
    return replace(neurons.map(Tensor.half), low=_half(neurons.low, -torch.inf), high=_half(neurons.high, torch.inf))


def _half(value: Tensor, towards: float) -> Tensor:
    """fp16 nearest to value on the side of `towards`, which is -inf or inf."""
    half = value.half()
    inside = half.float() > value if towards < 0 else half.float() < value
    return torch.where(inside, torch.nextafter(half, torch.full_like(half, towards)), half)
