"""A tensor for the hidden states between two blocks: in memory or, above a limit, in a scratch file."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def hidden_buffer(shape: tuple[int, ...], dtype: torch.dtype, scratch: Path, memory_limit: float) -> Tensor:
    """An uninitialised tensor, on disk where it is larger than the limit.

    Args:
        shape, dtype: of the tensor.
        scratch: an existing folder for the file. The file is unlinked at once, so it vanishes with the tensor.
        memory_limit: the most bytes that stay in memory.

    Raises:
        OSError: the disk is full. Its space is reserved here: writing to a sparse file on a full disk would kill the
            process later.
    """
    size = math.prod(shape) * dtype.itemsize
    if size <= memory_limit:
        return torch.empty(shape, dtype=dtype)
    handle, name = tempfile.mkstemp(dir=scratch, prefix="hidden-", suffix=".bin")
    try:
        os.posix_fallocate(handle, 0, size)
        mapped = torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype)
    finally:
        os.close(handle)
        os.unlink(name)
    return mapped.view(shape)
