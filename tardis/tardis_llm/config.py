"""What the user asks for (`FoldConfig`): one frozen object, checked where it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch

from .devices import device_named
from .errors import InvalidInputError
from .ffn.weights import Storage

Policy = Literal["error", "coverage"]
Rounding = Literal["gptq", "nearest"]
Target = Literal["stream", "dense", "own"]
Split = Literal["loss", "uniform"]
Select = Literal["dynamic", "static", "mixed"]
Head = Literal["predicted", "whole"]

#: version of the checkpoint format that this package writes, and the newest that it reads
FORMAT_VERSION = 7
#: bits per weight that a predictor may have
PREDICTOR_BITS = (1, 2, 3, 4, 8)
#: bits per weight that anything else may have: a fold, fallback weights, linear layers outside the FFNs
STACKED_BITS = (4, 8)

#: settings that say how a fold is computed and not what is: an interrupted one may go on with others
HOW = frozenset({"batch_tokens", "memory_limit_gib", "device"})

_PYTHON_ONLY = {"option": False}  # marks the settings that are no option of `tardis fold`


@dataclass(frozen=True)
class FoldConfig:
    """The settings of a fold. `tardis fold` takes its options, their defaults and their help from here.

    Attributes:
        reduction: share of the FFN bytes that a token no longer reads, between 0 and 1.
        select: which neurons are computed exactly: "dynamic" for those that are predicted, for each token, to be out of
            their hot range, "static" for the same ones for every token, those that a linear map says least of, "mixed"
            for both: those that would be fixed often, and of the others those that are predicted. The last two need
            `fallback_bits`. At the same bytes a static fold is the fastest, and much less accurate on text that is
            unlike the calibration text. Default: mixed with `fallback_bits` where FFNs have a gate, as was better on
            the two such models measured, else dynamic.
        keep_above: with select mixed, the share of the tokens beyond which a neuron that is fixed in them is kept.
        policy: how each neuron's hot range is chosen: "error" by the output error that it would leave, "coverage" by
            the share of the neuron's inputs that it holds, as in the paper.
        split: how the bytes are split over the layers: "loss" by what folding each of them costs the model, which is
            measured first, "uniform" with the same fix rate for all, which saves the time of measuring; default: by
            loss, but uniform where FFNs have a gate, as was better on the one such model measured.
        predictor_bits: bits per weight of the predictor: 1, 2, 3, 4 or 8; default: the best for each layer, or 2 where
            the split is uniform.
        group_size: weights that share one scale, in the predictor and in all else that is stored in few bits.
        fold_bits: precision of the stored fold, which may have 4 or 8 bits per weight; default: the model's dtype.
        fallback_bits: precision of the W1 and W2 that fixing reads, which may have 4 or 8 bits per weight; default: the
            dense weights as they are.
        remainder_bits: bits per weight of the W1 that fixing reads beside the predictor's; default: what these leave of
            the fallback weights' bits, and of 4 bits one more where the predictor has 2 or 3.
        linear_bits: precision of the linear layers outside the FFNs and of lm_head, which may have 4 or 8 bits per
            weight; default: as they are.
        linear_group_size: inputs of these layers whose weights share one scale.
        head: how lm_head is stored in few bits, with `linear_bits`: "predicted" for a predictor of half of these bits,
            by which a token finds its greatest logits, about one of 50, and what that leaves of the weight in 4 bits,
            with which these are computed; "whole" as all other linear layers. Of a predicted head half as many bytes
            are read. Rounded to the nearest, it is always whole.
        rounding: how weights are rounded to few bits: "gptq" lets the weights not yet rounded make up for each error,
            "nearest" rounds every weight by itself.
        refit: solve the fold anew, by ridge regression on the outputs that fixing leaves to it.
        damping: ridge penalty of the refit, relative to the inputs' mean variance; default: chosen on held-out tokens.
        sequential: calibrate each layer behind the folded layers before it; otherwise behind dense ones.
        target: outputs that a folded FFN is fitted to: "stream" for those with which the residual stream behind its
            block is the dense model's, "dense" for those of the FFN in the dense model, whose inputs no fold has
            changed, "own" for those of the dense FFN at the inputs that it gets. Where a block does more than add its
            FFN's output to the stream, as BERT's, which ends in a norm, "stream" is "dense".
        weigh: let a token's errors count over the mean square of the residual stream, by which norms divide them;
            otherwise all tokens count alike.
        tokens: calibration tokens.
        sequence_length: tokens per calibration window; default: the most that model and tokenizer allow, up to 1024.
        heldout: share of the calibration windows that is kept apart, to choose damping and ranges and for checks.
        probe_tokens: calibration tokens on which each layer's effect on the loss is measured.
        batch_tokens: tokens that run through a block at once; bounds the working memory.
        memory_limit_gib: GiB of hidden states that stay in memory; more goes to disk.
        device: what folding computes on: cpu, cuda, cuda:1 and so on, or auto for the GPU that torch finds and the CPU
            without one. The model stays where it is, and its blocks go there one at a time.
        layers: numbers of the blocks to fold, such as 0,1,5; default: all.
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
    select: Select | None = None
    keep_above: float = 0.25
    policy: Policy = "error"
    split: Split | None = None
    predictor_bits: int | None = None
    group_size: int = 256
    fold_bits: int | None = None
    fallback_bits: int | None = None
    remainder_bits: int | None = None
    linear_bits: int | None = None
    linear_group_size: int = 64
    head: Head = "predicted"
    rounding: Rounding = "gptq"
    refit: bool = True
    damping: float | None = field(default=None, metadata=_PYTHON_ONLY)
    sequential: bool = field(default=True, metadata=_PYTHON_ONLY)
    target: Target = field(default="stream", metadata=_PYTHON_ONLY)
    weigh: bool = field(default=True, metadata=_PYTHON_ONLY)
    tokens: int = 65_536
    sequence_length: int | None = None
    heldout: float = field(default=0.125, metadata=_PYTHON_ONLY)
    probe_tokens: int = 8_192
    batch_tokens: int = 4_096
    memory_limit_gib: float = 1.0
    device: str = "cpu"
    layers: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        allowed, bits, length = (None, *PREDICTOR_BITS), self.predictor_bits, self.sequence_length
        most = self.fallback_bits or max(PREDICTOR_BITS)
        self._require("reduction", 0 < self.reduction < 1, "a number between 0 and 1, such as 0.8")
        for name, kind in (("split", Split), ("select", Select)):
            valid = getattr(self, name) in (None, *get_args(kind))
            self._require(name, valid, f"one of {', '.join(get_args(kind))} or None")
        for name, kind in (("policy", Policy), ("rounding", Rounding), ("target", Target), ("head", Head)):
            self._require(name, getattr(self, name) in get_args(kind), f"one of {', '.join(get_args(kind))}")
        self._require("predictor_bits", bits in allowed, f"one of {allowed}")
        for name in ("fold_bits", "fallback_bits", "linear_bits"):
            self._require(name, getattr(self, name) in (None, *STACKED_BITS), "4, 8 or None")
        left = self.remainder_bits
        fits = left is None or (self.fallback_bits is not None and 0 <= left <= max(PREDICTOR_BITS))
        self._require("remainder_bits", fits, "0 to 8 bits, and only with fallback_bits")
        remedy = f"at most the {most} bits of the fallback weights, which include it"
        self._require("predictor_bits", bits is None or bits <= most, remedy)
        self._check_kept()
        self._require("keep_above", 0 <= self.keep_above <= 1, "a share of the tokens from 0 to 1")
        for name in ("group_size", "linear_group_size"):
            self._require(name, getattr(self, name) > 0, "a positive number of weights, such as 64")
        self._require("damping", self.damping is None or self.damping >= 0, "a number from 0, such as 0.01")
        self._require("heldout", 0 < self.heldout <= 0.5, "a share between 0 and 0.5")
        self._require("memory_limit_gib", self.memory_limit_gib >= 0, "a number of GiB from 0")
        for name in ("tokens", "probe_tokens", "batch_tokens"):
            self._require(name, getattr(self, name) > 0, "a positive number of tokens")
        check_seed(self.seed)
        device_named(self.device)
        self._require("sequence_length", length is None or length >= 2, "at least 2 tokens")

    def _check_kept(self) -> None:
        """Refuse settings that a fold that keeps neurons does not have."""
        if self.select in (None, "dynamic"):
            return
        why = f"with select {self.select}, which"
        self._require("fallback_bits", self.fallback_bits is not None, f"4 or 8 {why} keeps neurons in few bits")
        self._require("refit", self.refit, f"True {why} has no other fold")
        if self.select == "mixed":
            return
        self._require("split", self.split in (None, "uniform"), f"uniform {why} keeps the same share in every layer")
        self._require("predictor_bits", self.predictor_bits is None, f"None {why} predicts nothing")
        self._require("remainder_bits", self.remainder_bits is None, f"None {why} predicts nothing")

    def _require(self, name: str, valid: bool, remedy: str) -> None:
        if not valid:
            raise InvalidInputError(f"{name} is {getattr(self, name)!r}; give {remedy}.")

    @property
    def torch_device(self) -> torch.device:
        """What folding computes on."""
        return device_named(self.device)

    @property
    def storage(self) -> Storage:
        """How the parts of each folded FFN are stored."""
        return Storage(self.group_size, self.fold_bits, self.fallback_bits, self.remainder_bits)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for records."""
        return asdict(self)


def check_seed(seed: int) -> None:
    """Raise InvalidInputError for a seed that torch does not take."""
    if not -(2**63) <= seed < 2**64:
        raise InvalidInputError(f"seed is {seed!r}; give a whole number of at most 64 bits, such as 0.")
