"""The recipe: everything that decides which model comes out, apart from the text."""

from dataclasses import asdict, dataclass
from enum import StrEnum


class RecipeError(ValueError):
    """The user asked for something that cannot be; the message says what to ask instead."""


class Activation(StrEnum):
    """The FFN's activation, and with it the architecture."""

    GELU = "gelu"  # GPT-2
    RELU = "relu"  # GPT-2 in all but the activation
    SWIGLU = "swiglu"  # Llama


class Schedule(StrEnum):
    """How the learning rate goes down after the warm-up."""

    COSINE = "cosine"  # at once, along half a cosine
    TRAPEZOID = "trapezoid"  # flat, then along a line over the last fifth


@dataclass(frozen=True)
class Recipe:
    """Size, optimisation and seed of one training run; checked when made.

    One learning rate serves both optimisers, because Muon's updates are scaled to the size of AdamW's.
    """

    activation: Activation = Activation.GELU
    layers: int = 6
    width: int = 256
    ffn_width: int | None = None  # 4 * width, or 8/3 * width where a gate adds a third matrix
    heads: int = 4
    vocab: int = 8192
    context: int = 256
    batch: int = 32
    steps: int = 1000
    warmup: float = 0.05  # share of the steps
    schedule: Schedule = Schedule.TRAPEZOID
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "batch", "steps", "learning_rate", "clip"):
            _require(getattr(self, name) > 0, f"{name} must be positive")
        _require(self.width % (2 * self.heads) == 0, f"width {self.width} must be a multiple of 2 x heads")
        _require(self.ffn_width is None or self.ffn_width > 0, "ffn-width must be positive")
        _require(self.vocab > 256, f"vocab {self.vocab} must exceed 256: every byte is a token, and the end")
        _require(self.context >= 2, "context must be at least 2 tokens: the first is never predicted")
        _require(0 <= self.warmup < 1, f"warmup {self.warmup} is a share of the steps, at least 0 and below 1")

    @property
    def hidden(self) -> int:
        """Neurons of each FFN."""
        if self.ffn_width is not None:
            return self.ffn_width
        if self.activation is Activation.SWIGLU:
            return -(-8 * self.width // 3 // 32) * 32  # up to a multiple of 32, for the sake of kernels
        return 4 * self.width

    def changes(self, other: dict[str, object]) -> list[str]:
        """The options in which a recipe read from disk differs from this one, for an error message."""
        mine = asdict(self)
        return [f"{name} was {other.get(name)}, is {mine[name]}" for name in mine if other.get(name) != mine[name]]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)
