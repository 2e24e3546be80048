"""Find a model's config.json, in a directory or on the hub, and check it before any weight is read."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from ..errors import CheckpointError, InvalidInputError, TardisError, UnsupportedModelError
from ..families.table import SUPPORTED, family_of
from ..files import read_json
from .format import METHOD, CheckpointConfig
from .gguf import find_gguf
from .saving import CONFIG, is_interrupted

#: the most classes of a classifier: transformers makes a dict with an entry for each as it reads a config
_MOST_LABELS = 1_000_000


def load_config(model: str) -> PreTrainedConfig:
    """The config of a model of a supported family.

    Args:
        model: directory, GGUF file or hub name.

    Raises:
        UnsupportedModelError: the family is gated or unknown.
        InvalidInputError: the directory or its config.json does not exist, or the hub cannot be reached.
        CheckpointError: config.json is damaged or contradicts itself.
    """
    file = find_gguf(model)
    config = file.config() if file else _read(model)
    family_of(config)
    if quantisation(config) == METHOD:
        CheckpointConfig.read(config.quantization_config)
    return config


def _read(model: str) -> PreTrainedConfig:
    """The config.json of a model."""
    if is_local(model):
        _check_directory(Path(model))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{model}: transformers does not know this kind of model ({first_line(error)}). {SUPPORTED}"
        ) from error
    except OSError as error:
        raise not_found(model, error) from error
    except Exception as error:  # the library raises many kinds, all for the same reason
        raise CheckpointError(
            f"config.json of {model} describes no model ({first_line(error)}); copy it anew."
        ) from error
    return config


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise InvalidInputError(f"there is no directory {directory}; give a model's directory, or its name on the hub.")
    config = directory / CONFIG
    if is_interrupted(directory):
        raise CheckpointError(
            f"writing a fold to {directory} was interrupted, and the model there is not complete. Run the same tardis "
            "fold again with --resume, or save the model again."
        )
    if not config.is_file():
        raise InvalidInputError(f"{directory} has no config.json; give the directory of a Hugging Face model.")
    labels = read_json(config).get("num_labels", 0)
    if not isinstance(labels, int) or labels > _MOST_LABELS:
        raise CheckpointError(f"{config} says that there are {str(labels)[:40]} labels; copy it anew.")


def quantisation(config: PreTrainedConfig) -> str | None:
    """The method by which a model is quantised or folded already, such as "gptq" or "tardis"; None if it is dense."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", "?")
    return str(getattr(method, "value", method))


def is_local(model: str) -> bool:
    """Whether a model's name is a path rather than a name on the hub, which is `name` or `owner/name`.

    A directory that exists is a path, even if a model on the hub has the same name.
    """
    path = Path(model)
    return path.exists() or path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2


def not_found(model: str, error: OSError) -> TardisError:
    """The error to raise where transformers could not read a file of a model, by path or from the hub."""
    if is_local(model):
        return CheckpointError(f"the config of {model} cannot be read ({first_line(error)}); copy it anew.")
    return InvalidInputError(
        f"{model!r} is no directory, and it cannot be downloaded from the Hugging Face hub ({first_line(error)}). Give "
        "the path of a downloaded model, or check the name, the network, and the access rights (`hf auth login`)."
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop; the error's class where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
