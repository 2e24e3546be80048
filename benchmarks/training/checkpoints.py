"""Files that are either complete or absent, whenever the process is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which becomes `path` only if the block ends well."""
    draft = path.with_name(f"{path.name}.draft")
    yield draft
    os.replace(draft, path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path`; the old one stays until the new one is complete."""
    with replacing(path) as draft:
        torch.save(state, draft)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint at `path`, on the CPU, or None. Only tensors and plain values are ever unpickled."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
