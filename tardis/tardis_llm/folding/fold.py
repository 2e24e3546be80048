"""Fold one FFN: from its weights and the inputs it sees to everything that the folded FFN stores.

    y = x C^T + c + sum over fixed neurons i of r_i(z_i) W2[:, i],   r_i(z) = act(z) - slope_i z - offset_i

The inputs are streamed several times: second moments (for the predictor's rounding), moments of the neurons by what is
predicted (for lines and ranges), and moments against what fixing leaves (for the refit). The published method knows
plain FFNs; those with a gate have lines in two variables, and ranges of the predicted residual.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..calibration.moments import SecondMoments, pre_activation_moments
from ..calibration.neurons import BinnedMoments, PairMoments, ScoreHistogram
from ..calibration.tokens import Tokens, product
from ..config import FoldConfig
from ..ffn.neuron import Neurons, value
from ..ffn.packed import PackedMatrix
from ..ffn.weights import DenseFFN, FoldedWeights
from .lines import fit_gated_lines
from .ranges import Ranges, coverage_ranges_at, error_ranges_at, range_curve
from .refit import fit_fold, fold_error, fold_of_lines
from .ridge import Spectrum, linearity
from .rounding import quantise
from .stack import match_sizes, quantise_fallback, store_fold
from .statistics import Statistics
from .thresholds import Thresholds, score_curve, thresholds_at

_LINE_TOKENS = 4096  # on which gated lines are fitted: three numbers a neuron need no more
_LINE_ROUNDS, _LINE_RATE = 3, 0.25  # fits inside a threshold, and the share of neurons that it leaves outside


@dataclass(frozen=True)
class Inputs:
    """Inputs of one FFN; their second moments are taken once, when first asked for.

    Attributes:
        fit: tokens to fit on.
        heldout: tokens kept apart.
    """

    fit: Tokens
    heldout: Tokens

    @cached_property
    def fit_moments(self) -> SecondMoments:
        """Second moments of `fit`."""
        return SecondMoments.of(self.fit)

    @cached_property
    def covariance(self) -> Tensor:
        """[d, d] fp32, mean of x x^T over `fit`, whatever the tokens' weights.

        Rounding is spread by it. A token that counts for next to nothing elsewhere, such as the first, on which all
        others lean in their attention, must not come out wrong for that.
        """
        return SecondMoments.of(replace(self.fit, target=None, weight=None)).mean_product

    @cached_property
    def heldout_moments(self) -> SecondMoments:
        """Second moments of `heldout`."""
        return SecondMoments.of(self.heldout)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigenvalues and eigenvectors of the centred `fit_moments`, for every ridge regression on them."""
        return Spectrum.of(self.fit_moments)


@dataclass(frozen=True)
class FoldQuality:
    """How well one FFN folded.

    Attributes:
        fix_rate: mean share of the neurons predicted that are fixed, per held-out token.
        error: squared error of the output against the outputs wanted, over their variance, held-out tokens, each by
            its weight.
        linearity: squared error of the best affine map, with no neuron fixed, over the output's variance.
        damping: of the refit; None without refit.
        kept: share of the neurons that every token computes.
    """

    fix_rate: float
    error: float
    linearity: float
    damping: float | None
    kept: float = 0.0


@dataclass(frozen=True)
class Predicted:
    """A predictor of a plain FFN with the statistics of the neurons, binned by what it predicts.

    Attributes:
        predictor: as stored.
        fit: moments of the neurons on the tokens to fit on.
        heldout: moments of the neurons on the tokens kept apart, in the bins of `fit`.
    """

    predictor: PackedMatrix
    fit: BinnedMoments
    heldout: BinnedMoments


@dataclass(frozen=True)
class PredictedGated:
    """A predictor of a gated FFN with the neurons' lines and how their scores are spread.

    Attributes:
        predictor: as stored.
        lines: of the neurons, with open ranges.
        heldout: predicted scores on the tokens kept apart.
    """

    predictor: PackedMatrix
    lines: Neurons
    heldout: ScoreHistogram


AnyPredicted = Predicted | PredictedGated
AnyRanges = Ranges | Thresholds


def predict(ffn: DenseFFN, inputs: Inputs, bits: int, config: FoldConfig) -> AnyPredicted:
    """Round W1 to `bits`, and gather what the neurons do by what the rounded copy predicts."""
    predictor = quantise(ffn.w1, bits, config.group_size, _spread_errors(inputs, config))
    w_hat = predictor.dequantise()
    if ffn.k == 2:
        lines = _gated_lines(ffn, inputs.fit, w_hat)
        return PredictedGated(predictor, lines, _scores(ffn, _products(ffn, inputs.heldout, w_hat), lines))
    mean, deviation = pre_activation_moments(inputs.fit_moments, w_hat, ffn.biases[0])
    fit, heldout = (BinnedMoments.around(ffn.activation, mean, deviation) for _ in range(2))
    for moments, tokens in ((fit, inputs.fit), (heldout, inputs.heldout)):
        for some in tokens.chunks(len(ffn.w1)):
            moments.add(product(some.x, w_hat, ffn.b1), product(some.x, ffn.w1, ffn.b1), some.weight)
    return Predicted(predictor, fit, heldout)


