"""Load dense and folded models and their tokenizers, from directories or by hub name, with errors that say what to do.

The family is checked on the config, before any weight is read; weights that the files lack are an error, never random.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from ..calibration.text import default_length
from ..errors import CheckpointError, InvalidInputError, TardisError, UnsupportedModelError
from ..families.table import SUPPORTED, family_of
from ..families.table import position_limit as model_positions
from ..report import FoldReport
from .format import METHOD, PREFIX, CheckpointConfig, stock_name
from .record import RECORD, read_report
from .saving import is_interrupted
from .skeleton import check_blocks
from .weight_files import Entry, headers, weight_files

#: what `dtype` may be; None keeps the checkpoint's own
DTYPES = ("float32", "bfloat16", "float16")


def dtype_name(model: PreTrainedModel) -> str:
    """Name of a model's dtype, as in `DTYPES`."""
    return str(model.dtype).removeprefix("torch.")


#: classes of a classifier beyond which reading a config would take all memory
_MOST_LABELS = 1_000_000
#: ends of the names of encoder classes whose output is one tensor, `logits` or `last_hidden_state`
_ENCODER_CLASSES = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


def load_dense(model: str, dtype: str | None = None) -> PreTrainedModel:
    """A dense model of a supported family in eval mode, on the CPU.

    Args:
        model: directory or hub name.
        dtype: one of `DTYPES`; None keeps the checkpoint's own.

    Raises:
        UnsupportedModelError: the family is gated or unknown.
        InvalidInputError: there is no such model, or it is folded or quantised already.
        CheckpointError: weights are missing or damaged.

    Examples:
        >>> model = load_dense("model", dtype="bfloat16")
        >>> model.dtype, model.training
        (torch.bfloat16, False)
    """
    config = load_config(model)
    method = quantisation(config)
    if method == METHOD:
        raise InvalidInputError(f"{model} is folded already; give the dense model that it was made from.")
    if method:
        raise InvalidInputError(f"{model} is quantised ({method}); give the model in float32, bfloat16 or float16.")
    return _load(model, config, dtype)


def load_model(model: str, dtype: str | None = None) -> PreTrainedModel:
    """A dense or folded model in eval mode, on the CPU; arguments and errors as `load_dense`.

    Examples:
        >>> type(load_model("model")).__name__, type(load_model("folded")).__name__
        ('GPT2LMHeadModel', 'GPT2LMHeadModel')
    """
    config = load_config(model)
    return _load(model, config, dtype) if quantisation(config) == METHOD else load_dense(model, dtype)


def load_config(model: str) -> PreTrainedConfig:
    """The config of a model of a supported family.

    Args:
        model: directory or hub name.

    Raises:
        UnsupportedModelError: the family is gated or unknown.
        InvalidInputError: no such directory, no usable config.json in it, or the hub cannot be reached.
        CheckpointError: config.json is damaged, or says what cannot be.
    """
    if _is_local(model):
        _check_directory(Path(model))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{model}: transformers does not know this kind of model ({_first_line(error)}). {SUPPORTED}"
        ) from error
    except OSError as error:
        raise _not_found(model, error) from error
    except Exception as error:  # the library raises many kinds, all for the same reason
        raise CheckpointError(
            f"config.json of {model} describes no model ({_first_line(error)}); copy it anew."
        ) from error
    family_of(config)
    if quantisation(config) == METHOD:
        CheckpointConfig.read(config.quantization_config)
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        InvalidInputError: it is missing or cannot be read.

    Examples:
        >>> tokenizer = load_tokenizer("model")
        >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
        'Once upon a time'
    """
    remedy = f"Put the model's tokenizer files (such as tokenizer.json and tokenizer_config.json) into {model}."
    if not _is_local(model):
        remedy = "Download the model, put a tokenizer beside it, and give that directory."
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # the library raises many kinds, all with the same remedy
        raise InvalidInputError(
            f"{model} has no tokenizer that can be loaded ({_first_line(error)}). {remedy}"
        ) from error
    if not tokenizer.encode("text", add_special_tokens=False):  # transformers makes up an empty one
        raise InvalidInputError(f"{model} has no tokenizer. {remedy}")
    return tokenizer


def load_report(model: str) -> FoldReport | None:
    """The report of the fold that made a checkpoint; None for a dense model, and for a fold without tardis.json.

    transformers leaves that file out where it saves a loaded fold anew; `is_folded` tells which of the two it is.

    Args:
        model: directory or hub name.

    Raises:
        CheckpointError: the report is damaged.

    Examples:
        >>> report = load_report("folded")
        >>> round(report.reduction, 1)
        0.5
        >>> load_report("model") is None
        True
    """
    if not is_folded(model):
        return None
    if _is_local(model):
        return read_report(Path(model)) if (Path(model) / RECORD).exists() else None
    try:
        path = cached_file(model, RECORD, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise _not_found(model, error) from error
    return read_report(Path(path).parent) if path else None


def is_folded(model: str) -> bool:
    """Whether a directory or hub name is that of a folded model; errors as `load_config`.

    Examples:
        >>> is_folded("model"), is_folded("folded")
        (False, True)
    """
    return quantisation(load_config(model)) == METHOD


def window_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, wanted: int | None) -> int:
    """Tokens per window: as wanted, or else the most that model and tokenizer allow, 1024 at most.

    Raises:
        InvalidInputError: more is wanted than they allow.
    """
    limit = position_limit(model, tokenizer)
    if wanted is None:
        return default_length(tokenizer, limit)
    if wanted < 2 or (limit and wanted > limit):
        raise InvalidInputError(f"windows of {wanted} tokens do not fit this model; choose from 2 to {limit or 1024}.")
    return wanted


def position_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The most tokens that model and tokenizer allow in one text; None if neither sets a limit."""
    limits = [limit for limit in (model_positions(model.config), tokenizer and tokenizer.model_max_length) if limit]
    known = [int(limit) for limit in limits if limit < 2**31]  # "no limit" is 10^30 in a tokenizer
    return min(known, default=None)


