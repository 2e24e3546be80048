"""The working folder of a fold: what is finished survives an interruption, and only the same fold may go on with it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, InvalidInputError
from ..files import differences, in_one_step, read_json, write_json

FOLDER = ".tardis-fold"
#: beginning of the names of folders in it that a run needs for itself
SCRATCH = "scratch-"
#: file that a process locks while it works in a folder
LOCK = ".tardis-lock"
_STATE, _PLAN = "state.json", "plan.json"
#: names of what a fold keeps, but for the state, which says what all of it belongs to
_KEPT = (_PLAN, "layer-*", "*.partial", f"{SCRATCH}*")


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Within the context, no other process works in `folder`, which is made if missing.

    Raises:
        InvalidInputError: another one does, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write in {folder}")
    except OSError as error:
        raise InvalidInputError(f"cannot write to {folder} ({error}); choose another output folder.") from error
    path = folder / LOCK
    handle = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: Path) -> int:
    """Open and lock the file at `path`, and give its handle."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise InvalidInputError(
                f"another process is folding into {path.parent}; wait until it has ended, or choose another output "
                "folder."
            ) from error
        except OSError:  # a file system without locks: a user who starts one fold at a time needs none
            return handle
        if _is_at(handle, path):
            return handle
        os.close(handle)  # who held it has removed it in between


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def discard(root: Path) -> None:
    """Delete what a fold keeps in its folder, and the folder if nothing else is there.

    The state goes last: layers without it would look like those of any fold.
    """
    _discard_kept(root)
    (root / _STATE).unlink(missing_ok=True)
    if not any(root.iterdir()):
        root.rmdir()


def _discard_kept(root: Path) -> None:
    for path in {path for pattern in _KEPT for path in root.glob(pattern)}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def state_of(root: Path) -> dict[str, Any] | None:
    """The fingerprint of the fold that `root` keeps layers of; None without."""
    path = root / _STATE
    return read_json(path) if path.exists() else None


class Workspace:
    """Finished layers, the plan and the fingerprint of one fold below `root`.

    Args:
        root: folder of the fold, where no other process works; see `open`.
        fingerprint: nested plain values that say what is folded, from what, and how.
        resume: go on with what is there.

    Raises:
        InvalidInputError: something is there and `resume` was not asked for, or it belongs to another fold (the
            message names what differs).
    """

    def __init__(self, root: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        self.root = root
        found = state_of(root)
        if found is not None:
            self._check(found, fingerprint, resume)
        else:
            _discard_kept(root)  # without a state it may be of any fold
        write_json(root / _STATE, fingerprint)
        for stale in [*root.glob(f"{SCRATCH}*"), *root.glob("*.partial")]:  # of a run that was killed
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()

    @classmethod
    @contextmanager
    def open(cls, root: Path, fingerprint: dict[str, Any], resume: bool) -> Iterator[Workspace]:
        """A workspace that no other process may open while the context lasts.

        Args:
            root: folder of the fold.
            fingerprint: nested plain values that say what is folded, from what, and how.
            resume: go on with what is there.

        Raises:
            InvalidInputError: another process works in `root`, it cannot be written, it holds another fold, or it holds
                this one and `resume` was not asked for.
        """
        with only_one(root):
            yield cls(root, fingerprint, resume)

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
        with in_one_step(path) as partial:
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, partial)
