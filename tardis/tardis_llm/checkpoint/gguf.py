"""GGUF files, which llama.cpp runs, as dense models: transformers reads them and writes their weights out.

The weights were rounded when the file was made; what a fold loses comes on top of that. Of the file only the header is
read here, for the checks and for what transformers' reader leaves out.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CheckpointError, InvalidInputError, UnsupportedModelError
from .gguf_header import Header
from .saving import CONFIG, is_interrupted

SUFFIX = ".gguf"
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_PROJECTOR = "mmproj"
_WEIGHTS = ("*.safetensors", "*.bin")
#: formats that are no rounding to few bits -> the dtype to load them in
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: the dtype of weights that were rounded to few bits: it adds no error that counts
_ROUNDED = "bfloat16"
#: vocabularies that begin texts with a token although the file does not say so, as in llama.cpp
_BEGUN = ("llama3", "llama-v3", "llama-bpe")
#: fields that transformers leaves in a config under other names than those that the model reads
_FIELDS = {"gpt2": {"n_ctx": "n_positions", "feed_forward_length": "n_inner"}}


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that holds a whole language model.

    Attributes:
        path: of the file.
        header: what its header says.
    """

    path: Path
    header: Header

    @property
    def quantisation(self) -> str:
        """The format of most weights, such as "Q4_K_M"; "F16" and the like where they were not rounded to few bits."""
        import gguf

        said = self.header.metadata.get("general.file_type")
        if said in list(gguf.LlamaFileType):
            return gguf.LlamaFileType(said).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        sizes: Counter[int] = Counter()
        for tensor in self.header.tensors:
            sizes[tensor.kind] += tensor.elements
        return str(gguf.GGMLQuantizationType(sizes.most_common(1)[0][0]).name)

    @property
    def rounded(self) -> bool:
        """Whether the weights were rounded to few bits."""
        return self.quantisation not in _PLAIN

    @property
    def dtype(self) -> str:
        """The dtype that the model is loaded in where none is asked for."""
        return _PLAIN.get(self.quantisation, _ROUNDED)

    def source(self) -> dict[str, str]:
        """What a fold's report says of the file."""
        return {"format": "gguf", "file": self.path.name, "quantisation": self.quantisation}

    def config(self) -> PreTrainedConfig:
        """The config of the model, a new object on every call.

        Raises:
            UnsupportedModelError: transformers cannot read the architecture.
            CheckpointError: the metadata describes no model.
        """
        stat = self.path.stat()
        return copy.deepcopy(_config(self.path, str(self.header.metadata["general.architecture"]), stat.st_mtime_ns))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the file, which begins texts with a token where the file says so."""
        with tempfile.TemporaryDirectory() as alone:  # transformers would rather take a tokenizer.json beside the file
            Path(alone, self.path.name).symlink_to(self.path.resolve())
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(alone, gguf_file=self.path.name)
        tokenizer.name_or_path = str(self.path.parent)
        metadata = self.header.metadata
        known = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in _BEGUN
        begun = metadata.get("tokenizer.ggml.add_bos_token", known)
        if tokenizer.bos_token is not None and hasattr(tokenizer, "add_bos_token"):
            tokenizer.add_bos_token = bool(begun)  # transformers does not read it
        return tokenizer

    def arguments(self, config: PreTrainedConfig, dtype: str | None) -> dict[str, Any]:
        """Arguments of `from_pretrained` that load the model with its weights written out.

        Weights are converted one by one as they are read, so beside the model there are, for a moment, three fp32
        copies of one tensor, and not of all.

        Args:
            config: of the model; reading it from the file takes seconds.
            dtype: name of a dtype; None for `self.dtype`.
        """
        settings = {}
        if hasattr(transformers, "GgufConfig"):  # from 5.19 on, which may otherwise leave the weights packed
            settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
        place = {"pretrained_model_name_or_path": str(self.path.parent), "gguf_file": self.path.name}
        return {**place, **settings, "config": config, "dtype": dtype or self.dtype}

    def check_shapes(self, model: PreTrainedModel) -> None:
        """Compare the shapes of a loaded model's weights with those of its config: transformers 5.19 does not.

        Raises:
            CheckpointError: a weight has another shape.
        """
        with torch.device("meta"):
            wanted = type(model)(model.config).state_dict()
        for name, weight in model.state_dict().items():
            if name in wanted and weight.shape != (right := wanted[name].shape):
                raise CheckpointError(
                    f"{self.path}: {name} is {list(weight.shape)}, and the metadata ask for {list(right)}. "
                    "Copy or download the file anew, or give the model as a Hugging Face directory with safetensors."
                )


def find_gguf(model: str) -> GgufFile | None:
    """The GGUF file that a model's name means: the file itself, or the only one in a directory without other weights.

    Args:
        model: file, directory or hub name.

    Returns:
        The file; None where the name means a model in another format.

    Raises:
        InvalidInputError: there is no such file, it holds no whole language model, there are several in the directory,
            or the package `gguf` is missing.
        CheckpointError: the file is damaged, or no GGUF file.
    """
    path = Path(model)
    if path.is_dir():
        return _only_one(path)
    if path.suffix.lower() != SUFFIX:
        return None
    if not path.is_file():
        raise InvalidInputError(f"there is no file {path}; give a GGUF file, or the directory that it is in.")
    return _opened(path)


def _only_one(directory: Path) -> GgufFile | None:
    if is_interrupted(directory) or _has_weights(directory):
        return None
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() == SUFFIX)
    # a projector lies beside the model that it belongs to, and parts of one model beside each other
    models = [path for path in files if _PROJECTOR not in path.name.lower()] or files
    if len(models) > 1 and not all(_PART.search(path.name) for path in models):
        raise InvalidInputError(
            f"{directory} has several GGUF files ({_names(models)}); give one of them as the model."
        )
    return _opened(models[0]) if models else None


def _has_weights(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and any(path for pattern in _WEIGHTS for path in directory.glob(pattern))


def _names(files: Sequence[Path]) -> str:
    shown = ", ".join(path.name for path in files[:5])
    return f"{shown} and {len(files) - 5} more" if len(files) > 5 else shown


def _opened(path: Path) -> GgufFile:
    if importlib.util.find_spec("gguf") is None:
        raise InvalidInputError(f"{path} is read by the package gguf: pip install 'tardis-llm[gguf]'.")
    stat = path.stat()
    return _checked(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _checked(path: Path, changed: int, size: int) -> GgufFile:
    """The file at `path`, read again when its time or size has changed."""
    try:
        header = Header.read(path)
    except (ValueError, struct.error, MemoryError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is no GGUF file, or a damaged one ({error}); copy or download it anew."
        ) from error
    _refuse_other_contents(path, header.metadata)
    _check_size(path, header, size)
    return GgufFile(path, header)


def _refuse_other_contents(path: Path, metadata: dict[str, Any]) -> None:
    """Raise InvalidInputError for a file that is no whole language model."""
    if _PART.search(path.name) or metadata.get("split.count", 1) > 1:
        raise InvalidInputError(
            f"{path} is one part of a model in several files; join them first, by llama.cpp's llama-gguf-split "
            "--merge FIRST-PART WHOLE.gguf, and give the whole."
        )
    kind, architecture = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if _PROJECTOR in (kind, architecture) or architecture == "clip":
        raise InvalidInputError(
            f"{path} is the vision projector of a model (mmproj); give the GGUF file of its language model."
        )
    if kind != "model":
        raise InvalidInputError(f"{path} is of the type {kind!r}, and no model; give the GGUF file of a model.")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path} does not say its architecture; copy or download it anew.")


def _check_size(path: Path, header: Header, size: int) -> None:
    """Raise CheckpointError where the file ends before its tensors do."""
    import gguf

    for tensor in header.tensors:
        if tensor.kind not in list(gguf.GGMLQuantizationType):
            raise CheckpointError(
                f"{path} has weights of type {tensor.kind}, which the installed package gguf does not know: pip "
                "install --upgrade gguf, or give the model in another quantisation."
            )
        block, stored = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        end = tensor.offset + tensor.elements // block * stored
        if end > size:
            raise CheckpointError(
                f"{path} is truncated: it has {size:,} bytes, and its weights end at {end:,} or later. Copy or "
                "download it anew."
            )


@lru_cache(maxsize=8)
def _config(path: Path, architecture: str, changed: int) -> PreTrainedConfig:
    """The config in the file at `path`, read again when its time has changed: that takes 10 seconds for Gemma 3."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{path}: transformers {transformers.__version__} cannot read GGUF files of the architecture "
            f"{architecture!r} ({error}). Give the model as a Hugging Face directory with safetensors."
        ) from error
    except Exception as error:  # the library raises many kinds, all for the same reason
        raise CheckpointError(
            f"the metadata of {path} describes no model that transformers knows ({error!r}); copy or download it anew, "
            "or give the model as a Hugging Face directory with safetensors."
        ) from error
    for name, right in _FIELDS.get(config.model_type, {}).items():
        if name in vars(config):
            setattr(config, right, getattr(config, name))
            delattr(config, name)
    vars(config).pop("_model_name_or_path", None)  # the name in the metadata, which is no path
    return config
