"""Fold a whole model: plan the budget on the dense model, then fold layer by layer behind the layers folded before.

plan    each layer is folded alone, the increase of the model's loss measured, and the byte budget split
fold    each layer is calibrated on what the folded layers before it give, folded, and put into the model
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from . import activations
from .architectures import FFNSite, family_of, find_ffns
from .calibration.stream import Stream
from .calibration.text import Windows, check_enough, split_windows
from .config import FORMAT_VERSION, FoldConfig
from .errors import InvalidInputError
from .folding.budget import FFNShape, Option, check_feasible, split_budget
from .folding.fold import (
    DenseFFN,
    FoldedWeights,
    FoldQuality,
    Inputs,
    Predicted,
    choose_ranges,
    error_curve,
    finish,
    predict,
)
from .folding.predictor import PackedMatrix
from .folding.ranges import share_by_error
from .report import FoldReport, LayerReport
from .runtime.ffn import FoldedFFN, install, uninstall
from .workspace import Workspace, digest

#: called with the stage, the steps done and the steps in all
Progress = Callable[[str, int, int], None]

_AUTO_BITS = {"error": (1, 2, 3, 4), "coverage": (2,)}  # 2 bits is what the paper uses
_PROBE_FIT = 2  # tokens to fit a probe on, per token its loss is measured on
_LEAST_PROBE_RATE = 0.002
_PRICES = 24  # points of a layer's error curve
_GIB = 2**30


@dataclass(frozen=True)
class LayerPlan:
    """What the budget gives one layer.

    Attributes:
        bits: of the predictor.
        fix_rate: share of neurons fixed per token.
        loss_increase: measured with this layer alone folded, with these bits at the uniform budget; None if the plan
            needed no measurement.
    """

    bits: int
    fix_rate: float
    loss_increase: float | None


def fold(
    model: PreTrainedModel,
    calibration: Windows | Tensor,
    config: FoldConfig | None = None,
    work: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> FoldReport:
    """Fold the FFNs of a model in place.

    Args:
        model: of a supported family, in eval mode, on the CPU; its dtype is that of the stored fold.
        calibration: token windows, or token ids (flat or [windows, length]) to cut into them.
        config: settings; the defaults without.
        work: folder that keeps finished layers, so that an interrupted fold can resume. Without it nothing is kept.
        resume: go on with what `work` holds, to the same bytes as an uninterrupted fold.
        progress: told of each step.

    Returns:
        The figures of the fold.

    Raises:
        UnsupportedModelError: the family or an activation is not supported.
        InvalidInputError: NaN in the weights, too little text, or a resume of another fold.
        InfeasibleBudgetError: the reduction leaves no byte for fixing; says what is feasible.
    """
    config = config or FoldConfig()
    if not isinstance(calibration, Windows):
        length = config.sequence_length or 256
        calibration = split_windows(calibration, length, config.heldout)
    sites = _sites(model, config)
    check_enough(calibration, sites[0].hidden_size)
    shapes = [_shape(site) for site in sites]
    allowed = (config.predictor_bits,) if config.predictor_bits else _AUTO_BITS[config.policy]
    bits = check_feasible(shapes, allowed, config.group_size, config.reduction)
    fingerprint = _fingerprint(model, calibration, config)
    workspace = Workspace(work, fingerprint, resume) if work else None
    with ExitStack() as stack, torch.no_grad():
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work, prefix="scratch-")))
        session = _Session(model, sites, shapes, calibration, config, scratch, workspace, progress or _silent)
        layers = session.fold_layers(session.plan(bits))
    return FoldReport(layers, config.as_dict(), _describe(calibration, fingerprint))


@dataclass
class _Session:
    """One fold under way: what its steps share."""

    model: PreTrainedModel
    sites: list[FFNSite]
    shapes: list[FFNShape]
    windows: Windows
    config: FoldConfig
    scratch: Path
    workspace: Workspace | None
    progress: Progress

    def plan(self, bits: tuple[int, ...]) -> list[LayerPlan]:
        """Bits and fix rate of every layer: as saved, or measured now."""
        saved = self.workspace and self.workspace.load("plan")
        if saved:
            return [LayerPlan(**layer) for layer in saved["layers"]]
        plan = self._measured_plan(bits)
        if self.workspace:
            self.workspace.save("plan", {"layers": [dataclasses.asdict(layer) for layer in plan]})
        return plan

    def _measured_plan(self, bits: tuple[int, ...]) -> list[LayerPlan]:
        probes = [{b: probe for b, probe in layer} for layer in self._probe_layers(bits)]
        if self.config.policy == "coverage":
            return self._split_by_error(bits[0], [probe[bits[0]].loss for probe in probes])
        options = [[option for probe in layer.values() for option in probe.options] for layer in probes]
        budget = (1 - self.config.reduction) * sum(shape.dense for shape in self.shapes)
        chosen = split_budget(options, budget)
        spare = budget - sum(option.touched for option in chosen)
        fixing = sum(o.fix_rate * s.h * s.per_neuron for o, s in zip(chosen, self.shapes, strict=True))
        stretch = 1 + spare / max(fixing, 1.0)
        return [
            LayerPlan(option.bits, min(1.0, option.fix_rate * stretch), layer[option.bits].loss)
            for option, layer in zip(chosen, probes, strict=True)
        ]

    def _split_by_error(self, bits: int, losses: list[float]) -> list[LayerPlan]:
        """The paper's adaptive thresholds, first step: layers get out-of-range tokens in proportion to their error."""
        rates = [s.affordable_fix_rate(bits, self.config.group_size, self.config.reduction) for s in self.shapes]
        shares = share_by_error(torch.tensor(losses, dtype=torch.float64), sum(rates) / len(rates))
        return [LayerPlan(bits, float(rate), loss) for rate, loss in zip(shares, losses, strict=True)]

    def _probe_layers(self, bits: tuple[int, ...]):  # type: ignore[no-untyped-def]
        """Per layer the probes of every predictor width, measured on the dense model."""
        count = max(2, self.config.probe_tokens // self.windows.fit.shape[1])
        fit = self._stream(_spread(self.windows.fit, _PROBE_FIT * count))
        heldout = self._stream(_spread(self.windows.heldout, count))
        reference = heldout.reference()
        baseline = heldout.loss(reference)
        for done, (site, shape) in enumerate(zip(self.sites, self.shapes, strict=True)):
            self.progress("measuring layers", done * len(bits), len(self.sites) * len(bits))
            self._advance_to(site, fit, heldout)
            ffn = dense_ffn(site)
            inputs = Inputs(fit.ffn_inputs(site), heldout.ffn_inputs(site))
            layer = []
            for step, width in enumerate(bits, 1):
                layer.append((width, self._probe(site, shape, ffn, inputs, width, heldout, reference, baseline)))
                self.progress("measuring layers", done * len(bits) + step, len(self.sites) * len(bits))
            yield layer

    def _probe(
        self,
        site: FFNSite,
        shape: FFNShape,
        ffn: DenseFFN,
        inputs: Inputs,
        bits: int,
        heldout: Stream,
        reference: Tensor | None,
        baseline: float,
    ) -> _Probe:
        """Fold one layer alone at the uniform budget and measure the loss."""
        config = self.config
        rate = max(_LEAST_PROBE_RATE, shape.affordable_fix_rate(bits, config.group_size, config.reduction))
        predicted = predict(ffn, inputs, bits, config)
        ranges = choose_ranges(ffn, predicted, rate, config)
        weights, _ = finish(ffn, inputs, predicted, ranges, config.refit, self.model.dtype)
        install(self.model, site, FoldedFFN(weights, ffn.activation))
        try:
            increase = max(heldout.loss(reference) - baseline, 1e-7)
        finally:
            uninstall(self.model, site)
        if config.policy == "coverage":
            return _Probe(increase, [])
        left = ranges.error(predicted.heldout, ffn.gain)
        return _Probe(increase, self._options(shape, ffn, predicted, bits, increase / max(left, 1e-30)))

    def _options(
        self, shape: FFNShape, ffn: DenseFFN, predicted: Predicted, bits: int, loss_per_error: float
    ) -> list[Option]:
        """Fix rates along the layer's error curve, the loss in proportion to the error as measured at one point."""
        options = []
        for rate, left in error_curve(ffn, predicted, _PRICES):
            touched = shape.touched(bits, self.config.group_size, rate)
            options.append(Option(bits, rate, touched, left * loss_per_error))
        return options

    def fold_layers(self, plan: list[LayerPlan]) -> list[LayerReport]:
        """Fold every layer as planned, behind the folded layers before it, and put it into the model."""
        fit, heldout = self._stream(self.windows.fit), self._stream(self.windows.heldout)
        reports = []
        for done, (site, shape, layer) in enumerate(zip(self.sites, self.shapes, plan, strict=True)):
            self.progress("folding layers", done, len(self.sites))
            self._advance_to(site, fit, heldout)
            weights, quality = self._fold_layer(site, layer, fit, heldout)
            ffn = FoldedFFN(weights, activations.identify(site.activation))
            install(self.model, site, ffn)
            reports.append(_layer_report(site, shape, layer, ffn, quality))
        self.progress("folding layers", len(self.sites), len(self.sites))
        return reports

    def _fold_layer(
        self, site: FFNSite, layer: LayerPlan, fit: Stream, heldout: Stream
    ) -> tuple[FoldedWeights, FoldQuality]:
        name = f"layer-{site.index:04d}"
        saved = self.workspace and self.workspace.load_tensors(name)
        if self.workspace and saved:
            values = self.workspace.load(name) or {}
            return _unpack_layer(saved, site.hidden_size, values["group_size"]), FoldQuality(**values["quality"])
        ffn = dense_ffn(site)
        inputs = Inputs(fit.ffn_inputs(site), heldout.ffn_inputs(site))
        predicted = predict(ffn, inputs, layer.bits, self.config)
        ranges = choose_ranges(ffn, predicted, layer.fix_rate, self.config)
        weights, quality = finish(ffn, inputs, predicted, ranges, self.config.refit, self.model.dtype)
        if self.workspace:
            values = {"group_size": weights.predictor.group_size, "quality": dataclasses.asdict(quality)}
            self.workspace.save(name, values)
            self.workspace.save_tensors(name, _pack_layer(weights))  # last: it says that the layer is finished
        return weights, quality

    def _advance_to(self, site: FFNSite, *streams: Stream) -> None:
        for stream in streams:
            while stream.position < site.index:
                stream.advance()

    def _stream(self, ids: Tensor) -> Stream:
        # two boundaries' worth at most: hidden states, and the inputs of one FFN
        limit = self.config.memory_limit_gib * _GIB / 2
        return Stream(self.model, ids, self.scratch, limit, self.config.batch_tokens)


@dataclass(frozen=True)
class _Probe:
    """The loss increase measured with one layer folded, and the options that follow from it."""

    loss: float
    options: list[Option]


def dense_ffn(site: FFNSite) -> DenseFFN:
    """The weights at `site` in fp32.

    Raises:
        InvalidInputError: they are not finite.
    """
    w1, b1, w2, b2 = site.weights()
    h, d = w1.shape
    zero = {"b1": torch.zeros(h), "b2": torch.zeros(d)}
    ffn = DenseFFN(
        w1.float().contiguous(),
        zero["b1"] if b1 is None else b1.float(),
        w2.float().contiguous(),
        zero["b2"] if b2 is None else b2.float(),
        activations.identify(site.activation),
    )
    for name, value in (("up", ffn.w1), ("up bias", ffn.b1), ("down", ffn.w2), ("down bias", ffn.b2)):
        if not bool(torch.isfinite(value).all()):
            raise InvalidInputError(
                f"the {name} weight of {site.prefix} has NaN or infinite entries; reload a sound checkpoint."
            )
    return ffn


def _sites(model: PreTrainedModel, config: FoldConfig) -> list[FFNSite]:
    """The FFNs to fold, checked before any long work starts."""
    sites = find_ffns(model)
    if config.layers is not None:
        wrong = sorted(set(config.layers) - set(range(len(sites))))
        if wrong or not config.layers:
            raise InvalidInputError(f"layers is {config.layers}; choose from 0 to {len(sites) - 1}.")
        sites = [site for site in sites if site.index in config.layers]
    for site in sites:
        activations.identify(site.activation)
        for part in (w for w in site.weights() if w is not None):
            if not bool(torch.isfinite(part).all()):
                raise InvalidInputError(
                    f"the weights of {site.prefix} have NaN or infinite entries; reload a sound checkpoint."
                )
    return sites


def _shape(site: FFNSite) -> FFNShape:
    w1, b1, _, _ = site.weights()
    return FFNShape(w1.shape[1], w1.shape[0], w1.element_size(), b1 is not None)


def _fingerprint(model: PreTrainedModel, windows: Windows, config: FoldConfig) -> dict[str, Any]:
    """What must agree for a fold to go on to the same bytes."""
    return {
        "format_version": FORMAT_VERSION,
        "model": {"family": family_of(model.config).model_type, "sha256": digest(model.state_dict().values())},
        "text": {"sha256": digest([windows.fit, windows.heldout])},
        "config": _plain(config.as_dict()),
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _describe(windows: Windows, fingerprint: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokens": windows.fit.numel(),
        "heldout_tokens": windows.heldout.numel(),
        "sequence_length": windows.fit.shape[1],
        "text_sha256": fingerprint["text"]["sha256"],
        "model_sha256": fingerprint["model"]["sha256"],
    }


def _layer_report(site: FFNSite, shape: FFNShape, plan: LayerPlan, ffn: FoldedFFN, quality: FoldQuality) -> LayerReport:
    """Figures of a folded layer, bytes from the tensors themselves."""
    dense = sum(w.nbytes for w in site.weights() if w is not None)
    added = sum(tensor.nbytes for tensor in ffn.state_dict().values())
    b1 = site.weights().b1
    always = added + (b1.nbytes if b1 is not None else 0)
    return LayerReport(
        prefix=site.prefix,
        bits=plan.bits,
        fix_rate=quality.fix_rate,
        error=quality.error,
        linearity=quality.linearity,
        damping=quality.damping,
        loss_increase=plan.loss_increase,
        dense=dense,
        touched=always + quality.fix_rate * shape.h * shape.per_neuron,
        resident=dense + added,
    )


def _pack_layer(weights: FoldedWeights) -> dict[str, Tensor]:
    names = ("weight", "bias", "low", "high", "slope", "offset")
    predictor = {"planes": weights.predictor.planes, "scale": weights.predictor.scale}
    return {name: getattr(weights, name) for name in names} | predictor


def _unpack_layer(tensors: dict[str, Tensor], columns: int, group_size: int) -> FoldedWeights:
    tensors = dict(tensors)
    packed = PackedMatrix(tensors.pop("planes"), tensors.pop("scale"), columns, group_size)
    return FoldedWeights(predictor=packed, **tensors)


def _spread(windows: Tensor, count: int) -> Tensor:
    """`count` of the windows, evenly spread; all if there are fewer."""
    if count >= len(windows):
        return windows
    return windows[torch.arange(count) * len(windows) // count]


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
