"""tardis.json beside a checkpoint: the report of its fold, and what its tensors and its config.json were when written.

Since format version 2 it binds the dtype, the shape and the bytes of every tensor, and config.json; in version 1 it
binds bytes alone. What a user may change and still have the same model is free: see `_FREE`.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..config import FORMAT_VERSION
from ..errors import CheckpointError
from ..files import digest, read_json, write_json
from ..report import FoldReport
from .saving import CONFIG
from .weight_files import Entry, described, directory_of, headers, tensors

RECORD = "tardis.json"
#: fields of config.json that do not change what a model computes: they may be edited
_FREE = frozenset(
    (
        *("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"),
        *("bos_token_id", "eos_token_id", "task_specific_params", "id2label", "label2id"),
        *("output_hidden_states", "return_dict"),
    )
)


@dataclass(frozen=True)
class Seal:
    """What a tensor was when it was written; dtype and shape are None in format version 1.

    Attributes:
        sha256: of its bytes.
        dtype: as in `torch.float16`, without "torch.".
        shape: of it.
    """

    sha256: str
    dtype: str | None = None
    shape: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Seal:
        """Of a tensor."""
        return cls(digest([tensor]), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


@dataclass(frozen=True)
class Record:
    """tardis.json, read.

    Attributes:
        path: of it.
        format_version: of the checkpoint.
        seals: of every tensor by its name in the files.
        config: what config.json said; None in format version 1.
        report: as plain values.
    """

    path: Path
    format_version: int
    seals: dict[str, Seal]
    config: dict[str, Any] | None
    report: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> Record | None:
        """The record in a directory; None where there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        path = directory / RECORD
        if not path.exists():
            return None
        values = read_json(path)
        try:
            version = values["format_version"]
            if version not in range(1, FORMAT_VERSION + 1):
                raise ValueError(f"format_version {version!r}")
            seals = {name: _seal(seal, version) for name, seal in values["tensors"].items()}
            if not seals:
                raise ValueError("no tensors")
            config = dict(values["config"]) if version > 1 else None
            return cls(path, version, seals, config, values["report"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); copy the checkpoint anew.") from error

    def check(self, found: Mapping[str, Entry]) -> None:
        """Compare names, dtypes and shapes of a checkpoint's tensors, and config.json, with what was written.

        Raises:
            CheckpointError: something differs.
        """
        other = sorted(found.keys() ^ self.seals.keys())
        if other and other[0] in found:
            raise CheckpointError(
                f"{found[other[0]].file} has a tensor {other[0]} that was not written. {self._remedy}"
            )
        if other:
            raise CheckpointError(
                f"{self.path.parent} lacks {len(other)} tensors of the folded model, the first is {other[0]}. A weight "
                "file is missing or from another model: copy the checkpoint anew, or fold again."
            )
        for name, stored in found.items():
            self._check_header(name, stored)
        self._check_config(read_json(self.path.parent / CONFIG))

    def _check_header(self, name: str, stored: Entry) -> None:
        seal = self.seals[name]
        if seal.shape is not None and (f"torch.{seal.dtype}", seal.shape) != (str(stored.dtype), stored.shape):
            raise CheckpointError(
                f"{stored.file}: the tensor {name} is {stored}, and {seal.dtype} {list(seal.shape)} was written. "
                f"{self._remedy}"
            )

    def check_tensor(self, name: str, tensor: Tensor, where: object) -> None:
        """Compare a tensor with what was written.

        Args:
            name: in the files.
            tensor: in main memory.
            where: it is from, for the message.

        Raises:
            CheckpointError: it differs.
        """
        seal = self.seals.get(name)
        now = Seal.of(tensor)
        if seal is None or seal.sha256 != now.sha256 or (seal.shape is not None and seal != now):
            raise CheckpointError(
                f"{where}: the tensor {name}, {described(tensor.dtype, tensor.shape)}, is not the one that was written "
                f"(it differs from {self.path}). {self._remedy}"
            )

    def _check_config(self, config: dict[str, Any]) -> None:
        settings = config.get("quantization_config")
        version = settings.get("format_version") if isinstance(settings, dict) else None
        if version != self.format_version:
            raise CheckpointError(
                f"config.json has format version {reprlib.repr(version)}, and {self.path} {self.format_version}. "
                f"{self._remedy}"
            )
        if self.config is None:
            return
        now = bound(config)
        for name in sorted(now.keys() | self.config.keys()):
            if json.dumps(now.get(name), sort_keys=True) != json.dumps(self.config.get(name), sort_keys=True):
                raise CheckpointError(
                    f"config.json says {name} {_short(now.get(name))}, and {_short(self.config.get(name))} was "
                    f"written. {self._remedy}"
                )

    @property
    def _remedy(self) -> str:
        return f"Copy the files anew or fold again; if you changed it on purpose, delete {self.path}."


def _seal(values: Any, version: int) -> Seal:
    if version == 1:
        return Seal(_text(values))
    return Seal(_text(values["sha256"]), _text(values["dtype"]), tuple(values["shape"]))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{reprlib.repr(value)} for text")
    return value


def _short(value: object) -> str:
    return "nothing" if value is None else reprlib.repr(value)


def bound(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of config.json decides what a model computes, flat: fields of `quantization_config` by dotted names."""
    fields = {name: value for name, value in config.items() if name not in _FREE}
    settings = fields.pop("quantization_config", None)
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if name in ("layers", "linears") and isinstance(value, dict):
            fields.update({f"quantization_config.{name}.{key}": each for key, each in value.items()})
        elif name != "crossover":
            fields[f"quantization_config.{name}"] = value
    return fields


def check_bytes(found: Mapping[str, Entry]) -> None:
    """Compare every tensor of a checkpoint with tardis.json beside its files, if there is one.

    Raises:
        CheckpointError: the record is damaged, or a tensor differs.
    """
    record = Record.read(directory_of(found)) if found else None
    if record is not None:
        for name, tensor in tensors(found):
            record.check_tensor(name, tensor, found[name].file)


def write_record(directory: Path, report: FoldReport) -> None:
    """Write tardis.json of a checkpoint that is otherwise finished."""
    found = headers(sorted(directory.glob("*.safetensors")))
    record = {
        "format_version": FORMAT_VERSION,
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
        "report": report.as_dict(),
        "config": bound(read_json(directory / CONFIG)),
        "tensors": {name: vars(Seal.of(tensor)) for name, tensor in tensors(found)},
    }
    write_json(directory / RECORD, record)


def read_report(directory: Path) -> FoldReport:
    """The report of the fold that made a checkpoint.

    Raises:
        CheckpointError: tardis.json is missing or damaged.
    """
    record = Record.read(directory)
    if record is None:
        raise CheckpointError(f"{directory} has no {RECORD}, which holds the figures of its fold; they are not known.")
    try:
        report = FoldReport.from_dict(record.report)
        _check_report(report)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{record.path} is damaged ({error!r}); copy the checkpoint anew.") from error
    return report


def _check_report(report: FoldReport) -> None:
    """Raise TypeError where figures are no numbers, or their names no text."""
    for part in (*report.layers, *([report.linears] if report.linears else [])):
        for name, value in vars(part).items():
            unknown = value is None and name in ("damping", "loss_increase")
            if not unknown and not isinstance(value, str if name == "prefix" else int | float):
                raise TypeError(f"{name} {reprlib.repr(value)}")
    if not isinstance(report.config, dict) or not isinstance(report.calibration, dict):
        raise TypeError("config and calibration are no objects")
    if not isinstance(report.calibration.get("tokens", 0), int):
        raise TypeError(f"tokens {reprlib.repr(report.calibration['tokens'])}")
