"""tardis.json beside a checkpoint: the report of its fold, and what its tensors and config.json were when written.

It has the dtype, the shape and a digest of every tensor, and the fields of config.json that decide what the model
computes; a checkpoint that differs from it is refused. In format version 1 it has the digests alone.
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
from .weight_files import TensorInfo, described, directory_of, headers, tensors

MANIFEST = "tardis.json"
#: fields of config.json that do not change what a model computes: users may edit them
_FREE = frozenset(
    (
        *("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"),
        *("bos_token_id", "eos_token_id", "task_specific_params", "id2label", "label2id"),
        *("output_hidden_states", "return_dict"),
    )
)


@dataclass(frozen=True)
class Fingerprint:
    """What a tensor was when it was written.

    Attributes:
        sha256: digest of its bytes, in hexadecimal.
        dtype: its name, such as "float16"; None in format version 1.
        shape: its sizes; None in format version 1.
    """

    sha256: str
    dtype: str | None = None
    shape: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Fingerprint:
        """The fingerprint of a tensor in main memory."""
        return cls(digest([tensor]), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


@dataclass(frozen=True)
class Manifest:
    """What a tardis.json says.

    Attributes:
        path: of the file.
        format_version: version of the checkpoint format.
        fingerprints: those of all tensors, by their names in the weight files.
        config: the fields of config.json that decide what the model computes; None in format version 1.
        report: the report of the fold, as JSON values.
    """

    path: Path
    format_version: int
    fingerprints: dict[str, Fingerprint]
    config: dict[str, Any] | None
    report: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """Read the tardis.json in a directory; None where there is none.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = directory / MANIFEST
        if not path.exists():
            return None
        values = read_json(path)
        try:
            version = values["format_version"]
            if version not in range(1, FORMAT_VERSION + 1):
                raise ValueError(f"format_version {version!r}")
            fingerprints = {name: _fingerprint(each, version) for name, each in values["tensors"].items()}
            if not fingerprints:
                raise ValueError("no tensors")
            config = dict(values["config"]) if version > 1 else None
            return cls(path, version, fingerprints, config, values["report"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); copy the checkpoint anew.") from error

    def check(self, found: Mapping[str, TensorInfo]) -> None:
        """Compare config.json and the names, dtypes and shapes of a checkpoint's tensors with what was written.

        Args:
            found: what the headers of the weight files say, by the tensors' names.

        Raises:
            CheckpointError: a tensor or a field of config.json differs.
        """
        other = sorted(found.keys() ^ self.fingerprints.keys())
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

    def _check_header(self, name: str, stored: TensorInfo) -> None:
        written = self.fingerprints[name]
        if written.shape is None:
            return
        if (f"torch.{written.dtype}", written.shape) != (str(stored.dtype), stored.shape):
            raise CheckpointError(
                f"{stored.file}: the tensor {name} is {stored}, and {written.dtype} {list(written.shape)} was written. "
                f"{self._remedy}"
            )

    def check_tensor(self, name: str, tensor: Tensor, where: object) -> None:
        """Compare a tensor, byte for byte, with what was written.

        Args:
            name: of the tensor in the weight files.
            tensor: in main memory.
            where: the file or directory that it is from, for the message.

        Raises:
            CheckpointError: the tensor differs.
        """
        written, now = self.fingerprints.get(name), Fingerprint.of(tensor)
        if written is None or written.sha256 != now.sha256 or (written.shape is not None and written != now):
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
        now = deciding_fields(config)
        for name in sorted(now.keys() | self.config.keys()):
            if json.dumps(now.get(name), sort_keys=True) != json.dumps(self.config.get(name), sort_keys=True):
                raise CheckpointError(
                    f"config.json says {name} {_short(now.get(name))}, and {_short(self.config.get(name))} was "
                    f"written. {self._remedy}"
                )

    @property
    def _remedy(self) -> str:
        return f"Copy the files anew or fold again; if you changed it on purpose, delete {self.path}."


def _fingerprint(values: Any, version: int) -> Fingerprint:
    if version == 1:
        return Fingerprint(_text(values))
    return Fingerprint(_text(values["sha256"]), _text(values["dtype"]), tuple(values["shape"]))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{reprlib.repr(value)} for text")
    return value


def _short(value: object) -> str:
    return "nothing" if value is None else reprlib.repr(value)


def deciding_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that decide what the model computes.

    Those of `quantization_config` have dotted names, so that an error can name the one that differs.
    """
    fields = {name: value for name, value in config.items() if name not in _FREE}
    settings = fields.pop("quantization_config", None)
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if name in ("layers", "linears") and isinstance(value, dict):
            fields.update({f"quantization_config.{name}.{key}": each for key, each in value.items()})
        elif name != "crossover":
            fields[f"quantization_config.{name}"] = value
    return fields


def check_bytes(found: Mapping[str, TensorInfo]) -> None:
    """Compare every tensor of a checkpoint with tardis.json beside its files, if there is one.

    Raises:
        CheckpointError: tardis.json is damaged, or a tensor differs.
    """
    manifest = Manifest.read(directory_of(found)) if found else None
    if manifest is not None:
        for name, tensor in tensors(found):
            manifest.check_tensor(name, tensor, found[name].file)


def write_manifest(directory: Path, report: FoldReport) -> None:
    """Write tardis.json into a directory that has all other files of a checkpoint.

    Args:
        directory: with the weight files and config.json.
        report: of the fold.
    """
    found = headers(sorted(directory.glob("*.safetensors")))
    values = {
        "format_version": FORMAT_VERSION,
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
        "report": report.as_dict(),
        "config": deciding_fields(read_json(directory / CONFIG)),
        "tensors": {name: vars(Fingerprint.of(tensor)) for name, tensor in tensors(found)},
    }
    write_json(directory / MANIFEST, values)


def read_report(directory: Path) -> FoldReport:
    """Read the report of the fold that made the checkpoint in a directory.

    Raises:
        CheckpointError: tardis.json is missing or damaged.
    """
    manifest = Manifest.read(directory)
    if manifest is None:
        raise CheckpointError(
            f"{directory} has no {MANIFEST}, which holds the report of its fold; copy it from the original fold."
        )
    try:
        report = FoldReport.from_dict(manifest.report)
        _check_report(report)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest.path} is damaged ({error!r}); copy the checkpoint anew.") from error
    return report


def _check_report(report: FoldReport) -> None:
    """Raise TypeError where a field of a report has another type than it must have."""
    for part in (*report.layers, *([report.linears] if report.linears else [])):
        for name, value in vars(part).items():
            unknown = value is None and name in ("damping", "loss_increase")
            if not unknown and not isinstance(value, str if name == "prefix" else int | float):
                raise TypeError(f"{name} {reprlib.repr(value)}")
    if not all(isinstance(part, dict) for part in (report.config, report.calibration, report.source)):
        raise TypeError("config, calibration and source are no objects")
    if not isinstance(report.calibration.get("tokens", 0), int):
        raise TypeError(f"tokens {reprlib.repr(report.calibration['tokens'])}")