@dataclass(frozen=True)
class _Products:
    """What the up-projections of some tokens are.

    Attributes:
        predicted: [tokens, k h] fp32, by the predictor.
        exact: [tokens, k h] fp32, by W1.
        weight: [tokens] of the tokens; None for 1.
    """

    predicted: Tensor
    exact: Tensor
    weight: Tensor | None


def _products(ffn: DenseFFN, tokens: Tokens, w_hat: Tensor) -> Iterator[_Products]:
    """Those of all tokens, in chunks."""
    for some in tokens.chunks(len(ffn.w1)):
        yield _Products(product(some.x, w_hat, ffn.b1), product(some.x, ffn.w1, ffn.b1), some.weight)


def _gated_lines(ffn: DenseFFN, tokens: Tokens, w_hat: Tensor) -> Neurons:
    """The lines of gated neurons: of their outputs in what is predicted of gate and up. Their ranges are open.

    A neuron that is fixed does not need its line. So the lines are fitted anew to what the last ones leave inside a
    threshold, which has as many neurons outside as are fixed at most budgets. What the tokens give is kept for that:
    two numbers of fp32 for each token and up-projection, 0.9 GB for 14,336 neurons.
    """
    seen = list(_products(ffn, tokens.spread(_LINE_TOKENS), w_hat))
    lines = _fit_lines(ffn, seen, None)
    for _ in range(_LINE_ROUNDS):
        inside = thresholds_at(lines, ffn.gain, _scores(ffn, seen, lines), _LINE_RATE)
        lines = _fit_lines(ffn, seen, inside.neurons)
    return lines


def _fit_lines(ffn: DenseFFN, seen: Iterable[_Products], ranges: Neurons | None) -> Neurons:
    """Least-squares lines, with open ranges, over all tokens or those that are predicted inside `ranges`."""
    device = ffn.w1.device
    moments = PairMoments.zeros(ffn.h, device)
    for some in seen:
        inside = None if ranges is None else ~ranges.outside(some.predicted)
        moments.add(some.predicted, value(some.exact, ffn.act, ffn.k), some.weight, inside)
    slope, offset = fit_gated_lines(moments)
    everything = torch.full((ffn.h,), torch.inf, device=device)
    return Neurons(ffn.activation, -everything, everything, slope.float(), offset.float())


def _scores(ffn: DenseFFN, seen: Iterable[_Products], lines: Neurons) -> ScoreHistogram:
    """How predicted scores are spread, and what leaving the neurons out costs by their score."""
    norm, found = ffn.gain.sqrt().float(), None
    for some in seen:
        score = lines.score(some.predicted, norm)
        error = lines.score(some.exact, norm).square()
        found = found or ScoreHistogram.around(float(score.mean()) or 1.0, score.device)
        found.add(score, error if some.weight is None else error * some.weight[:, None])
    assert found is not None, "there is at least one held-out token"
    return found


def _spread_errors(inputs: Inputs, config: FoldConfig) -> Tensor | None:
    """The covariance by which rounding errors are spread, if they are."""
    return inputs.covariance if config.rounding == "gptq" else None


def choose_ranges(ffn: DenseFFN, predicted: AnyPredicted, fix_rate: float, config: FoldConfig) -> AnyRanges:
    """Ranges and lines by the configured policy, at a fix rate met on the held-out tokens."""
    if isinstance(predicted, PredictedGated):
        return thresholds_at(predicted.lines, ffn.gain, predicted.heldout, fix_rate)
    choose = error_ranges_at if config.policy == "error" else coverage_ranges_at
    return choose(predicted.fit, predicted.heldout, ffn.gain, fix_rate)


def error_left(ffn: DenseFFN, predicted: AnyPredicted, ranges: AnyRanges) -> float:
    """Squared output error per held-out token that ranges, chosen for what was predicted, leave to the lines."""
    if isinstance(ranges, Thresholds):
        assert isinstance(predicted, PredictedGated), "thresholds are of gated neurons"
        return ranges.error(predicted.heldout)
    assert isinstance(predicted, Predicted), "the ranges of plain neurons are of bins"
    return ranges.error(predicted.heldout, ffn.gain)


