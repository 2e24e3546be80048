"""`quantization_config` in the config.json of a folded checkpoint: read, and checked as input from strangers."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import FORMAT_VERSION, PREDICTOR_BITS, STACKED_BITS
from ..errors import CheckpointError, UnsupportedModelError
from ..ffn.activations import KINDS, activation
from ..ffn.weights import FoldFormat

METHOD = "tardis"
#: prefix of the class name under `architectures`
PREFIX = "Tardis"
_RANGE_DTYPES = ("float16", "float32")
#: up to this format version, linear layers in few bits had formats of their own
OLD_LINEARS = 3
_UPDATE = "update TARDIS (pip install -U tardis-llm), or fold again"


@dataclass(frozen=True)
class HeadFormat:
    """How a head with a predictor is stored, beside the inputs that share a scale, which are as in all linear layers.

    Attributes:
        name: of the head in the model.
        predictor_bits, remainder_bits: per weight.
        top: says which logits are computed with all bits: see `PredictedHead`.

    Raises:
        CheckpointError: a field has a value that it cannot have.
    """

    name: str
    predictor_bits: int
    remainder_bits: int
    top: int

    def __post_init__(self) -> None:
        _require(isinstance(self.name, str), "the head's name", self.name, "text")
        for key in ("predictor_bits", "remainder_bits"):
            bits = getattr(self, key)
            _require(_whole(bits) and bits in PREDICTOR_BITS, f"{key} of the head", bits, _one_of(PREDICTOR_BITS))
        fits = _whole(self.top) and 1 <= self.top < 2**31
        _require(fits, "top of the head", self.top, "a number from 1 to 2^31 - 1")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> HeadFormat:
        """The format from its fields in config.json; raises CheckpointError for others."""
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(
                f"config.json describes the head in a way that this version does not know ({error}); {_UPDATE}."
            ) from error


@dataclass
class CheckpointConfig(QuantizationConfigMixin):
    """What a folded checkpoint says of itself: `quantization_config` in its config.json.

    Attributes:
        layers: the fields of `FoldFormat` of each folded FFN, by the FFN's full name in the model.
        format_version: version of the checkpoint format.
        calibration: what the fold was calibrated on.
        linears: bits per weight of the linear layers outside the FFNs that are stored in few bits, by their full names.
        linear_group_size: inputs of these layers that share one scale; None up to format version 3, see `old_linears`.
        head: the fields of `HeadFormat`, if the head has a predictor.
        crossover: up to how many tokens at once folds are faster than dense FFNs; None if that was not measured.
        quant_method: always "tardis".

    Raises:
        CheckpointError: a field has a type or value that it cannot have, or the format is newer.
    """

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    calibration: dict[str, Any] = field(default_factory=dict)
    linears: dict[str, int] = field(default_factory=dict)
    linear_group_size: int | None = None
    head: dict[str, Any] | None = None
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
        size, sized = self.linear_group_size, bool(self.linears) and version > OLD_LINEARS
        fits = size is not None and _whole(size) and size > 0 if sized else size is None
        _require(fits, "linear_group_size", size, "a positive number" if sized else "null")
        _require(self.head is None or (sized and isinstance(self.head, dict)), "head", self.head, "an object or null")
        self.head_format()
        self.formats()

    @classmethod
    def read(cls, values: object) -> CheckpointConfig:
        """Read `quantization_config`, as it is in a loaded config or in config.json.

        Raises:
            CheckpointError: a field is unknown, or has a type or value that it cannot have.
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
        """What transformers calls to read `quantization_config`; raises CheckpointError as `read` does."""
        config = cls.read(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def head_format(self) -> HeadFormat | None:
        """How the head is stored, if it has a predictor.

        Raises:
            CheckpointError: a field is missing or unknown, or has a value that it cannot have.
        """
        return None if self.head is None else HeadFormat.read(self.head)

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
    """Raise CheckpointError for a field with a type or value that it cannot have."""
    choices: dict[str, tuple[object, ...]] = {
        "bits": PREDICTOR_BITS,
        "range_dtype": _RANGE_DTYPES,
        "fold_bits": (None, *STACKED_BITS),
        "fallback_bits": (None, *STACKED_BITS),
        "remainder_bits": (None, *range(max(PREDICTOR_BITS) + 1)) if found.fallback_bits else (None,),
    }
    for key in ("gated", "down_zero", "mixed"):
        value = getattr(found, key)
        _require(isinstance(value, bool), f"{key} of {name}", value, "true or false")
    zero = found.down_zero
    _require(not zero or found.fallback_bits is not None, f"down_zero of {name}", zero, "false without fallback_bits")
    for key, allowed in choices.items():
        value = getattr(found, key)
        plain = value is None or isinstance(value, str) or _whole(value)
        _require(plain and value in allowed, f"{key} of {name}", value, _one_of(allowed))
    known = _one_of(KINDS) + ", with the parameters that it has,"
    _require(_is_activation(found.activation), f"activation of {name}", found.activation, known)
    plain = isinstance(found.kept_bias, bool) and (bool(found.kept) or not found.kept_bias)
    _require(plain, f"kept_bias of {name}", found.kept_bias, "true or false, and false where none is kept,")
    fits = _whole(found.kept) and found.kept >= (1 if found.mixed else 0)
    _require(fits, f"kept of {name}", found.kept, f"a number from {1 if found.mixed else 0}")
    bits = found.fallback_bits
    stored = not found.kept or (bits is not None if found.mixed else bits == found.bits)
    _require(stored, f"fallback_bits of {name}", bits, "4 or 8, and as bits in a static fold")
    size, fallback = found.group_size, found.fallback_bits
    _require(_whole(size) and size > 0, f"group_size of {name}", size, "a positive number")
    wanted = "a number of bits no smaller than the predictor's"
    _require(fallback is None or fallback >= found.bits, f"fallback_bits of {name}", fallback, wanted)


def stock_name(config: PreTrainedConfig) -> str:
    """The class that a config names under `architectures`, without the prefix "Tardis"; "" where it names none."""
    named = config.architectures
    first = named[0] if isinstance(named, list | tuple) and named else ""
    return first.removeprefix(PREFIX) if isinstance(first, str) else ""


def _is_activation(value: object) -> bool:
    try:
        return isinstance(value, str) and callable(activation(value))
    except UnsupportedModelError:
        return False


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(choices: tuple[object, ...]) -> str:
    return f"one of {', '.join(map(str, choices))}"


def _require(valid: bool, what: str, found: object, wanted: str) -> None:
    """Raise CheckpointError, naming what was found and what is wanted, unless a field is valid."""
    if not valid:
        raise CheckpointError(
            f"{what} is {reprlib.repr(found)} in config.json, and {wanted} is wanted; copy config.json anew, or fold "
            "again."
        )
