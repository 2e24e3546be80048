"""Survey a dense model before folding: how linear its FFNs are, how narrow its neurons' inputs, what they weigh."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.inputs import token_count
from ..calibration.limits import check_windows
from ..calibration.moments import SecondMoments, pre_activation_moments
from ..calibration.neurons import BinnedMoments
from ..calibration.sensitivity import first_token_importance
from ..calibration.stream import Seen, Stream
from ..calibration.text import Windows, check_enough
from ..calibration.tokens import Tokens, chunks
from ..config import FoldConfig
from ..families.sites import find_ffns
from ..ffn.accounting import planned
from ..ffn.neuron import value
from ..ffn.weights import DenseFFN
from ..folding.fold import Inputs
from ..folding.ranges import coverage_ranges
from ..folding.ridge import linearity
from ..pipeline.session import sound_weights
from ..precision import quick_products
from ..report import Progress, silent

#: share of a neuron's inputs that its hot range holds, for `width`
COVERAGE = 0.8
_BATCH_TOKENS = 4_096
_MEMORY = 2.0**29  # bytes of hidden states above which they go to disk


@dataclass(frozen=True)
class LayerSurvey:
    """One dense FFN; the measured fields are None without text.

    Attributes:
        prefix: full name of the FFN in the model.
        d: width of input and output.
        h: number of neurons.
        activation: a name that `activation` takes.
        dense: bytes of the FFN.
        linearity: squared error left by the best affine map of the input, over the output's variance, on held-out
            tokens: 0 if the FFN is affine there, 1 if no affine map helps.
        width: mean over the neurons of the width of the range that holds `COVERAGE` of a neuron's inputs, around the
            peak of their density, over the width of the range of all its inputs.
    """

    prefix: str
    d: int
    h: int
    activation: str
    dense: int
    linearity: float | None = None
    width: float | None = None


@dataclass(frozen=True)
class Survey:
    """All FFNs of a dense model.

    Attributes:
        layers: the FFNs in the model's order.
        ranges: per layer, low and high [2, h] fp32 of each neuron's `COVERAGE` range; empty without text.
        tokens: calibration tokens looked at.
        ffns: the dense weights, per layer.
    """

    layers: list[LayerSurvey]
    ranges: list[Tensor]
    tokens: int
    ffns: list[DenseFFN]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the ranges of single neurons."""
        return {"layers": [asdict(layer) for layer in self.layers], "tokens": self.tokens}


@dataclass(frozen=True)
class Feasible:
    """What a fold of all FFNs with predictors of one width could reach.

    Attributes:
        bits: bits per weight of the predictors.
        largest_reduction: share of the FFN bytes that a token no longer reads if it fixes nothing.
        fix_rates: by reduction, the share of neurons that a token may fix; None where none may.
    """

    bits: int
    largest_reduction: float
    fix_rates: dict[str, float | None]


def feasible(found: Survey, bits: int, reductions: Sequence[float]) -> Feasible:
    """What a fold of the surveyed FFNs with predictors of `bits` could reach at each of `reductions`."""
    costs = [planned(ffn, FoldConfig().storage, bits) for ffn in found.ffns]
    dense, always, every = (sum(getattr(cost, part) for cost in costs) for part in ("dense", "always", "fixing"))
    rates = {str(r): ((1 - r) * dense - always) / every for r in reductions}
    within = {r: min(rate, 1.0) if rate >= 0 else None for r, rate in rates.items()}
    return Feasible(bits, 1 - always / dense, within)