def error_curve(ffn: DenseFFN, predicted: AnyPredicted, points: int) -> list[tuple[float, float]]:
    """(fix rate, squared output error left in range) on held-out tokens, at prices from fixing none to nearly all."""
    if isinstance(predicted, PredictedGated):
        return score_curve(predicted.heldout, points)
    return range_curve(predicted.fit, predicted.heldout, ffn.gain, points)


@dataclass(frozen=True)
class Solved:
    """A folded FFN with what its quality follows from.

    Attributes:
        weights: what to store.
        fit: statistics of the inputs that the fold was fitted on.
        heldout: statistics of the inputs kept apart.
        damping: of the refit; None without.
    """

    weights: FoldedWeights
    fit: Statistics
    heldout: Statistics
    damping: float | None


def solve(
    ffn: DenseFFN,
    inputs: Inputs,
    predicted: AnyPredicted,
    ranges: AnyRanges,
    config: FoldConfig,
    dtype: torch.dtype,
) -> Solved:
    """The fold for given predictor and ranges.

    With `config.refit`, (C, c) is solved by ridge regression on what fixing leaves; otherwise it is that of the lines,
    as in the paper.

    Args:
        ffn: in fp32.
        inputs: that the FFN sees.
        predicted: the predictor.
        ranges: what is fixed.
        config: settings.
        dtype: of the model, in which the fold is stored unless `config` says otherwise.
    """
    weights = without_fold(ffn, predicted.predictor, ranges.neurons, inputs, config, dtype)
    if weights.stacked:
        weights = match_sizes(ffn, weights, inputs.fit)
    return solved(ffn, inputs, weights, config)


def solved(ffn: DenseFFN, inputs: Inputs, weights: FoldedWeights, config: FoldConfig) -> Solved:
    """The fold beside all else that is stored, whose own fold and bias have their form and no content.

    Args:
        ffn, inputs, config: as of `solve`.
        weights: in the dtype of the model.
    """
    fit = Statistics.of(inputs.fit, inputs.fit_moments, ffn, weights)
    heldout = Statistics.of(inputs.heldout, inputs.heldout_moments, ffn, weights)
    if config.refit:
        weights, damping = fit_fold(ffn, weights, inputs.spectrum, fit, heldout, config.damping, config.rounding)
        return Solved(weights, fit, heldout, damping)
    weight, bias = fold_of_lines(ffn, weights.neurons)
    fold = store_fold(weight, config.storage, weights.dtype, _spread_errors(inputs, config))
    return Solved(replace(weights, fold=fold, bias=bias.to(weights.dtype)), fit, heldout, None)


def without_fold(
    ffn: DenseFFN,
    predictor: PackedMatrix,
    neurons: Neurons,
    inputs: Inputs,
    config: FoldConfig,
    dtype: torch.dtype,
) -> FoldedWeights:
    """What is stored of a folded FFN, but for fold and bias, which have their form and no content.

    Args:
        ffn: in fp32.
        predictor: of its W1.
        neurons: lines and hot ranges.
        inputs: that the FFN sees.
        config: settings.
        dtype: of the model.
    """
    storage, nowhere = config.storage, torch.device("meta")
    form = storage.format(ffn.activation, predictor.bits, gated=ffn.k == 2)
    empty = FoldedWeights.empty(form, ffn.d, ffn.h, dtype, nowhere)
    up, down = quantise_fallback(ffn.w1, ffn.w2, predictor, storage, _spread_errors(inputs, config))
    return replace(empty, predictor=predictor, neurons=stored_neurons(neurons), down=down, up=up)


def finish(
    ffn: DenseFFN,
    inputs: Inputs,
    predicted: AnyPredicted,
    ranges: AnyRanges,
    config: FoldConfig,
    dtype: torch.dtype,
) -> tuple[FoldedWeights, FoldQuality]:
    """The fold for given predictor and ranges, by `solve`, and its quality on held-out tokens."""
    return _judged(solve(ffn, inputs, predicted, ranges, config, dtype), ffn, inputs)


def finished(
    ffn: DenseFFN, inputs: Inputs, weights: FoldedWeights, config: FoldConfig
) -> tuple[FoldedWeights, FoldQuality]:
    """The fold beside all else that is stored, by `solved`, and its quality on held-out tokens."""
    return _judged(solved(ffn, inputs, weights, config), ffn, inputs)


def _judged(solved: Solved, ffn: DenseFFN, inputs: Inputs) -> tuple[FoldedWeights, FoldQuality]:
    weights, fit, heldout = solved.weights, solved.fit, solved.heldout
    quality = FoldQuality(
        fix_rate=heldout.fix_rate,
        error=fold_error(weights, heldout),
        linearity=linearity(inputs.spectrum, fit.x, fit.output, heldout.x, heldout.output),
        damping=solved.damping,
        kept=weights.kept / ffn.h,
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
