"""The safetensors files of a model: which there are, what their headers say, and their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """What the header of a safetensors file says of a tensor.

    Attributes:
        file: the file with the tensor.
        dtype: of the tensor; None where it is one that no model has.
        shape: of the tensor.
    """

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return described(self.dtype, self.shape)


def described(dtype: torch.dtype | None, shape: Iterable[int]) -> str:
    """A dtype and a shape for a message, such as "float16 [256]"."""
    return f"{str(dtype).removeprefix('torch.') if dtype else 'an unknown dtype'} {list(shape)}"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, chosen as transformers chooses them: a single file is preferred to an index.

    Args:
        directory: of the model.

    Raises:
        CheckpointError: the index is damaged, or names a file that is not in the directory itself.
    """
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.exists():
        return sorted(directory.glob("*.safetensors"))
    found = read_json(index).get("weight_map")
    names = set(found.values()) if isinstance(found, dict) and all(map(_is_text, found.values())) else set()
    if not names:
        raise CheckpointError(f"{index} names no weight files; copy it anew.")
    outside = sorted(name for name in names if not _is_plain(name))
    if outside:
        raise CheckpointError(
            f"{index} names {outside[0]!r}, and every weight file lies in the directory itself; copy the index anew."
        )
    return sorted(directory / name for name in names)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file without any folder, by the rules of Windows, which are the stricter ones."""
    return name not in ("", ".", "..") and PureWindowsPath(name).name == name


def headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """What the headers of safetensors files say, by the tensors' names.

    Raises:
        CheckpointError: a file is missing or damaged, or two have the same tensor.
    """
    found: dict[str, TensorInfo] = {}
    for file in files:
        for name, stored in _header(file).items():
            if name in found:
                raise CheckpointError(
                    f"both {found[name].file.name} and {file} have the tensor {name}; copy the checkpoint anew into an "
                    "empty directory."
                )
            found[name] = stored
    return found


def directory_of(found: Mapping[str, TensorInfo]) -> Path:
    """The directory of the files with the tensors `found`, of which there must be one at least."""
    return next(iter(found.values())).file.parent


def _header(file: Path) -> dict[str, TensorInfo]:
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file} is no file; copy it anew.")
    try:
        with safe_open(file, framework="pt") as handle:
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            return {
                name: TensorInfo(file, _TYPES.get(part.get_dtype()), tuple(part.get_shape()))
                for name, part in parts.items()
            }
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def tensors(found: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors from their files, one after the other.

    Args:
        found: what `headers` found in the files.

    Yields:
        Name and tensor.

    Raises:
        CheckpointError: a file is damaged.
    """
    for file in dict.fromkeys(stored.file for stored in found.values()):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    yield name, handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is missing, truncated or damaged ({error}). Copy it anew, or fold the model again.")
