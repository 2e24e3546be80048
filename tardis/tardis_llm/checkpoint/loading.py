"""Load dense and folded models and their tokenizers, from directories, GGUF files or the hub; errors say what to do.

The family is checked on the config, before any weight is read; weights that the files lack are an error, never random.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
)
from transformers.utils.hub import cached_file

from ..errors import CheckpointError, InvalidInputError, TardisError, UnsupportedModelError
from ..families.table import family_of
from ..report import FoldReport
from .config_file import first_line, is_local, load_config, not_found, quantisation
from .contents import refuse_missing
from .format import METHOD, PREFIX, stock_name
from .gguf import find_gguf
from .manifest import MANIFEST, read_report
from .skeleton import check_blocks
from .weight_files import TensorInfo, headers, weight_files

#: the dtypes that a model can be loaded in
DTYPES = ("float32", "bfloat16", "float16")

#: ends of the names of encoder classes whose output is one tensor, `logits` or `last_hidden_state`
_ENCODER_CLASSES = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


def dtype_name(model: PreTrainedModel) -> str:
    """The name of a model's dtype, such as "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def load_dense(model: str, dtype: str | None = None) -> PreTrainedModel:
    """Load a dense model of a supported family, in eval mode, on the CPU.

    Args:
        model: directory, GGUF file or hub name.
        dtype: one of `DTYPES`; None keeps the checkpoint's own, and is bfloat16 for a GGUF file in few bits.

    Raises:
        UnsupportedModelError: the family is gated or unknown.
        InvalidInputError: there is no such model or dtype, or the model is folded or quantised already.
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
    """Load a dense or folded model of a supported family, in eval mode, on the CPU.

    Args:
        model: directory, GGUF file or hub name.
        dtype: one of `DTYPES`; None keeps the checkpoint's own, and is bfloat16 for a GGUF file in few bits.

    Raises:
        UnsupportedModelError: the family is gated or unknown.
        InvalidInputError: there is no such model or dtype, or the model is quantised.
        CheckpointError: weights are missing or damaged, or are not those that were folded.

    Examples:
        >>> type(load_model("model")).__name__, type(load_model("folded")).__name__
        ('GPT2LMHeadModel', 'GPT2LMHeadModel')
    """
    config = load_config(model)
    return _load(model, config, dtype) if quantisation(config) == METHOD else load_dense(model, dtype)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        model: directory, GGUF file or hub name.

    Raises:
        InvalidInputError: it is missing or cannot be read.

    Examples:
        >>> tokenizer = load_tokenizer("model")
        >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
        'Once upon a time'
    """
    file = find_gguf(model)
    remedy = f"Put the model's tokenizer files (such as tokenizer.json and tokenizer_config.json) into {model}."
    if file:
        remedy = "Give the model as a Hugging Face directory with safetensors and a tokenizer."
    elif not is_local(model):
        remedy = "Download the model, put a tokenizer beside it, and give that directory."
    try:
        tokenizer: PreTrainedTokenizerBase = file.tokenizer() if file else AutoTokenizer.from_pretrained(model)
    except Exception as error:  # the library raises many kinds, all with the same remedy
        raise InvalidInputError(
            f"{model} has no tokenizer that can be loaded ({first_line(error)}). {remedy}"
        ) from error
    if not tokenizer.encode("text", add_special_tokens=False):  # transformers makes up an empty one
        raise InvalidInputError(f"{model} has no tokenizer. {remedy}")
    return tokenizer


def load_extractor(model: str) -> SequenceFeatureExtractor:
    """Load what makes a model's features of sound.

    Args:
        model: directory or hub name of a model of speech.

    Raises:
        InvalidInputError: it is missing or cannot be read.
    """
    try:
        extractor: SequenceFeatureExtractor = AutoFeatureExtractor.from_pretrained(model)
    except Exception as error:  # the library raises many kinds, all with the same remedy
        raise InvalidInputError(
            f"{model} has no feature extractor that can be loaded ({first_line(error)}). Put the model's "
            "preprocessor_config.json beside its weights."
        ) from error
    return extractor


