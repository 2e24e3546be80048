"""Compare the tensors in weight files with the model that config.json describes: names, dtypes and shapes.

Only the headers of the files are read, and the model is made on the meta device, which takes no memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError
from ..files import read_json
from ..runtime.stored import Stored
from .format import CheckpointConfig
from .manifest import Manifest
from .names import TensorNames
from .saving import CONFIG
from .skeleton import check_blocks, skeleton
from .weight_files import TensorInfo, described, directory_of, headers, weight_files

_HALVES = (torch.float16, torch.bfloat16)
_REMEDY = "Copy config.json and weights from the same checkpoint, or fold again."
#: bytes that a table computed while loading may take beyond the size of the weight files
_LARGEST_TABLE = 2**30


class ExpectedTensors:
    """The tensors that the weight files of a model must hold.

    Args:
        model: folded, on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tensors = model.state_dict()
        self._exact = set(_format_tensors(model))
        self._names = TensorNames(model, self._tensors)

    def check(self, name: str, stored: TensorInfo, model_dtype: torch.dtype | None) -> str | None:
        """Compare one tensor of the weight files with the tensor of the model that it fills.

        Args:
            name: of the tensor in the files.
            stored: its dtype and shape, from the file's header.
            model_dtype: the dtype that config.json says; None where it says none.

        Returns:
            The tensor's name in the model; None where the model has no such tensor.

        Raises:
            CheckpointError: dtype or shape differ.
        """
        placed = self._names.resolve(name)
        if placed is None:
            return None
        wanted = self._tensors[placed]
        dtype = wanted.dtype
        if placed not in self._exact and dtype.is_floating_point:
            dtype = _dense_dtype(stored.dtype, model_dtype)
        if (stored.dtype, stored.shape) != (dtype, tuple(wanted.shape)):
            raise CheckpointError(
                f"{stored.file}: the tensor {name} is {stored}, and {described(dtype, wanted.shape)} is what "
                f"config.json describes. {_REMEDY}"
            )
        return placed

    def check_all(self, found: Mapping[str, TensorInfo], model_dtype: torch.dtype | None) -> None:
        """Check that weight files hold every tensor of the model, and no others.

        Args:
            found: what the files' headers say, by the tensors' names.
            model_dtype: the dtype that config.json says; None where it says none.

        Raises:
            CheckpointError: a tensor is missing, duplicated or unknown, or has another dtype or shape.
        """
        names: dict[str, str] = {}
        for name, stored in found.items():
            placed = self.check(name, stored, model_dtype)
            if placed is None:
                self._refuse_unknown(name, stored)
            elif placed in names:
                raise CheckpointError(
                    f"{stored.file}: {name} and {names[placed]} are the same tensor of the model. {_REMEDY}"
                )
            else:
                names[placed] = name
        self._refuse_mixture({name: found[name] for placed, name in names.items() if placed not in self._exact})
        self._check_tables(found)
        refuse_missing(self.missing(found), directory_of(found))

    def missing(self, found: Iterable[str]) -> list[str]:
        """Tensors of the model that the weight files lack, by their names in the model.

        Args:
            found: names of the tensors in the files.
        """
        ignored = self._model._keys_to_ignore_on_load_missing or ()
        wanted = {self._names.first(name) for name in self._tensors if not _matches(name, ignored)}
        return sorted(wanted - {self._names.resolve(name) for name in found})

    def _refuse_unknown(self, name: str, stored: TensorInfo) -> None:
        ignored = self._model._keys_to_ignore_on_load_unexpected or ()
        if ".tardis." in name or not _matches(name, ignored):
            raise CheckpointError(
                f"{stored.file} has a tensor {name}, {stored}, that the model of config.json does not have. {_REMEDY}"
            )

    @staticmethod
    def _refuse_mixture(found: Mapping[str, TensorInfo]) -> None:
        """Refuse dense tensors in both float16 and bfloat16: a model is written in one of them."""
        first = {stored.dtype: name for name, stored in found.items() if stored.dtype in _HALVES}
        if len(first) > 1:
            parts = " and ".join(f"{name} {found[name]}" for name in sorted(first.values()))
            raise CheckpointError(f"the weight files have {parts}, and a model has one dtype of 16 bits. {_REMEDY}")

    def _check_tables(self, found: Mapping[str, TensorInfo]) -> None:
        """Refuse a config with which tables computed while loading, such as those of positions, would fill memory."""
        held = sum(stored.file.stat().st_size for stored in found.values()) if found else 0
        for name, table in self._model.named_buffers():
            if name not in self._tensors and table.nbytes > held + _LARGEST_TABLE:
                raise CheckpointError(
                    f"config.json makes {name} {list(table.shape)}, which takes {table.nbytes:,} bytes. {_REMEDY}"
                )


