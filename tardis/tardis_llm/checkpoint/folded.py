"""The folded checkpoint, format version 4: a Hugging Face directory with `tardis.*` tensors beside the dense weights.

    config.json     the family's own fields; `quantization_config`: a `CheckpointConfig`; `architectures`: Tardis<Stock>
    *.safetensors   every dense tensor under its own name, and `<ffn>.tardis.*` per folded FFN
    tardis.json     the report of the fold, versions, a digest of every tensor, and what config.json said

W1 and W2 stay under their own names, so a loader that does not know TARDIS gets the exact dense model. Where low-bit
fallback weights replace them, W1 and W2 are empty tensors, at whose shape such a loader stops. The same holds for
linear layers outside the FFNs whose weights are stored in few bits, as `planes` and `scale`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, SequenceFeatureExtractor
from transformers.quantizers.auto import AutoHfQuantizer

from ..errors import CheckpointError, InvalidInputError
from ..files import read_json, write_json
from ..report import FoldReport
from ..runtime.linears.head import PredictedHead
from ..runtime.linears.placing import low_bit_linears, predicted_heads
from ..runtime.placing import folded_ffns
from .format import METHOD, PREFIX, CheckpointConfig, HeadFormat
from .manifest import write_manifest
from .saving import CONFIG, STAGING, publish, save_model, save_tokenizer, shard_bytes

#: the original `save_pretrained`, which `integrations.transformers` replaces by one that knows folded models
transformers_save = PreTrainedModel.save_pretrained
_READABLE = 0o644  # transformers makes weight files that only their owner can read


def save_folded(
    model: PreTrainedModel,
    report: FoldReport,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
    extractor: SequenceFeatureExtractor | None = None,
) -> None:
    """Write a folded model into a directory, in place of any model that is there.

    If writing is interrupted, the directory holds the old model, the new one, or one that loaders refuse; never a
    mixture. A generation_config.json that transformers refuses to save is written unchanged, with a warning. A
    tokenizer that cannot be saved is left out, with a warning.

    Args:
        model: folded by `tardis_llm.fold`. Afterwards it has the quantiser of a loaded folded model.
        report: what `tardis_llm.fold` returned.
        directory: made if it does not exist.
        tokenizer: the model's, saved beside it.
        max_shard_size: the most that one weight file may take: a number of bytes, or text such as "5GB" or "5GiB".
        extractor: what makes the features of a model of speech, saved beside it.

    Raises:
        InvalidInputError: the model has no folded FFN, or `max_shard_size` is not a size.
        OSError, SafetensorError: the disk is full or cannot be written; `directory` keeps what it had.

    Examples:
        >>> from tardis_llm import FoldConfig, fold
        >>> report = fold(model, windows, FoldConfig(reduction=0.5))
        >>> save_folded(model, report, "out", tokenizer)
        >>> Path("out/tardis.json").exists()
        True
    """
    size, directory = shard_bytes(max_shard_size), Path(directory)
    mark_folded(model, report.calibration)
    staging = directory / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        save_model(model, staging, size)
        if tokenizer is not None:
            save_tokenizer(tokenizer, staging)
        if extractor is not None:
            extractor.save_pretrained(staging)
        for file in staging.glob("*.safetensors"):
            file.chmod(_READABLE)
        write_manifest(staging, report)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    publish(staging, directory)
    staging.rmdir()


def mark_folded(model: PreTrainedModel, calibration: dict[str, Any]) -> None:
    """Give a model that was folded in memory the config and the quantiser by which transformers saves it as folded.

    Args:
        model: with folded FFNs.
        calibration: what it was calibrated on, as in `FoldReport.calibration`.

    Raises:
        InvalidInputError: the model has no folded FFN.
    """
    formats = {name: vars(ffn.weights.format) for name, ffn in folded_ffns(model).items()}
    if not formats:
        raise InvalidInputError("the model has no folded FFN to save; fold it first with tardis_llm.fold.")
    found = low_bit_linears(model)
    linears, sizes = {name: layer.bits for name, layer in found.items()}, [layer.group_size for layer in found.values()]
    config = CheckpointConfig(
        layers=formats,
        calibration=calibration,
        linears=linears,
        linear_group_size=max(sizes, default=None),
        head=_described(predicted_heads(model)),
    )
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)


def _described(heads: dict[str, PredictedHead]) -> dict[str, Any] | None:
    """How config.json describes the head of a model, if it has a predictor."""
    return next((vars(HeadFormat(name, *head.bits, head.top)) for name, head in heads.items()), None)


def save_marked(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """Save a folded model as transformers does, and name `Tardis<Stock>` as its architecture.

    Loaders that go by that name and do not know TARDIS refuse the checkpoint.

    Args:
        model: with the quantiser that `mark_folded` gives.
        save_directory, args, push_to_hub, kwargs: those of `PreTrainedModel.save_pretrained`.
    """
    transformers_save(model, save_directory, *args, **kwargs)
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
    """Write into a checkpoint's config.json up to how many tokens at once its folds are faster than dense FFNs.

    Args:
        directory: of a folded checkpoint.
        tokens: the number, as measured.

    Raises:
        CheckpointError: the directory holds no folded model.
    """
    if not holds_fold(directory):
        raise CheckpointError(f"{directory} holds no folded model to record a crossover in; fold one with tardis fold.")
    config = read_json(directory / CONFIG)
    config["quantization_config"]["crossover"] = tokens
    write_json(directory / CONFIG, config)


def holds_fold(directory: Path) -> bool:
    """Whether a directory holds a folded checkpoint."""
    path = directory / CONFIG
    settings = read_json(path).get("quantization_config") if path.is_file() else None
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD
