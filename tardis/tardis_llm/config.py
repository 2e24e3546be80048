"""What the user asks for (`FoldConfig`): one frozen object, checked where it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from .errors import InvalidInputError

Policy = Literal["error", "coverage"]
Rounding = Literal["gptq", "nearest"]
#: of a stored part, as the command line has it
Precision = Literal["bf16", "int8", "int4"]

#: version of the checkpoint format that this package writes, and the newest that it reads
FORMAT_VERSION = 2
#: widths of a predictor's codes that the format stores
PREDICTOR_BITS = (1, 2, 3, 4, 8)
#: widths of what is stored in few bits: a fold, fallback weights, linear layers outside the FFNs
STACKED_BITS = (4, 8)


@dataclass(frozen=True)
class Storage:
    """How the parts of a folded FFN are stored.

    Attributes:
        group_size: input weights that share one scale, in every low-bit matrix.
        fold_bits: bits per weight of the fold; None for the model's dtype.
        fallback_bits: bits per weight of W1 and W2 as fixing reads them; None for the dense weights. Those of W1
            include the predictor's, which serve both.
    """

    group_size: int = 256
    fold_bits: int | None = None
    fallback_bits: int | None = None


@dataclass(frozen=True)
class FoldConfig:
    """The settings of a fold.

    Attributes:
        reduction: share of the FFN bytes that a token no longer reads, `1 - touched / dense`, everything counted.
        policy: how hot ranges are chosen: "error" by the output error a neuron would leave, "coverage" by the
            share of its inputs, as in the paper.
        predictor_bits: bits per weight of the predictor, one of `PREDICTOR_BITS`; None tries several and lets the
            budget choose for each layer.
        group_size: input weights that share one scale of the predictor, and of what else is stored in few bits.
        fold_bits: bits per weight of the fold, one of `STACKED_BITS`; None stores it in the model's dtype.
        fallback_bits: bits per weight of the weights that fixing reads, one of `STACKED_BITS`; None keeps them dense.
        linear_bits: bits per weight of the linear layers outside the FFNs, lm_head included, one of `STACKED_BITS`;
            None leaves them as they are.
        rounding: "gptq" spreads each rounding error over the weights not yet rounded; "nearest" does not.
        refit: solve the fold anew by ridge regression on what fixing leaves.
        damping: penalty of the refit, relative to the inputs' mean variance; None chooses it on held-out tokens.
        sequential: calibrate each layer behind the folded layers before it; otherwise behind dense ones, "one-shot".
        tokens: calibration tokens.
        sequence_length: tokens per calibration window; None takes what model and tokenizer allow, 1024 at most.
        heldout: share of the calibration windows kept apart, to choose damping and ranges' rates and to check.
        probe_tokens: calibration tokens on which the loss increase of single layers is measured.
        batch_tokens: tokens that run through a block at once; bounds the working memory.
        memory_limit_gib: hidden states beyond this are spilled to disk.
        layers: indices of the blocks to fold; None folds all.
        seed: picks the calibration windows.

    Examples:
        >>> FoldConfig(reduction=0.75).reduction
        0.75
        >>> FoldConfig(reduction=75)
        Traceback (most recent call last):
            ...
        tardis_llm.errors.InvalidInputError: reduction is 75; give a number between 0 and 1, such as 0.8.
    """

    reduction: float = 0.8
    policy: Policy = "error"
    predictor_bits: int | None = None
    group_size: int = 256
    fold_bits: int | None = None
    fallback_bits: int | None = None
    linear_bits: int | None = None
    rounding: Rounding = "gptq"
    refit: bool = True
    damping: float | None = None
    sequential: bool = True
    tokens: int = 65_536
    sequence_length: int | None = None
    heldout: float = 0.125
    probe_tokens: int = 8_192
    batch_tokens: int = 4_096
    memory_limit_gib: float = 1.0
    layers: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require(0 < self.reduction < 1, "reduction", self.reduction, "a number between 0 and 1, such as 0.8")
        for name, kind in (("policy", Policy), ("rounding", Rounding)):
            choices = get_args(kind)
            _require(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        allowed = (None, *PREDICTOR_BITS)
        _require(self.predictor_bits in allowed, "predictor_bits", self.predictor_bits, f"one of {allowed}")
        for name in ("fold_bits", "fallback_bits", "linear_bits"):
            _require(getattr(self, name) in (None, *STACKED_BITS), name, getattr(self, name), "4, 8 or None")
        if self.predictor_bits and self.fallback_bits:
            remedy = f"at most the {self.fallback_bits} bits of the fallback weights, which include it"
            _require(self.predictor_bits <= self.fallback_bits, "predictor_bits", self.predictor_bits, remedy)
        _require(self.group_size > 0, "group_size", self.group_size, "a positive number of weights, such as 256")
        _require(self.damping is None or self.damping >= 0, "damping", self.damping, "a number from 0, such as 0.01")
        _require(0 < self.heldout <= 0.5, "heldout", self.heldout, "a share between 0 and 0.5")
        limit = self.memory_limit_gib
        _require(limit >= 0, "memory_limit_gib", limit, "a number of GiB from 0")
        for name in ("tokens", "probe_tokens", "batch_tokens"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number of tokens")
        check_seed(self.seed)
        length = self.sequence_length
        _require(length is None or length >= 2, "sequence_length", length, "at least 2 tokens")

    @property
    def storage(self) -> Storage:
        """How the parts of each folded FFN are stored."""
        return Storage(self.group_size, self.fold_bits, self.fallback_bits)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for records and fingerprints."""
        return asdict(self)


def check_seed(seed: int) -> None:
    """Raise InvalidInputError where torch takes no such seed."""
    _require(-(2**63) <= seed < 2**64, "seed", seed, "a whole number of at most 64 bits, such as 0")


def _require(valid: bool, name: str, value: object, remedy: str) -> None:
    if not valid:
        raise InvalidInputError(f"{name} is {value!r}; give {remedy}.")
