"""The folded checkpoint, format version 1: a Hugging Face directory with `tardis.*` tensors beside the dense weights.

    config.json     the family's own fields; `quantization_config`: a `CheckpointConfig`; `architectures`: Tardis<Stock>
    *.safetensors   every dense tensor under its own name, and `<ffn>.tardis.*` per folded FFN
    tardis.json     the report of the fold, versions, and the SHA-256 of every tensor

W1 and W2 stay under their own names, so a loader that does not know TARDIS gets the exact dense model. Where low-bit
fallback weights stand for them, they are empty tensors, at whose shape such a loader stops. So are the weights of
linear layers outside the FFNs that are stored in few bits, as `codes` and `scale`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .config import FORMAT_VERSION
from .errors import CheckpointError, InvalidInputError
from .folding.fold import FoldedWeights
from .folding.lowbit import PackedMatrix
from .folding.stack import Fallback
from .linears import low_bit_linears
from .report import FoldReport
from .runtime.ffn import FoldedFFN, folded_ffns
from .saving import CONFIG, STAGING, publish, save_model, save_tokenizer, shard_bytes
from .workspace import digest, read_json, write_json

METHOD = "tardis"
RECORD = "tardis.json"
#: what precedes the stock class name in `architectures`
PREFIX = "Tardis"
_READABLE = 0o644  # transformers leaves weights readable by their owner alone


@dataclass
class CheckpointConfig(QuantizationConfigMixin):
    """What a folded model records about itself; `quantization_config` in config.json.

    Attributes:
        layers: per folded FFN, by its full name in the model, the fields of `LayerFormat`.
        format_version: of the checkpoint.
        calibration: what the fold was calibrated on.
        linears: bits per weight of each linear layer outside the FFNs that is stored in few, by its full name.
        crossover: tokens at once up to which folding is faster than the dense FFNs; None if that was not measured.
        quant_method: always "tardis".
    """

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    calibration: dict[str, Any] = field(default_factory=dict)
    linears: dict[str, int] = field(default_factory=dict)
    crossover: int | None = None
    quant_method: str = METHOD

    def __post_init__(self) -> None:
        if not isinstance(self.format_version, int) or not 1 <= self.format_version <= FORMAT_VERSION:
            raise CheckpointError(
                f"this checkpoint has format version {self.format_version!r}, and this TARDIS reads 1 to "
                f"{FORMAT_VERSION}. Update it (pip install -U tardis-llm), or fold the model again."
            )
        if not self.layers:
            raise CheckpointError("config.json names no folded layers; copy the checkpoint anew, or fold again.")


@dataclass(frozen=True)
class LayerFormat:
    """How one folded FFN is stored.

    Attributes:
        activation: a name in `ACTIVATIONS`.
        bits: of the predictor.
        group_size: input weights per scale, in every low-bit matrix.
        range_dtype: "float16" or "float32", of ranges and lines.
        fold_bits, fallback_bits: as in `Storage`.
    """

    activation: str
    bits: int
    group_size: int
    range_dtype: str
    fold_bits: int | None = None
    fallback_bits: int | None = None

    @classmethod
    def from_config(cls, name: str, values: dict[str, Any]) -> LayerFormat:
        """The format of the FFN `name` from its fields in config.json.

        Raises:
            CheckpointError: there are fields that this version does not know.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(
                f"config.json describes {name} in a way that this version does not know ({error}); update TARDIS "
                "(pip install -U tardis-llm), or fold again."
            ) from error

    @classmethod
    def of(cls, ffn: FoldedFFN) -> LayerFormat:
        """The format of a folded FFN in memory."""
        weights, fallback = ffn.weights, ffn.fallback
        fold_bits = weights.weight.bits if isinstance(weights.weight, PackedMatrix) else None
        return cls(
            activation=ffn.activation,
            bits=weights.predictor.bits,
            group_size=weights.predictor.group_size,
            range_dtype=str(weights.low.dtype).removeprefix("torch."),
            fold_bits=fold_bits,
            fallback_bits=fallback.down.bits if fallback else None,
        )

    def empty(self, d: int, h: int, dtype: torch.dtype, device: torch.device) -> FoldedFFN:
        """A folded FFN of this format without content.

        Args:
            d, h: width and neurons.
            dtype: of the fold.
            device: such as meta.
        """

        def low_bit(rows: int, bits: int) -> PackedMatrix:
            planes = torch.empty(rows, bits, -(-d // 8), dtype=torch.uint8, device=device)
            scale = torch.empty(rows, -(-d // self.group_size), dtype=torch.float16, device=device)
            return PackedMatrix(planes, scale, d, self.group_size)

        def values(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        fallback = None
        if self.fallback_bits:
            left = self.fallback_bits - self.bits
            fallback = Fallback(low_bit(h, left) if left else None, low_bit(h, self.fallback_bits))
        fold = low_bit(d, self.fold_bits) if self.fold_bits else values(d, d)
        low, high, slope, offset = (values(h, dtype=getattr(torch, self.range_dtype)) for _ in range(4))
        weights = FoldedWeights(fold, values(d), low_bit(h, self.bits), low, high, slope, offset, fallback)
        return FoldedFFN(weights, self.activation)


def save_folded(
    model: PreTrainedModel,
    report: FoldReport,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a folded model. A model that is in `directory` is replaced whole; see `saving.publish`.

    A generation_config.json that transformers would not save is written as it is, with a warning, and so is a
    checkpoint whose tokenizer cannot be saved.

    Args:
        model: folded by `tardis_llm.fold`; it gets the quantiser that a loaded one has.
        report: of the fold.
        directory: made if missing.
        tokenizer: saved beside the model.
        max_shard_size: of one file: bytes, or such as "5GB" or "5GiB".

    Raises:
        InvalidInputError: the model has no folded FFN, or the size is none.
        OSError, SafetensorError: the disk is full or cannot be written; `directory` keeps what it had.
    """
    size = shard_bytes(max_shard_size)
    mark_folded(model, report.calibration)
    staging = directory / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        save_model(model, staging, size)
        if tokenizer is not None:
            save_tokenizer(tokenizer, staging)
        _rename_architecture(staging)
        _write_record(staging, report)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    publish(staging, directory)
    staging.rmdir()


def mark_folded(model: PreTrainedModel, calibration: dict[str, Any]) -> None:
    """Give a model folded in memory what transformers needs to save it and recognise it later."""
    formats = {name: vars(LayerFormat.of(ffn)) for name, ffn in folded_ffns(model).items()}
    if not formats:
        raise InvalidInputError("the model has no folded FFN to save; fold it first with tardis_llm.fold.")
    linears = {name: layer.bits for name, layer in low_bit_linears(model).items()}
    config = CheckpointConfig(layers=formats, calibration=calibration, linears=linears)
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)


def record_crossover(directory: Path, tokens: int) -> None:
    """Write into a checkpoint's config.json up to how many tokens at once folding was measured to be faster.

    Raises:
        CheckpointError: the directory holds no folded model.
    """
    if not is_folded(directory):
        raise CheckpointError(f"{directory} holds no folded model to record a crossover in; fold one with tardis fold.")
    config = read_json(directory / CONFIG)
    config["quantization_config"]["crossover"] = tokens
    write_json(directory / CONFIG, config)


def is_folded(directory: Path) -> bool:
    """Whether a directory holds a folded checkpoint."""
    path = directory / CONFIG
    return path.is_file() and (read_json(path).get("quantization_config") or {}).get("quant_method") == METHOD


def read_report(directory: Path) -> FoldReport:
    """The report of the fold that made a checkpoint.

    Raises:
        CheckpointError: tardis.json is missing or damaged.
    """
    record = read_json(directory / RECORD)
    try:
        return FoldReport.from_dict(record["report"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / RECORD} is damaged ({error!r}); copy the checkpoint anew.") from error


def verify(files: Sequence[Path], expected: Sequence[str]) -> None:
    """Check the weight files of a checkpoint: whole, complete, and as they were written.

    Contents are compared where tardis.json lies beside the files.

    Args:
        files: all of them.
        expected: names of tensors that must be there.

    Raises:
        CheckpointError: names the file and what to do.
    """
    record = files[0].parent / RECORD
    digests = read_json(record).get("tensors", {}) if record.exists() else {}
    seen = set()
    for file in files:
        for name, tensor in _tensors(file):
            seen.add(name)
            if digests and digests.get(name) != digest([tensor]):
                raise CheckpointError(
                    f"{file}: the tensor {name} is not the one that was written (its SHA-256 differs from {record}). "
                    f"Copy the file anew or fold again; if you changed it on purpose, delete {record}."
                )
    missing = sorted((set(expected) | set(digests)) - seen)
    if missing:
        raise CheckpointError(
            f"{files[0].parent} lacks {len(missing)} tensors of the folded model, the first is {missing[0]}. A weight "
            "file is missing or from another model: copy the checkpoint anew, or fold again."
        )


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                yield name, handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is missing, truncated or damaged ({error}). Copy it anew, or fold the model again."
        ) from error


def _rename_architecture(staging: Path) -> None:
    """Call the model `Tardis<Stock>` in config.json: who goes by that name and does not know TARDIS refuses it."""
    config = read_json(staging / CONFIG)
    config["architectures"] = [f"{PREFIX}{name}" for name in config["architectures"]]
    write_json(staging / CONFIG, config)


def _write_record(staging: Path, report: FoldReport) -> None:
    files = sorted(staging.glob("*.safetensors"))
    for file in files:
        file.chmod(_READABLE)
    record = {
        "format_version": FORMAT_VERSION,
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
        "report": report.as_dict(),
        "tensors": {name: digest([tensor]) for file in files for name, tensor in _tensors(file)},
    }
    write_json(staging / RECORD, record)
