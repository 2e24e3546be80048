"""The self-check after a fold: does the folded model still do what the dense one did, on held-out calibration text?"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.inputs import TextOrSpeech, token_count
from ..calibration.residence import computing_on
from ..calibration.stream import Stream
from ..calibration.text import some_windows
from ..families.table import family_of
from ..report import Progress, silent

#: a fold is refused when perplexity grows by more than this factor ...
LARGEST_RATIO = 2.0
#: ... or, for an encoder, when its output changes by more than this share of its squared size
LARGEST_CHANGE = 0.5
_TOKENS, _ENCODER_TOKENS = 16_384, 2_048
_BATCH_TOKENS = 4_096
_LARGEST_LOSS = 700  # nats; beyond, the perplexity is no float

Result = TypeVar("Result")


@dataclass(frozen=True)
class Verdict:
    """What the self-check found.

    Attributes:
        measure: "perplexity", or "output change" for an encoder.
        dense: the measure before the fold; None for an encoder.
        folded: the measure after it.
        growth: what is compared with `limit`: the ratio of perplexities, or the change itself.
        limit: the largest growth that passes.
        tokens: held-out calibration tokens measured.
    """

    measure: str
    dense: float | None
    folded: float
    growth: float
    limit: float
    tokens: int

    @property
    def passed(self) -> bool:
        """Whether the growth is a number within the limit."""
        return math.isfinite(self.growth) and self.growth <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "passed": self.passed}

    def sentence(self) -> str:
        """For people."""
        if self.dense is None:
            return (
                f"squared output change {self.folded:.3g} of the output (limit {self.limit:g}), {self.tokens:,} tokens"
            )
        return (
            f"held-out perplexity {self.folded:.2f}, {self.growth:.3f}x the dense {self.dense:.2f} "
            f"(limit {self.limit:g}x), {self.tokens:,} tokens"
        )


class SelfCheck:
    """Measures the dense model when made, and the same model again, folded by then, when asked for the verdict.

    Args:
        model: dense.
        heldout: calibration windows kept apart; a part is taken if there are many.
        progress: told of each block.
        device: to compute on; default: where the model is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heldout: TextOrSpeech,
        progress: Progress = silent,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.progress, self.device = model, progress, device or model.device
        self.causal = family_of(model.config).causal
        self.windows: TextOrSpeech = some_windows(heldout, _TOKENS if self.causal else _ENCODER_TOKENS)
        if (
            isinstance(self.windows, Tensor) and len(self.windows) < 2
        ):  # one window is no sample, but its two halves are
            self.windows = self.windows[:, : self.windows.shape[1] // 2 * 2].reshape(2, -1)
        self.perplexity = self._perplexity() if self.causal else None
        self.reference = None if self.causal else self._measured(Stream.reference)

    def verdict(self) -> Verdict:
        """Compare the model as it is now with the dense one."""
        tokens = token_count(self.windows)
        if self.perplexity is not None:
            folded = self._perplexity()
            return Verdict("perplexity", self.perplexity, folded, folded / self.perplexity, LARGEST_RATIO, tokens)
        change = self._measured(lambda stream: stream.loss(self.reference))
        return Verdict("output change", None, change, change, LARGEST_CHANGE, tokens)

    def _perplexity(self) -> float:
        """Perplexity of the text in the windows; of speech, that of the dense model's transcripts."""
        loss = self._measured(lambda stream: stream.loss(progress=self.progress))
        return math.exp(loss) if loss < _LARGEST_LOSS else math.inf

    @torch.no_grad()
    def _measured(self, measure: Callable[[Stream], Result]) -> Result:
        """What `measure` makes of a stream of the windows at the start of the model."""
        with tempfile.TemporaryDirectory() as scratch, computing_on(self.model, self.device):
            return measure(Stream(self.model, self.windows, Path(scratch), math.inf, _BATCH_TOKENS))
