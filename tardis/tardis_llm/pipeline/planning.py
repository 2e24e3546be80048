"""Plan a fold: measure what folding each layer alone costs the model, and split the byte budget accordingly.

Where the split is uniform, there is nothing to measure. Otherwise each layer is folded alone, coarsely enough to show,
and the increase of the model's loss taken on held-out windows. Over the squared error that this fold left in the
layer's output, it tells what error costs there. The error for every width of predictor and fix rate follows from
statistics; the layers share the bytes so that the sum of losses is least.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.inputs import TextOrSpeech, ids_of
from ..calibration.stream import Stream
from ..calibration.text import spread
from ..families.linear import weight_of
from ..families.sites import FFNSite
from ..ffn.accounting import Cost, most_kept
from ..ffn.weights import DenseFFN
from ..folding.budget import Option, split_budget
from ..folding.fold import AnyPredicted, Inputs, choose_ranges, error_curve, error_left, predict, solve
from ..folding.ranges import share_by_error
from ..runtime.modules import FoldedFFN
from ..runtime.placing import install, uninstall
from .session import Session, selected, sound_weights, splits_alike, tokens_at

_STAGE = "measuring layers"
_FIT = 2  # tokens a probe is fitted on, per token its loss is measured on
_LEAST_RATE, _LARGEST_RATE = 0.002, 0.02  # fix rate of a probe; beyond, the loss grows too little to be told from noise
_POINTS = 24  # of a layer's error curve
_LEAST_SHARE = 0.1  # of the layers' mean loss increase: noise can make a layer look free, or even better folded


@dataclass(frozen=True)
class LayerPlan:
    """What the budget gives one layer.

    Attributes:
        bits: bits per weight of the predictor, or of the neurons that a static fold keeps.
        fix_rate: share of neurons fixed per token; of a static fold the share kept, of a mixed one what a dynamic one
            of as many bytes fixes.
        loss_increase: measured with this layer alone folded, by its probe; None where none was needed.
    """

    bits: int
    fix_rate: float
    loss_increase: float | None


@dataclass(frozen=True)
class Probe:
    """What was measured of one layer before the budget is split.

    Attributes:
        loss_increase: measured with the layer folded alone; nats per token for a causal model.
        error: squared error that this left within the ranges.
        curves: per predictor width, (fix rate, squared error left); empty for the `coverage` policy.
    """

    loss_increase: float
    error: float
    curves: dict[int, list[tuple[float, float]]]

    def options(self, costs: Mapping[int, Cost]) -> list[Option]:
        """The points of the curves with their bytes, and the loss in proportion to the error.

        Args:
            costs: bytes of the layer by the predictor's bits.
        """
        loss_per_error = self.loss_increase / max(self.error, 1e-30)
        return [
            Option(bits, rate, costs[bits].touched(rate), error * loss_per_error)
            for bits, curve in self.curves.items()
            for rate, error in curve
        ]


def plan(session: Session, bits: tuple[int, ...]) -> list[LayerPlan]:
    """Choose bits and fix rate of every layer.

    Args:
        session: the fold under way, its model still dense.
        bits: predictor widths allowed.
    """
    if selected(session.config, session.sites) == "static":
        return [_keep_most(session, site.outline()) for site in session.sites]
    if splits_alike(session.config, session.sites):
        return _split_alike(session, bits[0])
    probes = _above_noise(list(_probe_layers(session, bits)))
    if session.config.policy == "coverage":
        return _split_by_error(session, bits[0], probes)
    return _split_by_loss(session, probes)


def _above_noise(probes: list[Probe]) -> list[Probe]:
    """The probes with loss increases raised to `_LEAST_SHARE` of their mean where they are below."""
    floor = _LEAST_SHARE * max(sum(probe.loss_increase for probe in probes) / len(probes), 1e-7)
    return [replace(probe, loss_increase=max(probe.loss_increase, floor)) for probe in probes]


def _split_alike(session: Session, bits: int) -> list[LayerPlan]:
    """The same bits and fix rate for every layer."""
    costs = [session.cost(site, bits) for site in session.sites]
    budget = (1 - session.config.reduction) * sum(cost.dense for cost in costs)
    rate = (budget - sum(cost.always for cost in costs)) / sum(cost.fixing for cost in costs)
    return [LayerPlan(bits, min(1.0, rate), None) for _ in costs]


def _keep_most(session: Session, outline: DenseFFN) -> LayerPlan:
    """The most neurons that a static fold may keep in every layer."""
    config = session.config
    assert config.fallback_bits is not None, "kept neurons are in few bits"
    return LayerPlan(config.fallback_bits, most_kept(outline, config.storage, config.reduction) / outline.h, None)


def _split_by_loss(session: Session, probes: list[Probe]) -> list[LayerPlan]:
    """The split of least total loss; what bytes are left over then go to fixing, in proportion."""
    costs = [
        {bits: session.cost(site, bits) for bits in probe.curves}
        for site, probe in zip(session.sites, probes, strict=True)
    ]
    budget = (1 - session.config.reduction) * sum(site.outline().nbytes for site in session.sites)
    chosen = split_budget([probe.options(cost) for probe, cost in zip(probes, costs, strict=True)], budget)
    spare = budget - sum(option.touched for option in chosen)
    fixing = sum(option.fix_rate * cost[option.bits].fixing for option, cost in zip(chosen, costs, strict=True))
    stretch = 1 + spare / max(fixing, 1.0)
    return [
        LayerPlan(option.bits, min(1.0, option.fix_rate * stretch), probe.loss_increase)
        for option, probe in zip(chosen, probes, strict=True)
    ]


def _split_by_error(session: Session, bits: int, probes: list[Probe]) -> list[LayerPlan]:
    """The published adaptive thresholds, first step: layers get tokens out of range in proportion to their error."""
    config = session.config
    rates = [session.cost(site, bits).affordable_fix_rate(config.reduction) for site in session.sites]
    errors = torch.tensor([probe.loss_increase for probe in probes], dtype=torch.float64)
    shares = share_by_error(errors, sum(rates) / len(rates)).tolist()
    return [LayerPlan(bits, share, probe.loss_increase) for share, probe in zip(shares, probes, strict=True)]


def _probe_layers(session: Session, bits: tuple[int, ...]) -> Iterator[Probe]:
    """A probe of every layer."""
    windows, sites = session.windows, session.sites
    count = max(2, session.config.probe_tokens // ids_of(windows.fit).shape[1])
    fit, heldout = session.stream(_some(windows.fit, _FIT * count)), session.stream(_some(windows.heldout, count))
    meter = _LossMeter(heldout, reference := heldout.reference(), heldout.loss(reference))
    for done, site in enumerate(sites):
        session.progress(_STAGE, done, len(sites))
        inputs = Inputs(*(tokens_at(site, stream, session.config) for stream in (fit, heldout)))
        yield _probe(session, site, inputs, bits, meter)
    session.progress(_STAGE, len(sites), len(sites))


@dataclass(frozen=True)
class _LossMeter:
    """Measures the model's loss from where a stream stands, against that of the dense model."""

    stream: Stream
    reference: Tensor | None
    baseline: float

    def increase(self) -> float:
        return self.stream.loss(self.reference) - self.baseline


