"""Compare weight files with the model that config.json describes: every tensor's name, dtype and shape.

Only headers are read, and nothing is allocated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError
from ..files import read_json
from ..runtime.stored import Stored
from .format import CheckpointConfig
from .names import TensorNames
from .record import Record
from .saving import CONFIG
from .skeleton import check_blocks, skeleton
from .weight_files import Entry, described, directory_of, headers, weight_files

_HALVES = (torch.float16, torch.bfloat16)
_REMEDY = "Copy config.json and weights from the same checkpoint, or fold again."
#: of a table that is computed when a model is loaded, beyond what the weights take
_LARGEST_TABLE = 2**30


class Contents:
    """The tensors that the weight files of a model must hold.

    Args:
        model: on meta, folded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tensors = model.state_dict()
        self._exact = set(_format_tensors(model))
        self._names = TensorNames(model, self._tensors)

    def check(self, name: str, stored: Entry, model_dtype: torch.dtype | None) -> str | None:
        """See that a tensor of the files is as it must be; returns what it is called in the model, if it has it.

        Args:
            name: in the files.
            stored: what the header says.
            model_dtype: that config.json says; None where it says none.

        Raises:
            CheckpointError: dtype or shape differ.
        """
        placed = self._names.place(name)
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

    def check_all(self, found: Mapping[str, Entry], model_dtype: torch.dtype | None) -> None:
        """See that the files hold these tensors, all of them and no others.

        Args:
            found: by the files' headers.
            model_dtype: as for `check`.

        Raises:
            CheckpointError: a tensor is missing, there twice, unknown, or of another dtype or shape.
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
        refuse_missing(self.missing(found), found)

    def missing(self, found: Iterable[str]) -> list[str]:
        """Tensors of the model that are not among those of the files, by their names in the model."""
        ignored = self._model._keys_to_ignore_on_load_missing or ()
        wanted = {self._names.first(name) for name in self._tensors if not _matches(name, ignored)}
        return sorted(wanted - {self._names.place(name) for name in found})

    def _refuse_unknown(self, name: str, stored: Entry) -> None:
        ignored = self._model._keys_to_ignore_on_load_unexpected or ()
        if ".tardis." in name or not _matches(name, ignored):
            raise CheckpointError(
                f"{stored.file} has a tensor {name}, {stored}, that the model of config.json does not have. {_REMEDY}"
            )

    @staticmethod
    def _refuse_mixture(found: Mapping[str, Entry]) -> None:
        """Refuse two dtypes of 16 bits in the dense part: one of them is not what was written."""
        first = {stored.dtype: name for name, stored in found.items() if stored.dtype in _HALVES}
        if len(first) > 1:
            parts = " and ".join(f"{name} {found[name]}" for name in sorted(first.values()))
            raise CheckpointError(f"the weight files have {parts}, and a model has one dtype of 16 bits. {_REMEDY}")

    def _check_tables(self, found: Mapping[str, Entry]) -> None:
        """Refuse tables that would be computed in loading, such as those of positions, and take all memory."""
        held = sum(stored.file.stat().st_size for stored in found.values()) if found else 0
        for name, table in self._model.named_buffers():
            if name not in self._tensors and table.nbytes > held + _LARGEST_TABLE:
                raise CheckpointError(
                    f"config.json makes {name} {list(table.shape)}, which takes {table.nbytes:,} bytes. {_REMEDY}"
                )


def refuse_missing(missing: list[str], found: Mapping[str, Entry]) -> None:
    """Raise CheckpointError if tensors are missing, which transformers would draw at random."""
    if missing:
        where = directory_of(found)
        raise CheckpointError(
            f"the weight files of {where} lack {len(missing)} tensors, the first is {missing[0]}. {_REMEDY}"
        )


def contents_of(config: PreTrainedConfig, settings: CheckpointConfig, model: PreTrainedModel | None = None) -> Contents:
    """What the weight files of a folded checkpoint must hold.

    Args:
        config: of the family.
        settings: of the fold.
        model: what goes for the model that was saved where config.json names none of transformers.

    Raises:
        CheckpointError: config.json contradicts itself, or names no model.
    """
    saved = skeleton(config, settings) or model
    if saved is None:
        raise CheckpointError("config.json names no class of transformers under `architectures`; copy it anew.")
    return Contents(saved)


def check_headers(
    files: Iterable[Path], config: PreTrainedConfig, settings: CheckpointConfig, model: PreTrainedModel | None = None
) -> dict[str, Entry]:
    """See that the weight files of a folded checkpoint are those that its config.json and tardis.json describe.

    Args:
        files: all of them.
        config: of the family.
        settings: of the fold.
        model: that is loaded from them, on meta and folded: one that lacks the checkpoint's head, or has another.

    Returns:
        What the headers say, by the tensors' names.

    Raises:
        CheckpointError: names the tensor, what was found, and what was expected.
    """
    found = headers(files)
    if not found:
        raise CheckpointError("the weight files hold no tensors; copy the checkpoint anew.")
    contents_of(config, settings, model).check_all(found, _stated_dtype(directory_of(found) / CONFIG))
    if model is not None:
        _check_loaded(Contents(model), model, found)
    record = Record.read(directory_of(found))
    if record is not None:
        record.check(found)
    return found


def check_directory(directory: Path, config: PreTrainedConfig) -> None:
    """See that the weight files in a directory are those that its config.json and tardis.json describe.

    Raises:
        CheckpointError: see `check_headers`.
    """
    files = weight_files(directory)
    check_blocks(config, len(headers(files)))
    check_headers(files, config, CheckpointConfig.read(config.quantization_config))


def _check_loaded(contents: Contents, model: PreTrainedModel, found: Mapping[str, Entry]) -> None:
    """See that a model that is loaded from files gets from them what it must.

    What it has beyond the model that was saved, such as a new classifier, transformers initialises, and says so; a head
    over the vocabulary is never new.
    """
    for name, stored in found.items():
        contents.check(name, stored, stored.dtype)
    head = model.get_output_embeddings()
    own = {name.partition(".")[0] for name, module in model.named_modules() if head is not None and module is head}
    refuse_missing([name for name in contents.missing(found) if name.partition(".")[0] in own], found)


def _format_tensors(model: nn.Module) -> Iterable[str]:
    """Names of the tensors whose dtype the format says; that of all others is the model's."""
    for name, module in model.named_modules():
        if isinstance(module, Stored):
            yield from (f"{name}.{key}" if name else key for key in module.format_tensors)


def _stated_dtype(path: Path) -> torch.dtype | None:
    """The dtype that config.json says; None where it says none. In a config in memory it is the one asked for."""
    values = read_json(path) if path.exists() else {}
    stated = values.get("dtype") or values.get("torch_dtype")
    return next((dtype for dtype in (torch.float32, *_HALVES) if str(dtype) == f"torch.{stated}"), None)


def _dense_dtype(found: torch.dtype | None, model_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor in the model's must have: float32 is always right, as it fits no other's bytes."""
    said = model_dtype or torch.float32
    if found == torch.float32 or (found in _HALVES and said == torch.float32):
        return found
    return said


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