def refuse_missing(missing: Sequence[str], model: object, remedy: str = _REMEDY) -> None:
    """Refuse weight files that lack tensors: transformers would initialise these at random.

    Args:
        missing: names of the tensors.
        model: directory or hub name, for the message.
        remedy: what to do about it, as a sentence.

    Raises:
        CheckpointError: a tensor is missing.
    """
    if missing:
        raise CheckpointError(
            f"the weight files of {model} lack {len(missing)} tensors, the first is {missing[0]}. {remedy}"
        )


def expected_tensors(
    config: PreTrainedConfig, settings: CheckpointConfig, model: PreTrainedModel | None = None
) -> ExpectedTensors:
    """What the weight files of a folded checkpoint must hold.

    Args:
        config: the model's, from config.json.
        settings: its `quantization_config`.
        model: a folded model on the meta device, used where config.json names no class of transformers.

    Raises:
        CheckpointError: config.json contradicts itself, or names no model.
    """
    saved = skeleton(config, settings) or model
    if saved is None:
        raise CheckpointError("config.json names no class of transformers under `architectures`; copy it anew.")
    return ExpectedTensors(saved)


def check_headers(
    files: Iterable[Path], config: PreTrainedConfig, settings: CheckpointConfig, model: PreTrainedModel | None = None
) -> dict[str, TensorInfo]:
    """Check that the weight files of a folded checkpoint are those that its config.json and tardis.json describe.

    Args:
        files: all weight files of the checkpoint.
        config: the model's, from config.json.
        settings: its `quantization_config`.
        model: the model that is loaded from the files, folded and on the meta device. It may lack the head that the
            checkpoint has, or have another. None: only the files are checked.

    Returns:
        What the headers say, by the tensors' names.

    Raises:
        CheckpointError: a tensor differs, is missing or is unknown; the message names it and says what was expected.
    """
    found = headers(files)
    if not found:
        raise CheckpointError("the weight files hold no tensors; copy the checkpoint anew.")
    expected_tensors(config, settings, model).check_all(found, _stated_dtype(directory_of(found) / CONFIG))
    if model is not None:
        _check_loaded(ExpectedTensors(model), model, found)
    manifest = Manifest.read(directory_of(found))
    if manifest is not None:
        manifest.check(found)
    return found


def check_directory(directory: Path, config: PreTrainedConfig) -> None:
    """Check that the weight files in a directory are those that its config.json and tardis.json describe.

    Raises:
        CheckpointError: config.json describes more blocks than there are tensors, or a tensor differs, is missing or is
            unknown.
    """
    files = weight_files(directory)
    check_blocks(config, len(headers(files)))
    check_headers(files, config, CheckpointConfig.read(config.quantization_config))


def _check_loaded(contents: ExpectedTensors, model: PreTrainedModel, found: Mapping[str, TensorInfo]) -> None:
    """Check that the files fit the model that is loaded from them, which may have another head than the saved one.

    transformers initialises a new head, such as a classifier, and says so. A head over the vocabulary must be in the
    files: it is never initialised anew.
    """
    for name, stored in found.items():
        contents.check(name, stored, stored.dtype)
    head = model.get_output_embeddings()
    own = {name.partition(".")[0] for name, module in model.named_modules() if head is not None and module is head}
    refuse_missing([name for name in contents.missing(found) if name.partition(".")[0] in own], directory_of(found))


def _format_tensors(model: nn.Module) -> Iterable[str]:
    """Names of the tensors whose dtype the checkpoint format fixes; all others have the model's dtype."""
    for name, module in model.named_modules():
        if isinstance(module, Stored):
            yield from (f"{name}.{key}" if name else key for key in module.format_tensors)


def _stated_dtype(path: Path) -> torch.dtype | None:
    """The dtype in a config.json; None where it says none.

    It is read from the file, because a loaded config has the dtype that the caller of `from_pretrained` asked for.
    """
    values = read_json(path) if path.exists() else {}
    stated = values.get("dtype") or values.get("torch_dtype")
    return next((dtype for dtype in (torch.float32, *_HALVES) if str(dtype) == f"torch.{stated}"), None)


def _dense_dtype(found: torch.dtype | None, model_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a dense tensor must have in the files.

    float32 is always accepted: it takes twice the bytes of the other two, so no header can claim it by mistake.
    """
    said = model_dtype or torch.float32
    if found == torch.float32 or (found in _HALVES and said == torch.float32):
        return found
    return said


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
