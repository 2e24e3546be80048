"""What a fold did: the figures of every layer and of the whole, as plain values for tables and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One folded FFN; bytes are those of its tensors as stored.

    Attributes:
        prefix: full name of the FFN in the model.
        bits: bits per weight of the predictor, or of the neurons that a static fold keeps.
        fix_rate: share of the neurons predicted that are fixed, per held-out calibration token; 0 of a static fold.
        error: squared error of the output over its variance, on held-out calibration tokens.
        linearity: such an error of the best affine map, with no neuron fixed.
        damping: damping of the refit; None without a refit.
        loss_increase: increase of the loss when this layer alone was folded, coarsely; None if not measured.
        dense: bytes of the dense FFN.
        touched: bytes that a token reads.
        resident: bytes kept in memory.
        kept: share of the neurons that every token computes; 0 of a dynamic fold.
    """

    prefix: str
    bits: int
    fix_rate: float
    error: float
    linearity: float
    damping: float | None
    loss_increase: float | None
    dense: int
    touched: float
    resident: int
    kept: float = 0.0


@dataclass(frozen=True)
class LinearsReport:
    """What a model stores in few bits outside its folded FFNs: linear layers, lm_head included.

    Attributes:
        bits: bits per weight.
        layers: number of layers.
        dense: bytes before.
        stored: bytes now, scales and biases included.
        shared: bytes of `dense` that stay in memory, as the embedding whose weight the head shared.
    """

    bits: int
    layers: int
    dense: int
    stored: int
    shared: int


class ByteTotals:
    """The bytes of compressed layers together; what is not compressed is left out.

    Attributes:
        layers: reports with the bytes of each layer.
    """

    layers: Sequence[Any]

    @property
    def dense(self) -> int:
        """Bytes of the dense layers."""
        return sum(layer.dense for layer in self.layers)

    @property
    def touched(self) -> float:
        """Bytes read for a token at batch 1, on average."""
        return sum(layer.touched for layer in self.layers)

    @property
    def resident(self) -> int:
        """Bytes kept in memory, fallback weights included."""
        return sum(layer.resident for layer in self.layers)

    @property
    def reduction(self) -> float:
        """`1 - touched / dense`, with everything counted: indices, scales and biases."""
        return 1 - self.touched / self.dense


@dataclass(frozen=True)
class FoldReport(ByteTotals):
    """A whole fold.

    Attributes:
        layers: the folded FFNs in the model's order.
        config: the settings, as `FoldConfig.as_dict` gives them.
        calibration: tokens, window length and fingerprints.
        linears: the linear layers outside the FFNs, where they are stored in few bits; no byte of theirs is in the
            figures of the layers.
        source: format, file and quantisation of the dense weights, where they were not read from a Hugging Face model.

    Examples:
        >>> from tardis_llm.checkpoint.loading import load_report
        >>> report = load_report("folded")
        >>> len(report.layers), 0 < report.fix_rate < 1, report.touched < report.dense < report.resident
        (2, True, True)
        >>> FoldReport.from_dict(report.as_dict()) == report
        True
    """

    layers: list[LayerReport]
    config: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    linears: LinearsReport | None = None
    source: dict[str, str] = field(default_factory=dict)

    @property
    def fix_rate(self) -> float:
        """Mean share of the neurons predicted that are fixed per token."""
        return sum(layer.fix_rate for layer in self.layers) / len(self.layers)

    @property
    def kept(self) -> float:
        """Mean share of the neurons that every token computes."""
        return sum(layer.kept for layer in self.layers) / len(self.layers)

    @property
    def exact(self) -> str:
        """What is computed exactly, in words."""
        if not self.kept:
            return f"neurons fixed {self.fix_rate:.2%}"
        if self.config.get("select") == "static":
            return f"neurons kept {self.kept:.2%}"
        return f"neurons kept {self.kept:.2%}, of the others fixed {self.fix_rate:.2%}"

    @property
    def worse_than_mean(self) -> list[LayerReport]:
        """The layers whose error is 1 or more, or NaN: the mean output in their place would be no worse."""
        return [layer for layer in self.layers if not layer.error < 1]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, totals included."""
        totals = {name: getattr(self, name) for name in ("dense", "touched", "resident", "fix_rate", "reduction")}
        return {**asdict(self), "totals": totals}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FoldReport:
        """The inverse of `as_dict`."""
        layers = [LayerReport(**layer) for layer in values["layers"]]
        linears = values.get("linears")
        stored = LinearsReport(**linears) if linears else None
        return cls(layers, values["config"], values["calibration"], stored, values.get("source", {}))


#: called with the stage, the steps done and the steps in all
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
