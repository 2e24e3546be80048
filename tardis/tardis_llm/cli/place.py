"""Checks of the output directory before any long work. Nothing of the user's is ever deleted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from transformers import PreTrainedModel

from ..calibration.text import Windows
from ..checkpoint.folded import is_folded
from ..checkpoint.saving import STAGING
from ..config import PREDICTOR_BITS, FoldConfig
from ..errors import InvalidInputError
from ..families.sites import find_ffns
from ..ffn.accounting import planned
from ..pipeline.session import hidden_bytes_on_disk
from ..pipeline.workspace import FOLDER, LOCK
from .output import size

_OURS = (FOLDER, STAGING, LOCK)  # what an interrupted fold leaves


def check_output(directory: Path, model: str, force: bool, resume: bool) -> None:
    """Check that a checkpoint may be written to `directory`.

    Args:
        model: what is folded; its own directory is never written to.
        force: it may hold something already.
        resume: it may hold what an interrupted fold left, or a finished fold.

    Raises:
        InvalidInputError: it cannot be written, or holds something else.
    """
    check_writable(directory)
    if directory.exists() and Path(model).exists() and directory.samefile(model):
        raise InvalidInputError(f"{directory} holds the model to fold itself; choose another -o.")
    if force or not directory.exists() or (resume and ((directory / FOLDER).is_dir() or is_folded(directory))):
        return
    others = sorted(path.name for path in directory.iterdir() if path.name not in _OURS)
    if others:
        raise InvalidInputError(
            f"{directory} is not empty (it holds {others[0]}{' and more' if others[1:] else ''}). Choose another -o, "
            "or say --force to write there: a model is replaced whole, other files stay."
        )


def check_writable(directory: Path) -> None:
    """Raise InvalidInputError unless files can be written to `directory`, which need not exist yet."""
    nearest = directory.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise InvalidInputError(f"cannot write to {directory}: {nearest} is no directory. Choose another -o.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InvalidInputError(
            f"cannot write to {directory}: no permission, or read-only, at {nearest}. Choose another -o."
        )


def check_plot(path: Path) -> None:
    """Raise InvalidInputError unless a picture can be drawn to `path`."""
    check_writable(path.parent)
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.is_dir() or (path.suffix and path.suffix[1:].lower() not in kinds):
        raise InvalidInputError(
            f"no picture can be drawn to {path}; give a file such as fold.png, or {', '.join(kinds)}."
        )


def check_space(directory: Path, model: PreTrainedModel, windows: Windows, config: FoldConfig) -> None:
    """Raise InvalidInputError where a fold of `model` and what it keeps meanwhile would not fit on the disk."""
    sites = find_ffns(model)
    bits = config.predictor_bits or (config.fallback_bits or max(PREDICTOR_BITS[:-1]))
    chosen = [site.weights() for site in sites if config.layers is None or site.index in config.layers]
    dense = sum(ffn.nbytes for ffn in chosen)
    outside = sum(weight.nbytes for weight in model.parameters()) - dense
    stored = sum(planned(ffn, config.storage, bits).touched(1.0) for ffn in chosen)
    dense = 0 if config.fallback_bits else dense
    kept = directory / FOLDER
    finished = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) if kept.is_dir() else 0
    # for a moment the layers are there twice: in the work folder, without dense weights, and in the checkpoint
    need = outside + stored + max(0, stored - dense - finished) + hidden_bytes_on_disk(model, windows, config)
    nearest = directory.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    if free < need:
        raise InvalidInputError(
            f"{directory} has {size(free)} free, and this fold needs about {size(need)} while it is made. Free space, "
            "or choose another -o."
        )
