"""Write the files of a model and publish them in a directory, so that no loader ever finds a mixture of two models."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InvalidInputError

CONFIG = "config.json"
#: folder inside the checkpoint's directory in which its files are written before they are published
STAGING = ".tardis-staging"
_GENERATION = "generation_config.json"

#: names under which loaders look for weights and settings of a model, and for its tokenizer
_MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json", "tf_model.h5"),
    *("flax_model*.msgpack", "adapter_config.json", "adapter_model.*", _GENERATION, "tardis.json"),
)
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*", "spiece.model", "sentencepiece*.model"),
)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def shard_bytes(size: int | str) -> int:
    """The number of bytes in a size such as 5GB, 500MB, 5GiB or 2000000000.

    Raises:
        InvalidInputError: it is not a size, or less than one byte.
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Z]*)", str(size).strip().upper())
    unit = _UNITS.get(found[2]) if found else None
    count = int(float(found[1]) * unit) if found and unit else 0
    if count < 1:
        raise InvalidInputError(f"max_shard_size is {size!r}; give a size such as 5GB, 500MB, 5GiB or 2000000000.")
    return count


def check_savable(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, max_shard_size: int | str = "5GB"
) -> None:
    """Check, before a model is folded, that `save_folded` will be able to save it.

    Args:
        model, tokenizer, max_shard_size: what `save_folded` will get.

    Raises:
        InvalidInputError: `max_shard_size` is not a size, or config or tokenizer cannot be saved.
    """
    shard_bytes(max_shard_size)
    for part, what in ((model.config, "config"), (tokenizer, "tokenizer")):
        if part is None:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            try:
                part.save_pretrained(scratch)
            except Exception as error:  # the library raises many kinds, all with the same remedy
                raise InvalidInputError(
                    f"the {what} of this model cannot be saved ({error}), so its fold could not be saved either. "
                    "Correct the model's files until transformers can load and save it."
                ) from error


def save_model(model: PreTrainedModel, staging: Path, max_shard_size: int) -> None:
    """Write a model's weights, its config.json and, if it generates text, its generation_config.json.

    Args:
        model: to save.
        staging: folder to write to.
        max_shard_size: the most bytes of one weight file.
    """
    settings = model.generation_config if model.can_generate() else None
    try:
        if settings is not None:
            model.generation_config = GenerationConfig()  # transformers refuses to save some that it loads
        model.save_pretrained(staging, max_shard_size=max_shard_size)
    finally:
        if settings is not None:
            model.generation_config = settings
    if settings is not None:
        _save_generation_config(settings, staging)


def _save_generation_config(settings: GenerationConfig, staging: Path) -> None:
    settings.to_json_file(staging / _GENERATION, use_diff=True, keys_to_pop=["compile_config"])
    try:
        settings.validate(strict=True)
    except Exception as error:  # a value of the wrong type can raise anything
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"the model's generation_config.json has settings that transformers finds wrong ({reason}); it was "
            "written unchanged.",
            stacklevel=4,
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, staging: Path) -> None:
    """Write the files of a tokenizer; warn where it cannot be saved.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    try:
        tokenizer.save_pretrained(staging)
    except OSError:
        raise
    except Exception as error:  # the library raises many kinds; a fold is not given up for any of them
        warnings.warn(
            f"the tokenizer could not be saved ({error}); copy its files into the directory of the fold.",
            stacklevel=3,
        )


def publish(staging: Path, directory: Path) -> None:
    """Move the files of a checkpoint into `directory`, in place of any model that is there; other files stay.

    No loader takes a directory without a config.json. So the old config.json is deleted first and the new one moved
    last: a process that is killed leaves the old checkpoint, the new one, or a directory that loaders refuse.

    Args:
        staging: folder with the files of the checkpoint, config.json among them; empty afterwards.
        directory: where the files go; on the same file system.
    """
    for path in staging.iterdir():
        _sync(path)
    stale = list(_stale(staging, directory))
    (directory / CONFIG).unlink(missing_ok=True)
    _sync(directory)
    for path in stale:
        path.unlink()
    for path in sorted(staging.iterdir()):
        if path.name != CONFIG:
            _move(path, directory / path.name)
    _sync(directory)
    os.replace(staging / CONFIG, directory / CONFIG)
    _sync(directory)


def is_interrupted(directory: Path) -> bool:
    """Whether the process that published a checkpoint in `directory` ended before it was done."""
    return not (directory / CONFIG).exists() and (directory / STAGING / CONFIG).exists()


def _stale(staging: Path, directory: Path) -> Iterator[Path]:
    """Files of an older model in `directory` that loaders would read beside the new checkpoint, or instead of it."""
    tokenizer = any(path for pattern in _TOKENIZER_FILES for path in staging.glob(pattern))
    for pattern in (*_MODEL_FILES, *(_TOKENIZER_FILES if tokenizer else ())):
        for path in directory.glob(pattern):
            if not path.is_dir() and not (staging / path.name).exists():
                yield path


def _move(path: Path, target: Path) -> None:
    if path.is_dir() and target.is_dir():
        shutil.rmtree(target)
    os.replace(path, target)


def _sync(path: Path) -> None:
    """Make sure that a file, or the names of the files in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(handle)
