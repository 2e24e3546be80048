"""Refit: the fold (C, c) that fits best what fixing leaves, from statistics of the inputs alone.

With `target = y - fix(x)` the fold minimises `|x C^T + c - target|^2` plus a penalty on how far C is from what the
lines give, `W2 diag(slope) W1`. `refit_layer` is all that is needed for a fold to follow its inputs: it takes no model
and no files, and gives what `FoldedFFN.swap` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import Rounding
from ..errors import InvalidInputError
from ..ffn.neuron import Neurons
from ..ffn.packed import PackedMatrix
from ..ffn.weights import DenseFFN, FoldedWeights, stored, written_out
from .ridge import DAMPINGS, Spectrum, affine_errors, ridge
from .stack import store_fold
from .statistics import Statistics

_DAMPING = 0.1  # where nothing is held out to choose it on: most layers of the sample choose that or a tenth of it


@torch.no_grad()
def refit_layer(
    dense: DenseFFN,
    folded: FoldedWeights,
    statistics: Statistics,
    heldout: Statistics | None = None,
    damping: float | None = None,
    rounding: Rounding = "gptq",
) -> FoldedWeights:
    """Solve the fold of one FFN anew, so that it fits the inputs of the statistics best.

    Args:
        dense: the FFN that was folded, in any float dtype.
        folded: what stands for it; predictor, ranges, lines and what fixing reads stay as they are.
        statistics: of the inputs to fit, gathered with `dense` and `folded`. They may be merged and decayed.
        heldout: statistics of other inputs, to choose the damping on.
        damping: ridge penalty, relative to the inputs' mean variance; default: chosen on `heldout`, 0.1 without.
        rounding: of a fold in few bits: "gptq" lets the weights not yet rounded make up for each error, "nearest"
            rounds every weight by itself.

    Returns:
        The weights with the new fold and bias, stored in the form of the present ones.

    Raises:
        InvalidInputError: the statistics are of an FFN of another size, of no tokens, or not finite.

    Example:
        >>> from tardis_llm.folding.statistics import Statistics
        >>> from tardis_llm.checkpoint.loading import load_model
        >>> from tardis_llm.families.sites import find_ffns
        >>> from tardis_llm.runtime.placing import folded_ffns
        >>> site = find_ffns(model)[0]
        >>> dense, ffn = site.weights(), folded_ffns(load_model("folded"))[site.prefix]
        >>> statistics = Statistics.zeros(dense.d, dense.h)
        >>> statistics.add(torch.randn(512, dense.d), dense, ffn.weights)
        >>> refitted = refit_layer(dense, ffn.weights, statistics)
        >>> fold_error(refitted, statistics) < fold_error(ffn.weights, statistics)
        True
        >>> previous = ffn.swap(refitted)
    """
    for some in (statistics, heldout or statistics):
        _check(dense, some)
    if damping is None and heldout is None:
        damping = _DAMPING
    spectrum = Spectrum.of(statistics.x)
    return fit_fold(dense.in_fp32(), folded, spectrum, statistics, heldout or statistics, damping, rounding)[0]


def _check(dense: DenseFFN, statistics: Statistics) -> None:
    """Refuse statistics from which no fold of this FFN follows."""
    found, own = (len(statistics.x.x_sum), statistics.neurons), (dense.d, dense.h)
    if found != own:
        raise InvalidInputError(
            f"the statistics are of an FFN of width {found[0]} with {found[1]} neurons, and this one has {own[0]} and "
            f"{own[1]}; gather them with the FFN that is refitted."
        )
    if statistics.x.count <= 0:
        raise InvalidInputError("the statistics hold no tokens; add inputs of the FFN before its fold is solved.")
    if not all(bool(torch.isfinite(part.cross).all()) for part in (statistics.x, statistics.left)):
        raise InvalidInputError(
            "the statistics have NaN or infinite sums; gather them anew, without inputs that are not finite."
        )


def fit_fold(
    dense: DenseFFN,
    folded: FoldedWeights,
    spectrum: Spectrum,
    fit: Statistics,
    heldout: Statistics,
    damping: float | None,
    rounding: Rounding,
) -> tuple[FoldedWeights, float]:
    """`folded` with the fold and bias that fit the statistics best, and the damping used, the median over the outputs.

    The bias makes up for the rounding of the fold at the mean input, so that rounding is spread by the inputs' centred
    moments. What counts is the error of a fold as it is stored: little damping can put one huge weight into a row, for
    the sake of a few tokens, and rounded to few bits such a row loses all else.

    Args:
        dense: in fp32.
        folded: has the form in which the fold is stored; what its fold and bias hold is not read.
        spectrum: of `fit.x`.
        fit: statistics to fit.
        heldout: statistics to choose the damping on.
        damping: ridge penalty; None to choose it from `DAMPINGS`, for each output by itself.
        rounding: of a fold in few bits.
    """
    prior = _prior(dense, folded)
    spread = (fit.x.centred / fit.x.count).float() if rounding == "gptq" else None

    def solved(dampings: Sequence[float]) -> tuple[FoldedWeights, Tensor]:
        best = ridge(spectrum, fit.x, fit.left, heldout.x, heldout.left, prior, dampings)
        fold = store_fold(best.weight, folded.format, folded.dtype, spread)
        bias = (fit.left.y_sum - written_out(fold).to(folded.dtype).double() @ fit.x.x_sum) / fit.x.count
        return replace(folded, fold=fold, bias=bias.to(folded.dtype)), best.damping

    dampings = DAMPINGS if damping is None else (damping,)
    if folded.format.fold_bits is None:  # rounding hardly matters, and ridge compares cheaply
        weights, chosen = solved(dampings)
    else:
        weights, chosen = _best_rows([solved((each,)) for each in dampings], heldout)
    return weights, float(chosen.median())


def _prior(dense: DenseFFN, folded: FoldedWeights) -> Tensor | None:
    """[d, d] fp32, the fold of the lines of all neurons that are predicted; None where none is."""
    if folded.static:
        return None
    predicted = folded.predicted_ffn(torch.float32) if folded.mixed else dense
    return fold_of_lines(predicted, folded.neurons)[0]


def _best_rows(found: list[tuple[FoldedWeights, Tensor]], heldout: Statistics) -> tuple[FoldedWeights, Tensor]:
    """Of folds in few bits, for each output the row with the least error on held-out tokens, and its damping.

    Args:
        found: folds that differ in fold and bias only, and the dampings [d] of their outputs.
        heldout: statistics of the held-out tokens.
    """
    best = torch.stack([_output_errors(weights, heldout) for weights, _ in found]).argmin(0)

    def choose(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts))[best, torch.arange(len(best), device=best.device)]

    weights, folds = found[0][0], [stored(weights.fold) for weights, _ in found if weights.fold is not None]
    packed = [fold for fold in folds if isinstance(fold, PackedMatrix)]
    planes, scale = choose([fold.planes for fold in packed]), choose([fold.scale for fold in packed])
    bias = choose([weights.bias for weights, _ in found if weights.bias is not None])
    fold = replace(packed[0], planes=planes, scale=scale)
    return replace(weights, fold=fold, bias=bias), choose([damping for _, damping in found])


def fold_of_lines(dense: DenseFFN, neurons: Neurons) -> tuple[Tensor, Tensor]:
    """C [d, d] and c [d], fp32, that the lines of all neurons add up to: the fold of the paper.

    Args:
        dense: in fp32.
        neurons: its lines, in any float dtype.
    """
    slope, offset, k = neurons.slope.float(), neurons.offset.float(), neurons.k
    b1, b2 = dense.biases
    parts = zip(slope.chunk(k), dense.w1.chunk(k), strict=True)
    weight = sum((dense.w2 * some @ rows for some, rows in parts), torch.zeros(()))
    return weight, dense.w2 @ ((slope * b1).view(k, -1).sum(0) + offset) + b2


def fold_error(folded: FoldedWeights, statistics: Statistics) -> float:
    """Squared error of the folded FFN's output over the output's variance, on the inputs of the statistics.

    Args:
        folded: with any fold; what it fixes is what the statistics were gathered with.
    """
    return float(_output_errors(folded, statistics).sum()) / statistics.output.y_variance


def _output_errors(folded: FoldedWeights, statistics: Statistics) -> Tensor:
    """[d] fp64, mean squared error of each output of the folded FFN; arguments as `fold_error`."""
    assert folded.fold is not None and folded.bias is not None, "a fold that something else adds has no error here"
    weight = written_out(folded.fold).to(folded.dtype)
    return affine_errors(weight, folded.bias, statistics.x, statistics.left)
