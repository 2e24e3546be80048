"""The folded checkpoint, format version 2: a Hugging Face directory with `tardis.*` tensors beside the dense weights.

    config.json     the family's own fields; `quantization_config`: a `CheckpointConfig`; `architectures`: Tardis<Stock>
    *.safetensors   every dense tensor under its own name, and `<ffn>.tardis.*` per folded FFN
    tardis.json     the report of the fold, versions, and what every tensor and config.json were: see `record`

W1 and W2 stay under their own names, so a loader that does not know TARDIS gets the exact dense model. Where low-bit
fallback weights stand for them, they are empty tensors, at whose shape such a loader stops. So are the weights of
linear layers outside the FFNs that are stored in few bits, as `codes` and `scale`.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoHfQuantizer

from .errors import CheckpointError, InvalidInputError
from .format import METHOD, PREFIX, CheckpointConfig, LayerFormat
from .linears import low_bit_linears
from .record import CONFIG, write_record
from .report import FoldReport
from .runtime.ffn import folded_ffns
from .workspace import read_json, write_json

_STAGING = ".tardis-staging"
_READABLE = 0o644  # transformers leaves weights readable by their owner alone


def save_folded(
    model: PreTrainedModel,
    report: FoldReport,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a folded model. What is in `directory` under the same names is replaced, config.json last.

    Args:
        model: folded by `tardis_llm.fold`; it gets the quantiser that a loaded one has.
        report: of the fold.
        directory: made if missing.
        tokenizer: saved beside the model.
        max_shard_size: of one file, as transformers spells it.

    Raises:
        InvalidInputError: the model has no folded FFN.
        OSError, SafetensorError: the disk is full or cannot be written; `directory` keeps what it had.
    """
    mark_folded(model, report.calibration)
    staging = directory / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        _write_record(staging, report)
        _publish(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def mark_folded(model: PreTrainedModel, calibration: dict[str, Any]) -> None:
    """Give a model folded in memory what transformers needs to save it and recognise it later."""
    formats = {name: vars(LayerFormat.of(ffn)) for name, ffn in folded_ffns(model).items()}
    if not formats:
        raise InvalidInputError("the model has no folded FFN to save; fold it first with tardis_llm.fold.")
    linears = {name: layer.bits for name, layer in low_bit_linears(model).items()}
    config = CheckpointConfig(layers=formats, calibration=calibration, linears=linears)
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    save_as_folded(model)


def save_as_folded(model: PreTrainedModel) -> None:
    """See that `save_pretrained` of a folded model names it as a fold, so that loaders that do not know it refuse."""
    setattr(model, "save_pretrained", functools.partial(_save, model))  # noqa: B010 - a method of its class


def _save(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """`save_pretrained`, with `Tardis<Stock>` under `architectures`."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    path = Path(save_directory) / CONFIG
    if path.is_file():  # only the main process writes it
        config = read_json(path)
        config["architectures"] = [f"{PREFIX}{name.removeprefix(PREFIX)}" for name in config["architectures"]]
        write_json(path, config)
    if push_to_hub:
        names = ("token", "max_shard_size", "commit_message", "commit_description", "private", "revision", "create_pr")
        given = {name: kwargs[name] for name in names if name in kwargs}
        model.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **given)


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
    settings = read_json(path).get("quantization_config") if path.is_file() else None
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def _write_record(staging: Path, report: FoldReport) -> None:
    for file in staging.glob("*.safetensors"):
        file.chmod(_READABLE)
    write_record(staging, report)


def _publish(staging: Path, directory: Path) -> None:
    """Move finished files into place; a folded model that was there is replaced whole."""
    new = sorted(path.name for path in staging.iterdir())
    if is_folded(directory):
        for stale in [*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")]:
            if stale.name not in new:
                stale.unlink()
    for name in sorted(new, key=lambda name: name == CONFIG):
        os.replace(staging / name, directory / name)
