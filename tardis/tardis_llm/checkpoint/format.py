"""What config.json says of a fold: `quantization_config`, read as the work of strangers and checked against itself."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import FORMAT_VERSION, PREDICTOR_BITS, STACKED_BITS
from ..errors import CheckpointError
from ..ffn.activations import ACTIVATIONS
from ..ffn.weights import FoldFormat

METHOD = "tardis"
#: what precedes the stock class name in `architectures`
PREFIX = "Tardis"
_RANGE_DTYPES = ("float16", "float32")
_UPDATE = "update TARDIS (pip install -U tardis-llm), or fold again"


@dataclass
class CheckpointConfig(QuantizationConfigMixin):
    """What a folded model records about itself; `quantization_config` in config.json.

    Attributes:
        layers: per folded FFN, by its full name in the model, the fields of `FoldFormat`.
        format_version: of the checkpoint.
        calibration: what the fold was calibrated on.
        linears: bits per weight of each linear layer outside the FFNs that is stored in few, by its full name.
        crossover: tokens at once up to which folding is faster than the dense FFNs; None if that was not measured.
        quant_method: always "tardis".

    Raises:
        CheckpointError: a field has a type or value that it cannot have, or the format is newer.
    """

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    calibration: dict[str, Any] = field(default_factory=dict)
    linears: dict[str, int] = field(default_factory=dict)
    crossover: int | None = None
    quant_method: str = METHOD

    def __post_init__(self) -> None:
        version, crossover = self.format_version, self.crossover
        if not _whole(version) or not 1 <= version <= FORMAT_VERSION:
            raise CheckpointError(
                f"this checkpoint has format version {reprlib.repr(version)}, and this TARDIS reads 1 to "
                f"{FORMAT_VERSION}. Update it (pip install -U tardis-llm), or fold the model again."
            )
        if not self.layers:
            raise CheckpointError("config.json names no folded layers; copy the checkpoint anew, or fold again.")
        for name in ("layers", "calibration", "linears"):
            _require(isinstance(getattr(self, name), dict), name, getattr(self, name), "an object")
        _require(crossover is None or (_whole(crossover) and crossover >= 0), "crossover", crossover, "a number from 0")
        _require(self.quant_method == METHOD, "quant_method", self.quant_method, repr(METHOD))
        for name, bits in self.linears.items():
            if not _whole(bits) or bits not in STACKED_BITS:
                raise CheckpointError(
                    f"config.json stores {reprlib.repr(name)[1:-1]} in {reprlib.repr(bits)} bits, and "
                    f"{_one_of(STACKED_BITS)} is wanted; {_UPDATE}."
                )
        self.formats()

    @classmethod
    def read(cls, values: object) -> CheckpointConfig:
        """From `quantization_config` of a config.

        Raises:
            CheckpointError: see above; also for fields that this version does not know.
        """
        if isinstance(values, cls):
            return values
        if not isinstance(values, dict):
            raise CheckpointError(f"quantization_config in config.json is {reprlib.repr(values)}; copy it anew.")
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise CheckpointError(
                f"quantization_config in config.json has the unknown field {unknown[0]!r}; {_UPDATE}."
            )
        return cls(**values)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As transformers calls it; see `read`."""
        config = cls.read(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def formats(self) -> dict[str, FoldFormat]:
        """The format of each folded FFN by its name."""
        return {name: read_format(name, values) for name, values in self.layers.items()}


def read_format(name: str, values: Mapping[str, Any]) -> FoldFormat:
    """The format of the FFN `name` from its fields in config.json.

    Raises:
        CheckpointError: a field is missing or unknown, or has a type or value that it cannot have.
    """
    _require(isinstance(values, dict), name, values, "an object")
    try:
        found = FoldFormat(**values)
    except TypeError as error:
        raise CheckpointError(
            f"config.json describes {name} in a way that this version does not know ({error}); {_UPDATE}."
        ) from error
    _check_format(name, found)
    return found


def _check_format(name: str, found: FoldFormat) -> None:
    """Raise CheckpointError for a field whose type or value is none that it can have."""
    choices: dict[str, tuple[object, ...]] = {
        "activation": tuple(ACTIVATIONS),
        "bits": PREDICTOR_BITS,
        "range_dtype": _RANGE_DTYPES,
        "fold_bits": (None, *STACKED_BITS),
        "fallback_bits": (None, *STACKED_BITS),
    }
    for key, allowed in choices.items():
        value = getattr(found, key)
        plain = value is None or isinstance(value, str) or _whole(value)
        _require(plain and value in allowed, f"{key} of {name}", value, _one_of(allowed))
    size, fallback = found.group_size, found.fallback_bits
    _require(_whole(size) and size > 0, f"group_size of {name}", size, "a positive number")
    wanted = "as many as bits or more, which they include,"
    _require(fallback is None or fallback >= found.bits, f"fallback_bits of {name}", fallback, wanted)


def stock_name(config: PreTrainedConfig) -> str:
    """The stock class that a config names under `architectures`; "" where it names none."""
    named = config.architectures
    first = named[0] if isinstance(named, list | tuple) and named else ""
    return first.removeprefix(PREFIX) if isinstance(first, str) else ""


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(choices: tuple[object, ...]) -> str:
    return f"one of {', '.join(map(str, choices))}"


def _require(valid: bool, what: str, found: object, wanted: str) -> None:
    if not valid:
        raise CheckpointError(
            f"{what} is {reprlib.repr(found)} in config.json, and {wanted} is wanted; copy config.json anew, or fold "
            "again."
        )
