"""Checks of the output directory before any long work. Nothing of the user's is ever deleted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from ..architectures import find_ffns
from ..errors import InvalidInputError
from ..workspace import FOLDER
from .output import size

_FOLD_SHARE = 0.25  # of the FFN bytes: what a fold adds, fold weight, predictor and ranges


def check_output(directory: Path, model: str, force: bool, resume: bool) -> None:
    """Check that a checkpoint may be written to `directory`.

    Args:
        model: what is folded; its own directory is never written to.
        force: it may hold something already.
        resume: it may hold what an interrupted fold left.

    Raises:
        InvalidInputError: it cannot be written, or holds something else.
    """
    check_writable(directory)
    if directory.exists() and Path(model).exists() and directory.samefile(model):
        raise InvalidInputError(f"{directory} holds the model to fold itself; choose another -o.")
    if force or not directory.exists() or (resume and (directory / FOLDER).is_dir()):
        return
    others = sorted(path.name for path in directory.iterdir() if path.name != FOLDER)
    if others:
        raise InvalidInputError(
            f"{directory} is not empty (it holds {others[0]}{' and more' if others[1:] else ''}). Choose another -o, "
            "or say --force to write there: files of the same names are replaced, others stay."
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


def check_space(directory: Path, model: PreTrainedModel) -> None:
    """Raise InvalidInputError where a folded `model` and its finished layers would not fit on the disk."""
    dense = sum(weight.nbytes for weight in model.parameters())
    ffn = sum(weight.nbytes for site in find_ffns(model) for weight in site.weights() if weight is not None)
    kept = directory / FOLDER
    finished = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) if kept.is_dir() else 0
    # the layers are there twice for a moment: in the work folder, and in the checkpoint
    need = dense + 2 * _FOLD_SHARE * ffn - finished
    nearest = directory.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    if free < need:
        raise InvalidInputError(
            f"{directory} has {size(free)} free, and this fold needs about {size(need)}: {size(dense)} for the dense "
            "weights and the rest for what folding adds. Free space, or choose another -o."
        )