def load_report(model: str) -> FoldReport | None:
    """Load the report of the fold that made a checkpoint.

    Args:
        model: directory or hub name.

    Returns:
        The report; None for a dense model, and for a folded one without tardis.json, which transformers does not
        write when it saves a loaded fold anew.

    Raises:
        InvalidInputError: there is no such model.
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
    if is_local(model):
        return read_report(Path(model)) if (Path(model) / MANIFEST).exists() else None
    try:
        path = cached_file(model, MANIFEST, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise not_found(model, error) from error
    return read_report(Path(path).parent) if path else None


def is_folded(model: str) -> bool:
    """Whether a model is folded.

    Args:
        model: directory or hub name.

    Raises:
        UnsupportedModelError: the family is gated or unknown.
        InvalidInputError: there is no such model.
        CheckpointError: config.json is damaged or contradicts itself.

    Examples:
        >>> is_folded("model"), is_folded("folded")
        (False, True)
    """
    return quantisation(load_config(model)) == METHOD


def _load(model: str, config: PreTrainedConfig, dtype: str | None) -> PreTrainedModel:
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInputError(f"dtype is {dtype!r}; give one of {', '.join(DTYPES)}.")
    loader = _auto_class(config) or _encoder_class(model, config)
    file = find_gguf(model)
    if file:
        check_blocks(config, len(file.header.tensors))
        arguments = file.arguments(config, dtype)
    else:
        arguments = _arguments(model, config, dtype)
    try:
        loaded, info = loader.from_pretrained(output_loading_info=True, **arguments)
    except TardisError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the weights of {model} cannot be read ({first_line(error)}). Copy or download the model anew."
        ) from error
    except Exception as error:  # the library raises many kinds, all for the same reason
        raise CheckpointError(
            f"the weights of {model} do not fit its config.json ({first_line(error)}). Copy both from the same model."
            if file is None
            else f"transformers cannot load the weights of {model} ({first_line(error)}). Give the model in another "
            "quantisation, or as a Hugging Face directory with safetensors."
        ) from error
    remedy = "Copy or download the model anew, or correct `architectures` in its config.json."
    refuse_missing(sorted(info["missing_keys"]), model, remedy)
    if file:
        file.check_shapes(loaded)
    ready: PreTrainedModel = loaded.eval()
    return ready


def _arguments(model: str, config: PreTrainedConfig, dtype: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model that is no GGUF file, whose weight files are checked first."""
    if is_local(model):
        found = check_weights(Path(model))
        check_blocks(config, len(found))
        if quantisation(config) is None:
            _refuse_unmarked(model, config, found)
    settings = _instead_of_bad_generation_config(model) if family_of(config).causal else {}
    return {"pretrained_model_name_or_path": model, "dtype": dtype or "auto", **settings}


def _instead_of_bad_generation_config(model: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that replace a generation_config.json which transformers cannot read.

    A warning says so. There are no arguments where the file can be read or does not exist.
    """
    try:
        GenerationConfig.from_pretrained(model)
    except OSError:  # there is none
        return {}
    except Exception as error:  # a value of the wrong type can raise anything
        warnings.warn(
            f"the generation_config.json of {model} cannot be used ({first_line(error)}); its settings are left out.",
            stacklevel=5,
        )
        return {"generation_config": GenerationConfig()}
    return {}


def _auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that loads models which generate text; None for an encoder."""
    if family_of(config).speech:
        return AutoModelForSpeechSeq2Seq
    return AutoModelForCausalLM if family_of(config).causal else None


def _encoder_class(model: str, config: PreTrainedConfig) -> Any:
    """The class of transformers that the config of an encoder names under `architectures`."""
    named = stock_name(config)
    found = getattr(transformers, named, None) if named.endswith(_ENCODER_CLASSES) else None
    if found is None or found.config_class is not type(config):
        raise UnsupportedModelError(
            f"config.json of {model} names the class {named or 'none'!r} under `architectures`, and TARDIS needs an "
            f"encoder class that ends in {', '.join(_ENCODER_CLASSES)}; name one that fits the weights, such as "
            "BertModel."
        )
    return found


def _refuse_unmarked(model: str, config: PreTrainedConfig, found: Mapping[str, TensorInfo]) -> None:
    """Refuse a folded checkpoint whose config.json no longer says so: only its dense weights would be loaded."""
    named = (config.architectures or [""])[0]
    folded = sorted(name for name in found if ".tardis." in f".{name}")
    if folded or named.startswith(PREFIX):
        raise CheckpointError(
            f"{model} is folded (it has {folded[0] if folded else named}), and its config.json has no "
            "quantization_config that says how; copy config.json anew, or fold again."
        )


def check_weights(directory: Path) -> dict[str, TensorInfo]:
    """Check that the weight files of a model exist and have sound headers.

    Returns:
        What the headers say, by the tensors' names; empty where the weights are in *.bin files.

    Raises:
        CheckpointError: a file is missing or damaged, or lies elsewhere; or two files have the same tensor.
    """
    files = weight_files(directory)
    if not files and not list(directory.glob("*.bin")):
        raise CheckpointError(f"{directory} has no weights (*.safetensors); copy or download the model anew.")
    return headers(files)
