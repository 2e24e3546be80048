"""Write files whole or not at all, read JSON, and compare what files hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256, in hexadecimal, of the bytes of tensors, one after the other."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON object in a file.

    Raises:
        CheckpointError: the file is missing, is no JSON, or holds something other than an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it anew, or delete it to start over.") from error
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object into a file in one step: readers see the old file or the new one."""
    with in_one_step(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """Write a file in one step: whoever reads `path` finds the old file or the whole new one.

    Yields:
        A path to write to. On leaving, the file there is synced to disk and renamed to `path`; after an error, it is
            deleted.
    """
    partial = path.with_suffix(".partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def differences(old: Any, new: Any, name: str = "") -> Iterable[str]:
    """What differs between two nested dicts of JSON values, one sentence for each value.

    Args:
        old, new: what is compared.
        name: dotted name of both within what surrounds them.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} was {_short(old)} and is now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "..."
