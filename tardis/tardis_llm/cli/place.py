"""Checks of the output directory before any long work. Nothing of the user's is ever deleted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase

from ..checkpoint.folded import holds_fold
from ..checkpoint.saving import STAGING
from ..errors import InvalidInputError
from ..pipeline.workspace import FOLDER, LOCK
from .output import size

_OURS = (FOLDER, STAGING, LOCK)  # what an interrupted fold leaves


def check_output(directory: Path, model: str, force: bool, resume: bool) -> None:
    """Check that a checkpoint may be written to `directory`.

    Args:
        directory: made if missing.
        model: directory or hub name of what is folded; its own directory is never written to.
        force: the directory may hold something already.
        resume: the directory may hold what an interrupted fold left, or a finished fold.

    Raises:
        InvalidInputError: the directory cannot be written, or holds something else.
    """
    check_writable(directory)
    if directory.exists() and Path(model).exists() and directory.samefile(model):
        raise InvalidInputError(f"{directory} holds the model to fold itself; choose another -o.")
    if force or not directory.exists() or (resume and ((directory / FOLDER).is_dir() or holds_fold(directory))):
        return
    others = sorted(path.name for path in directory.iterdir() if path.name not in _OURS)
    if others:
        raise InvalidInputError(
            f"{directory} is not empty (it holds {others[0]}{' and more' if others[1:] else ''}). Choose another -o, "
            "or say --force to write there: a model is replaced whole, other files stay."
        )


def check_writable(directory: Path) -> None:
    """Raise InvalidInputError unless files can be written to `directory`, which need not exist yet."""
    nearest = _nearest(directory)
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


def check_space(directory: Path, need: int) -> None:
    """Raise InvalidInputError where a fold that takes `need` bytes of the disk would not fit below `directory`."""
    free = shutil.disk_usage(_nearest(directory)).free
    if free < need:
        raise InvalidInputError(
            f"{directory} has {size(free)} free, and this fold needs about {size(need)} while it is made. Free space, "
            "or choose another -o."
        )


def _nearest(directory: Path) -> Path:
    """The directory, or what is there of the path to it."""
    path = directory.absolute()
    return next(each for each in (path, *path.parents) if os.path.lexists(each))
