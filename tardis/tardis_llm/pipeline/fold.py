"""Fold a whole model: plan the budget on the dense model, then fold layer by layer behind the layers folded before."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.inputs import ids_of, tensors_of, token_count
from ..calibration.limits import check_windows
from ..calibration.residence import computing_on
from ..calibration.sensitivity import first_token_importance
from ..calibration.speech import hear
from ..calibration.text import Windows, check_enough, split_windows
from ..checkpoint.folded import mark_folded
from ..config import FORMAT_VERSION, HOW, FoldConfig
from ..families.linear import weight_of
from ..families.naming import named
from ..families.sites import FFNSite, named_blocks
from ..families.table import NAMED, Family
from ..ffn.accounting import Cost, cost
from ..ffn.weights import FoldedWeights, FoldFormat
from ..files import differences, digest
from ..folding.budget import check_feasible, check_static
from ..folding.fold import FoldQuality, Inputs, choose_ranges, finish, predict
from ..folding.mixed import fold_mixed
from ..folding.static import fold_static
from ..report import FoldReport, LayerReport, LinearsReport, Progress, silent
from ..runtime.modules import FoldedFFN
from ..runtime.placing import install
from .linears import LinearRounding
from .planning import LayerPlan, plan
from .session import Followed, Session, choose_sites, selected, sound_weights, splits_alike
from .workspace import SCRATCH, Workspace, state_of

_AUTO_BITS, _ALIKE_BITS = (1, 2, 3, 4), (2,)  # to choose from by what each layer needs, and without; the paper has 2
_AUTO_LENGTH = 256


def fold(
    model: PreTrainedModel,
    calibration: Windows | Tensor,
    config: FoldConfig | None = None,
    work: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    family: Family | None = None,
) -> FoldReport:
    """Fold the FFNs of a model in place.

    Args:
        model: of a supported family, in eval mode; its dtype is that of the stored fold. It stays where it is, and
            computes on `config.device`, to which its blocks go one at a time.
        calibration: windows, or token ids (flat or [windows, length]) to cut into them; for a model of speech log-mel
            features [windows, mels, frames], which the dense model transcribes first.
        config: settings; the defaults without.
        work: folder that keeps finished layers, so that an interrupted fold can resume. Without it nothing is kept.
        resume: go on with what `work` holds, to the same bytes as an uninterrupted fold. Device, batch size and memory
            limit may have changed; then what is left to do is rounded as they round.
        progress: told of each step.
        family: where the FFNs are, of a model that TARDIS does not know; its config keeps it.

    Returns:
        The figures of the fold.

    Raises:
        UnsupportedModelError: the family or an activation is not supported.
        InvalidInputError: NaN in the weights, too little text or speech, text for a model of speech or the other way
            round, a resume of another fold, or a family that does not fit
            the model.
        InfeasibleBudgetError: the reduction leaves no byte for fixing; says what is feasible.
        DeviceMemoryError: the memory of the device is full; finished layers are kept in `work`.

    Examples:
        >>> report = fold(model, windows, FoldConfig(reduction=0.5))
        >>> [layer.prefix for layer in report.layers]
        ['transformer.h.0.mlp', 'transformer.h.1.mlp']
        >>> round(report.reduction, 1)
        0.5
    """
    config = config or FoldConfig()
    with named(model, family):
        if not isinstance(calibration, Windows):
            calibration = _windows(model, calibration, config, progress)
        sites, bits = check_fold(model, calibration, config)
    fingerprint = _fingerprint(model, calibration, config)
    with (
        Workspace.open(work, fingerprint, resume) if work else nullcontext() as workspace,
        computing_on(model, config.torch_device),
        tempfile.TemporaryDirectory(dir=work, prefix=SCRATCH) as scratch,
        torch.no_grad(),
    ):
        first = first_token_importance(model, sites, calibration.fit) if config.weigh else {}
        session = Session(model, sites, calibration, config, Path(scratch), progress, first)
        layers, linears = _fold_layers(session, _plan(session, bits, workspace), workspace)
    report = FoldReport(layers, config.as_dict(), _describe(calibration, fingerprint), linears)
    mark_folded(model, report.calibration)
    return report


def _windows(model: PreTrainedModel, given: Tensor, config: FoldConfig, progress: Progress) -> Windows:
    """Windows of token ids, or of log-mel features of speech."""
    if given.is_floating_point():
        return hear(model, given, config.heldout, progress)
    return split_windows(given, config.sequence_length or _AUTO_LENGTH, config.heldout)


def check_fold(
    model: PreTrainedModel, calibration: Windows, config: FoldConfig
) -> tuple[list[FFNSite], tuple[int, ...]]:
    """The FFNs to fold and the predictor widths to choose from; everything that can be refused is refused here.

    Raises:
        UnsupportedModelError, InvalidInputError, InfeasibleBudgetError: as `fold`.
    """
    sites = choose_sites(model, config)
    for inputs in calibration:
        check_windows(model, inputs)
    check_enough(calibration, sites[0].hidden_size)
    if selected(config, sites) == "static":
        check_static([site.outline() for site in sites], config.storage, config.reduction)
        return sites, ()
    chosen = config.policy == "error" and not splits_alike(config, sites)
    allowed = (config.predictor_bits,) if config.predictor_bits else _AUTO_BITS if chosen else _ALIKE_BITS
    return sites, check_feasible([site.outline() for site in sites], allowed, config.storage, config.reduction)


def changes(report: FoldReport, model: PreTrainedModel, calibration: Windows, config: FoldConfig) -> list[str]:
    """What differs between a finished fold and one of this dense model, text and settings; nothing if it is the same.

    Args:
        report: of the finished fold.
    """
    fingerprint = _fingerprint(model, calibration, config)
    asked = {"config": fingerprint["config"], "calibration": _describe(calibration, fingerprint)}
    return list(differences({"config": _deciding(report.config), "calibration": report.calibration}, asked))


def is_left_over(work: Path, report: FoldReport) -> bool:
    """Whether what `work` keeps is of the finished fold, or of none that could still go on."""
    found = state_of(work)
    if found is None:
        return True
    known = report.calibration["model_sha256"], report.calibration["text_sha256"], _deciding(report.config)
    return (found["model"]["sha256"], found["text"]["sha256"], found["config"]) == known


def _plan(session: Session, bits: tuple[int, ...], workspace: Workspace | None) -> list[LayerPlan]:
    """The plan that an interrupted fold has saved, or a new one, which is saved."""
    saved = workspace and workspace.load("plan")
    if saved:
        return [LayerPlan(**layer) for layer in saved["layers"]]
    made = plan(session, bits)
    if workspace:
        workspace.save("plan", {"layers": [dataclasses.asdict(layer) for layer in made]})
    return made


def _fold_layers(
    session: Session, plans: list[LayerPlan], workspace: Workspace | None
) -> tuple[list[LayerReport], LinearsReport | None]:
    """Fold every layer as planned, on what the folded layers before it give, and put it into the model.

    The other linear layers of a block, if they are to be stored in few bits, are so before its FFN is folded, which
    then makes up for their errors, too.
    """
    fit, heldout = session.follow(session.windows.fit), session.follow(session.windows.heldout)
    linears = LinearRounding.of(session) if session.config.linear_bits else None
    planned = {site.index: (site, layer) for site, layer in zip(session.sites, plans, strict=True)}
    reports: list[LayerReport] = []
    for index in range(len(named_blocks(session.model)) if linears else max(planned) + 1):
        session.progress("folding layers", len(reports), len(plans))
        if index in planned:
            reports.append(_fold_block(session, *planned[index], workspace, (fit, heldout), linears))
        elif linears:
            for text in (fit, heldout):
                text.pass_by(index)
            linears.round_block(index, fit.folded)
    session.progress("folding layers", len(plans), len(plans))
    return reports, linears.finish(fit.folded) if linears else None


def _fold_block(
    session: Session,
    site: FFNSite,
    layer: LayerPlan,
    workspace: Workspace | None,
    texts: tuple[Followed, Followed],
    linears: LinearRounding | None,
) -> LayerReport:
    """Fold the FFN of a block, or take the fold that an interrupted run has left, and put it into the model."""
    name = f"layer-{site.index:04d}"
    found = _load_layer(workspace, name, session, site)
    taught = [] if found else [text.teach(site) for text in texts]
    for text in texts:
        text.pass_by(site.index)
    if linears:
        linears.round_block(site.index, texts[0].folded)
    ffn, quality = found or _fold_layer(
        session, site, layer, Inputs(*[text.learn(site, taught.pop(0)) for text in texts])
    )
    if workspace:
        _save_layer(workspace, name, ffn, quality)
    install(session.model, site, ffn.to(weight_of(site.down).device))
    return _layer_report(site, layer, cost(site.outline(), ffn.weights), quality)


def _fold_layer(session: Session, site: FFNSite, layer: LayerPlan, inputs: Inputs) -> tuple[FoldedFFN, FoldQuality]:
    config, select = session.config, selected(session.config, session.sites)
    ffn = sound_weights(site).to(config.torch_device).in_fp32()
    if select == "static":
        weights, quality = fold_static(ffn, inputs, round(layer.fix_rate * ffn.h), config, session.model.dtype)
        return FoldedFFN(weights), quality
    predicted = predict(ffn, inputs, layer.bits, config)
    if select == "mixed":
        weights, quality = fold_mixed(ffn, inputs, predicted, layer.fix_rate, config, session.model.dtype)
        return FoldedFFN(weights), quality
    ranges = choose_ranges(ffn, predicted, layer.fix_rate, config)
    weights, quality = finish(ffn, inputs, predicted, ranges, config, session.model.dtype)
    return FoldedFFN(weights), quality


def _save_layer(workspace: Workspace, name: str, ffn: FoldedFFN, quality: FoldQuality) -> None:
    workspace.save(name, {"format": vars(ffn.weights.format), "quality": dataclasses.asdict(quality)})
    workspace.save_tensors(name, ffn.state_dict())  # last: it says that the layer is finished


def _load_layer(
    workspace: Workspace | None, name: str, session: Session, site: FFNSite
) -> tuple[FoldedFFN, FoldQuality] | None:
    """The folded layer and its quality as an interrupted fold has left them; None if it had not come so far."""
    tensors = workspace and workspace.load_tensors(name)
    values = workspace and workspace.load(name)
    if not tensors or not values:
        return None
    sizes = site.hidden_size, site.intermediate_size
    empty = FoldedWeights.empty(FoldFormat(**values["format"]), *sizes, session.model.dtype, torch.device("meta"))
    ffn = FoldedFFN(empty)
    ffn.load_state_dict(tensors, assign=True)
    return ffn, FoldQuality(**values["quality"])


def _layer_report(site: FFNSite, layer: LayerPlan, cost: Cost, quality: FoldQuality) -> LayerReport:
    """Figures of a folded layer, bytes from the tensors themselves."""
    return LayerReport(
        prefix=site.prefix,
        bits=layer.bits,
        **dataclasses.asdict(quality),
        loss_increase=layer.loss_increase,
        dense=cost.dense,
        touched=cost.touched(quality.fix_rate),
        resident=cost.resident,
    )


def _fingerprint(model: PreTrainedModel, windows: Windows, config: FoldConfig) -> dict[str, Any]:
    """All that a fold depends on but for rounding, as plain values."""
    family = getattr(model.config, NAMED, None) or model.config.model_type
    return {
        "format_version": FORMAT_VERSION,
        "model": {"family": family, "sha256": digest(model.state_dict().values())},
        "text": {"sha256": digest([part for inputs in windows for part in tensors_of(inputs)])},
        "config": _deciding(config.as_dict()),
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
    }


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, as plain values, that say what is folded, and not how that is computed."""
    return {name: list(it) if isinstance(it, tuple) else it for name, it in config.items() if name not in HOW}


def _describe(windows: Windows, fingerprint: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokens": token_count(windows.fit),
        "heldout_tokens": token_count(windows.heldout),
        "sequence_length": ids_of(windows.fit).shape[1],
        "text_sha256": fingerprint["text"]["sha256"],
        "model_sha256": fingerprint["model"]["sha256"],
    }
