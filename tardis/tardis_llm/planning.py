"""Plan a fold: measure what folding each layer alone costs the model, and split the byte budget accordingly.

Each layer is folded alone at the uniform budget, with every predictor width allowed, and the increase of the model's
loss taken on held-out windows. That one point scales the layer's error curve, known for every fix rate from its
statistics, to losses. The layers then share the bytes so that the sum of the losses is least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .architectures import FFNSite
from .calibration.stream import Stream
from .folding.budget import FFNShape, Option, split_budget
from .folding.fold import DenseFFN, Inputs, Predicted, choose_ranges, error_curve, predict, solve
from .folding.ranges import share_by_error
from .runtime.ffn import FoldedFFN, install, uninstall
from .session import Session, dense_ffn, ffn_shape, inputs_at

_STAGE = "measuring layers"
_FIT = 2  # tokens a probe is fitted on, per token its loss is measured on
_LEAST_RATE = 0.002  # fix rate of a probe where the uniform budget leaves less
_POINTS = 24  # of a layer's error curve
_LEAST_INCREASE = 1e-7  # nats; noise can make a layer look better folded


@dataclass(frozen=True)
class LayerPlan:
    """What the budget gives one layer.

    Attributes:
        bits: of the predictor.
        fix_rate: share of neurons fixed per token.
        loss_increase: measured with this layer alone folded, with these bits at the uniform budget.
    """

    bits: int
    fix_rate: float
    loss_increase: float


@dataclass(frozen=True)
class Probe:
    """One layer folded alone with one width of predictor.

    Attributes:
        bits: of the predictor.
        loss_increase: measured; nats per token for a causal model.
        curve: (fix rate, loss increase) as estimated; empty for the `coverage` policy, which needs none.
    """

    bits: int
    loss_increase: float
    curve: list[tuple[float, float]]

    def options(self, shape: FFNShape, group_size: int) -> list[Option]:
        """The points of the curve with their bytes."""
        return [Option(self.bits, rate, shape.touched(self.bits, group_size, rate), loss) for rate, loss in self.curve]


def plan(session: Session, bits: tuple[int, ...]) -> list[LayerPlan]:
    """Bits and fix rate of every layer.

    Args:
        session: the fold under way, its model still dense.
        bits: predictor widths allowed.
    """
    probes = list(_probe_layers(session, bits))
    if session.config.policy == "coverage":
        return _split_by_error(session, [layer[0] for layer in probes])
    return _split_by_loss(session, probes)


def _split_by_loss(session: Session, probes: list[list[Probe]]) -> list[LayerPlan]:
    """The split of least total loss; what bytes are left over then go to fixing, in proportion."""
    shapes, group_size = session.shapes, session.config.group_size
    budget = (1 - session.config.reduction) * sum(shape.dense for shape in shapes)
    options = [
        [option for probe in layer for option in probe.options(shape, group_size)]
        for layer, shape in zip(probes, shapes, strict=True)
    ]
    chosen = split_budget(options, budget)
    spare = budget - sum(option.touched for option in chosen)
    fixing = sum(o.fix_rate * s.h * s.per_neuron for o, s in zip(chosen, shapes, strict=True))
    stretch = 1 + spare / max(fixing, 1.0)
    measured = [{probe.bits: probe.loss_increase for probe in layer} for layer in probes]
    return [
        LayerPlan(option.bits, min(1.0, option.fix_rate * stretch), losses[option.bits])
        for option, losses in zip(chosen, measured, strict=True)
    ]


def _split_by_error(session: Session, probes: list[Probe]) -> list[LayerPlan]:
    """The published adaptive thresholds, first step: layers get tokens out of range in proportion to their error."""
    config = session.config
    rates = [
        shape.affordable_fix_rate(probe.bits, config.group_size, config.reduction)
        for shape, probe in zip(session.shapes, probes, strict=True)
    ]
    errors = torch.tensor([probe.loss_increase for probe in probes], dtype=torch.float64)
    shares = share_by_error(errors, sum(rates) / len(rates)).tolist()
    return [LayerPlan(probe.bits, share, probe.loss_increase) for share, probe in zip(shares, probes, strict=True)]


def _probe_layers(session: Session, bits: tuple[int, ...]) -> Iterator[list[Probe]]:
    """Per layer a probe of every predictor width."""
    windows, sites = session.windows, session.sites
    count = max(2, session.config.probe_tokens // windows.fit.shape[1])
    fit, heldout = session.stream(_spread(windows.fit, _FIT * count)), session.stream(_spread(windows.heldout, count))
    meter = _LossMeter(heldout, reference := heldout.reference(), heldout.loss(reference))
    for done, site in enumerate(sites):
        session.progress(_STAGE, done * len(bits), len(sites) * len(bits))
        inputs, ffn = inputs_at(site, fit, heldout), dense_ffn(site)
        layer = []
        for step, width in enumerate(bits, 1):
            layer.append(_probe(session, site, ffn, inputs, width, meter))
            session.progress(_STAGE, done * len(bits) + step, len(sites) * len(bits))
        yield layer


@dataclass(frozen=True)
class _LossMeter:
    """Measures the model's loss from where a stream stands, against that of the dense model."""

    stream: Stream
    reference: Tensor | None
    baseline: float

    def increase(self) -> float:
        return max(self.stream.loss(self.reference) - self.baseline, _LEAST_INCREASE)


def _probe(session: Session, site: FFNSite, ffn: DenseFFN, inputs: Inputs, bits: int, meter: _LossMeter) -> Probe:
    """Fold one layer alone at the uniform budget, and measure the loss."""
    config = session.config
    uniform = ffn_shape(site).affordable_fix_rate(bits, config.group_size, config.reduction)
    predicted = predict(ffn, inputs, bits, config)
    ranges = choose_ranges(ffn, predicted, max(_LEAST_RATE, uniform), config)
    solved = solve(ffn, inputs, predicted, ranges, config.refit, session.model.dtype)
    install(session.model, site, FoldedFFN(solved.weights, ffn.activation))
    try:
        increase = meter.increase()
    finally:
        uninstall(session.model, site)
    if config.policy == "coverage":
        return Probe(bits, increase, [])
    return Probe(bits, increase, _loss_curve(ffn, predicted, increase, ranges.error(predicted.heldout, ffn.gain)))


def _loss_curve(ffn: DenseFFN, predicted: Predicted, increase: float, error: float) -> list[tuple[float, float]]:
    """(fix rate, loss increase) along the layer's error curve, which passes through what was measured."""
    loss_per_error = increase / max(error, 1e-30)
    return [(rate, left * loss_per_error) for rate, left in error_curve(ffn, predicted, _POINTS)]


def _spread(windows: Tensor, count: int) -> Tensor:
    """`count` of the windows, evenly spread; all if there are fewer."""
    if count >= len(windows):
        return windows
    return windows[torch.arange(count) * len(windows) // count]