def _probe(session: Session, site: FFNSite, inputs: Inputs, bits: tuple[int, ...], meter: _LossMeter) -> Probe:
    """Fold one layer alone with the narrowest predictor and measure the loss; and the error curves of every width."""
    ffn = sound_weights(site).to(session.config.torch_device).in_fp32()
    predicted = {width: predict(ffn, inputs, width, session.config) for width in bits}
    increase, error = _measure(session, site, ffn, inputs, predicted[bits[0]], meter)
    if session.config.policy == "coverage":
        return Probe(increase, error, {})
    return Probe(increase, error, {width: error_curve(ffn, known, _POINTS) for width, known in predicted.items()})


def _measure(
    session: Session, site: FFNSite, ffn: DenseFFN, inputs: Inputs, predicted: AnyPredicted, meter: _LossMeter
) -> tuple[float, float]:
    """Increase of the model's loss with one layer folded, and the squared error left within that layer's ranges."""
    config = session.config
    uniform = session.cost(site, predicted.predictor.bits).affordable_fix_rate(config.reduction)
    rate = min(max(uniform, _LEAST_RATE), _LARGEST_RATE)
    ranges = choose_ranges(ffn, predicted, rate, config)
    solved = solve(ffn, inputs, predicted, ranges, config, session.model.dtype)
    install(session.model, site, FoldedFFN(solved.weights).to(weight_of(site.down).device))
    try:
        return meter.increase(), error_left(ffn, predicted, ranges)
    finally:
        uninstall(session.model, site)


def _some(windows: TextOrSpeech, count: int) -> TextOrSpeech:
    """`count` of the windows, evenly spread; all where there are no more."""
    return windows[spread(len(windows), count)]
