"""The working folder of a fold: what is finished survives an interruption, and only the same fold may go on with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import CheckpointError, InvalidInputError

FOLDER = ".tardis-fold"
#: beginning of the names of folders in it that a run needs for itself
SCRATCH = "scratch-"
_STATE = "state.json"


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors' bytes, in order."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


class Workspace:
    """Finished layers, the plan and the fingerprint of one fold below `root`.

    Args:
        root: folder of the fold, made if missing.
        fingerprint: nested plain values that say what is folded, from what, and how.
        resume: go on with what is there.

    Raises:
        InvalidInputError: the folder cannot be written; something is there and `resume` was not asked for, or it
            belongs to another fold (the message names what differs).
    """

    def __init__(self, root: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            if not os.access(root, os.W_OK):
                raise PermissionError(f"no permission to write in {root}")
        except OSError as error:
            raise InvalidInputError(f"cannot write to {root} ({error}); choose another output folder.") from error
        state = root / _STATE
        if state.exists():
            self._check(read_json(state), fingerprint, resume)
        write_json(state, fingerprint)
        for stale in root.glob(f"{SCRATCH}*"):  # of a run that was killed
            shutil.rmtree(stale)

    def _check(self, found: dict[str, Any], fingerprint: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise InvalidInputError(
                f"{self.root} holds an unfinished fold. Go on with --resume, or delete that folder to start again."
            )
        changed = list(differences(found, fingerprint))
        if changed:
            raise InvalidInputError(
                f"cannot resume: {self.root} holds a different fold. {'; '.join(changed)}. Use the same settings, "
                "or delete that folder to start again."
            )

    def load(self, name: str) -> dict[str, Any] | None:
        """The values saved under `name`, if any."""
        path = self.root / f"{name}.json"
        return read_json(path) if path.exists() else None

    def save(self, name: str, values: dict[str, Any]) -> None:
        """Save plain values."""
        write_json(self.root / f"{name}.json", values)

    def load_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors saved under `name`, if any."""
        path = self.root / f"{name}.safetensors"
        try:
            return load_file(path) if path.exists() else None
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it, and its layer is folded again.") from error

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save tensors; they are there in full or not at all."""
        path = self.root / f"{name}.safetensors"
        partial = path.with_suffix(".partial")
        save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
        _commit(partial, path)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.root)


def read_json(path: Path) -> dict[str, Any]:
    """Plain values from a file.

    Raises:
        CheckpointError: it is missing, no JSON, or no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete it, or copy the folder anew.") from error
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values in one step: readers see the old file or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    _commit(partial, path)


def _commit(partial: Path, path: Path) -> None:
    """Put a written file on the disk and under its name."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def differences(old: Any, new: Any, name: str = "") -> Iterable[str]:
    """What differs between two nested dicts, as sentences."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} was {_short(old)} and is now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "..."
