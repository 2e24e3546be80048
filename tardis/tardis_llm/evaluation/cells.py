"""What one method of a comparison came to, with everything that is needed to set it beside another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .methods import Method
from .perplexity import Perplexity
from .tasks import Metric, TaskScore


@dataclass(frozen=True)
class Cell:
    """What one method came to.

    Attributes:
        method: name and reduction.
        infeasible: why the method does not reach the reduction; everything below is empty then.
        dense: bytes of the dense weights in scope.
        touched: bytes of the weights in scope that a token reads, on the evaluation text.
        resident: bytes of the weights in scope that are kept in memory.
        fix_rate: share of neurons fixed per token on the evaluation text; None for what does not fold.
        seconds: seconds taken to compress.
        perplexity: perplexity on the evaluation text.
        scores: scores of the tasks.
    """

    method: Method
    infeasible: str | None = None
    dense: int = 0
    touched: float = 0.0
    resident: int = 0
    fix_rate: float | None = None
    seconds: float = 0.0
    perplexity: Perplexity | None = None
    scores: tuple[TaskScore, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with those of single windows and items, by which cells are paired."""
        values = dict(vars(self))
        if self.perplexity:
            values["perplexity"] = {"losses": self.perplexity.losses.tolist(), "length": self.perplexity.length}
        values["scores"] = [{**score.as_dict(), "correct": list(score.correct)} for score in self.scores]
        return {**values, "method": asdict(self.method)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        """The inverse of `as_dict`."""
        found = dict(values)
        found["method"] = Method(**values["method"])
        if values["perplexity"]:
            losses = torch.tensor(values["perplexity"]["losses"], dtype=torch.float64)
            found["perplexity"] = Perplexity.of(losses, values["perplexity"]["length"])
        found["scores"] = tuple(_score(score) for score in values["scores"])
        return cls(**found)


def _score(values: dict[str, Any]) -> TaskScore:
    also = {name: Metric(**metric) for name, metric in values["also"].items()}
    return TaskScore(**{**values, "also": also, "correct": tuple(values["correct"])})