def survey(model: PreTrainedModel, windows: Windows | None = None, progress: Progress = silent) -> Survey:
    """Look at every FFN of a dense model.

    Args:
        model: of a supported family, in eval mode, on the CPU.
        windows: text to measure on; without it only sizes are given.

    Raises:
        UnsupportedModelError, InvalidInputError: as `tardis_llm.fold`.

    Examples:
        >>> from tardis_llm.calibration.text import split_windows
        >>> found = survey(model, split_windows(windows, length=32, heldout=0.125))
        >>> [(layer.d, layer.h, layer.activation) for layer in found.layers]
        [(64, 256, 'gelu_tanh'), (64, 256, 'gelu_tanh')]
        >>> [0 <= layer.linearity <= 1 for layer in found.layers]
        [True, True]
    """
    sites = find_ffns(model)
    ffns = [site.outline() for site in sites]
    sizes = zip(sites, ffns, strict=True)
    layers = [LayerSurvey(site.prefix, ffn.d, ffn.h, ffn.activation, ffn.nbytes) for site, ffn in sizes]
    if windows is None:
        return Survey(layers, [], 0, ffns)
    check_enough(windows, sites[0].hidden_size)
    for some in windows:
        check_windows(model, some)
    found, ranges = [], []
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), quick_products():
        first = first_token_importance(model, sites, windows.fit)
        fit, heldout = (Stream(model, some, Path(scratch), _MEMORY, _BATCH_TOKENS, first) for some in windows)
        for site, layer in zip(sites, layers, strict=True):
            inputs = Inputs(*(_tokens(stream.observe(site)) for stream in (fit, heldout)))
            measured, hot = _measure(layer, sound_weights(site).in_fp32(), inputs)
            found.append(measured)
            ranges.append(hot)
            fit.advance()
            heldout.advance()
            progress("surveying layers", len(found), len(sites))
    return Survey(found, ranges, token_count(windows.fit), ffns)


def _measure(layer: LayerSurvey, ffn: DenseFFN, inputs: Inputs) -> tuple[LayerSurvey, Tensor]:
    moments, span = _neurons(ffn, inputs)
    hot = coverage_ranges(moments, torch.full((layer.h,), COVERAGE, dtype=torch.float64))
    # the outer bins are open
    low, high = torch.maximum(hot.neurons.low, span[0]), torch.minimum(hot.neurons.high, span[1])
    width = ((high - low) / (span[1] - span[0]).clamp_min(1e-30)).mean()
    return replace(layer, linearity=_linearity(ffn, inputs), width=float(width)), torch.stack([low, high])


def _linearity(ffn: DenseFFN, inputs: Inputs) -> float:
    fit, heldout = (_output_moments(ffn, tokens) for tokens in (inputs.fit, inputs.heldout))
    return linearity(inputs.spectrum, inputs.fit_moments, fit, inputs.heldout_moments, heldout)


def _tokens(seen: Seen) -> Tokens:
    return Tokens(seen.x, None, seen.weight)


def _output_moments(ffn: DenseFFN, tokens: Tokens) -> SecondMoments:
    """Moments of inputs beside the outputs of the FFN."""
    moments = SecondMoments.zeros(ffn.d, ffn.d)
    for some in tokens.chunks(ffn.h):
        v = F.linear(some.x.float(), ffn.w1, ffn.b1)
        moments.add(some.x, F.linear(value(v, ffn.act, ffn.k), ffn.w2, ffn.b2), some.weight)
    return moments


def _neurons(ffn: DenseFFN, inputs: Inputs) -> tuple[BinnedMoments, Tensor]:
    """Moments of the neurons binned by the exact input of the activation, and its least and largest value, [2, h]."""
    w1, b1 = ffn.w1[: ffn.h], ffn.biases[0][: ffn.h]  # of the gates, where there are some
    moments = BinnedMoments.around(ffn.activation, *pre_activation_moments(inputs.fit_moments, w1, b1))
    least = torch.full((ffn.h,), torch.inf)
    largest = -least
    for chunk in chunks(inputs.fit.x, ffn.h):
        z = F.linear(chunk.float(), w1, b1)
        moments.add(z, z)
        least, largest = torch.minimum(least, z.amin(0)), torch.maximum(largest, z.amax(0))
    return moments, torch.stack([least, largest])