def _load(model: str, config: PreTrainedConfig, dtype: str | None) -> PreTrainedModel:
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInputError(f"dtype is {dtype!r}; give one of {', '.join(DTYPES)}.")
    loader = AutoModelForCausalLM if family_of(config).causal else _encoder_class(model, config)
    if _is_local(model):
        found = check_weights(Path(model))
        check_blocks(config, len(found))
        if quantisation(config) is None:
            _refuse_unmarked(model, config, found)
    settings = _instead_of_bad_generation_config(model) if family_of(config).causal else {}
    try:
        loaded, info = loader.from_pretrained(
            model, dtype=getattr(torch, dtype) if dtype else "auto", output_loading_info=True, **settings
        )
    except TardisError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the weights of {model} cannot be read ({_first_line(error)}). Copy or download the model anew."
        ) from error
    except Exception as error:  # the library raises many kinds, all for the same reason
        raise CheckpointError(
            f"the weights of {model} do not fit its config.json ({_first_line(error)}). Copy both from the same model."
        ) from error
    _check_complete(model, info)
    ready: PreTrainedModel = loaded.eval()
    return ready


def _instead_of_bad_generation_config(model: str) -> dict[str, Any]:
    """Arguments that keep transformers from a generation_config.json at which it would stop; with a warning."""
    try:
        GenerationConfig.from_pretrained(model)
    except OSError:  # there is none
        return {}
    except Exception as error:  # of any kind, where a value has the wrong type
        warnings.warn(
            f"the generation_config.json of {model} cannot be used ({_first_line(error)}); its settings are left out.",
            stacklevel=4,
        )
        return {"generation_config": GenerationConfig()}
    return {}


def _encoder_class(model: str, config: PreTrainedConfig) -> Any:
    """The transformers class named in the config of an encoder."""
    named = stock_name(config)
    found = getattr(transformers, named, None) if named.endswith(_ENCODER_CLASSES) else None
    if found is None or found.config_class is not type(config):
        raise UnsupportedModelError(
            f"config.json of {model} names the class {named or 'none'!r} under `architectures`, and TARDIS needs an "
            f"encoder class that ends in {', '.join(_ENCODER_CLASSES)}; name one that fits the weights, such as "
            "BertModel."
        )
    return found


def _check_complete(model: str, info: dict[str, Any]) -> None:
    """Refuse weights that transformers drew at random because the files lack them."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"the weight files of {model} lack {len(missing)} tensors, the first is {missing[0]}; they would be "
            "random. Copy or download the model anew, or correct `architectures` in its config.json."
        )


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise InvalidInputError(f"there is no directory {directory}; give a model's directory, or its name on the hub.")
    config = directory / "config.json"
    if is_interrupted(directory):
        raise CheckpointError(
            f"writing a fold to {directory} was interrupted, and the model there is not complete. Run the same tardis "
            "fold again with --resume, or save the model again."
        )
    if not config.is_file():
        raise InvalidInputError(f"{directory} has no config.json; give the directory of a Hugging Face model.")
    labels = _read_config(config).get("num_labels", 0)
    if not isinstance(labels, int) or labels > _MOST_LABELS:
        raise CheckpointError(f"{config} says that there are {str(labels)[:40]} labels; copy it anew.")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); copy it anew.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object; copy it anew.")
    return values


def _refuse_unmarked(model: str, config: PreTrainedConfig, found: Mapping[str, Entry]) -> None:
    """Refuse a fold whose config.json no longer says that it is one: its dense weights would be loaded alone."""
    named = (config.architectures or [""])[0]
    folded = sorted(name for name in found if ".tardis." in f".{name}")
    if folded or named.startswith(PREFIX):
        raise CheckpointError(
            f"{model} is folded (it has {folded[0] if folded else named}), and its config.json has no "
            "quantization_config that says how; copy config.json anew, or fold again."
        )


def check_weights(directory: Path) -> dict[str, Entry]:
    """See that the weight files of a model are there and have sound headers; names the one that has not.

    Returns:
        What the headers say, by the tensors' names; nothing where there are no safetensors files.

    Raises:
        CheckpointError: a file is missing or damaged, lies elsewhere, or two have the same tensor.
    """
    files = weight_files(directory)
    if not files and not list(directory.glob("*.bin")):
        raise CheckpointError(f"{directory} has no weights (*.safetensors); copy or download the model anew.")
    return headers(files)


def quantisation(config: PreTrainedConfig) -> str | None:
    """The method with which a model is compressed already, if any."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", "?")
    return str(getattr(method, "value", method))


def _is_local(model: str) -> bool:
    """Whether it names a path; a hub name is `name` or `owner/name`, and a directory of that name comes first."""
    path = Path(model)
    return path.exists() or path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2


def _not_found(model: str, error: OSError) -> TardisError:
    if _is_local(model):
        return CheckpointError(f"the config of {model} cannot be read ({_first_line(error)}); copy it anew.")
    return InvalidInputError(
        f"{model!r} is no directory here, and on the Hugging Face hub it cannot be had ({_first_line(error)}). Give "
        "the path of a downloaded model, or check the name, the network, and the access rights (`hf auth login`)."
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
