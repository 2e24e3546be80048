"""What the methods know of the inputs of a matrix, streamed through the model block by block."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.inputs import TextOrSpeech
from ..calibration.moments import SecondMoments
from ..calibration.stream import Stream
from ..calibration.tokens import Tokens
from ..errors import InvalidInputError
from .matrices import ModelMatrix

_BATCH_TOKENS = 4_096  # that run through a block at once
_MEMORY_LIMIT = 2**30  # bytes of hidden states, beyond which they are on disk


class Need(Enum):
    """What a method has to know of the inputs of a matrix."""

    NOTHING = 0
    NORMS = 1
    GRAM = 2


@dataclass
class InputStatistics:
    """Streamed statistics of the inputs X [tokens, in] of one matrix.

    Attributes:
        squares: [in] fp64, sum of squares of each input.
        moments: X beside itself; None if only norms are needed.
        count: tokens seen.
    """

    squares: Tensor
    moments: SecondMoments | None
    count: int = 0

    @classmethod
    def zeros(cls, width: int, need: Need, device: torch.device | None = None) -> InputStatistics:
        """Nothing seen yet, `width` inputs; on a device, default: the CPU."""
        moments = SecondMoments.zeros(width, width, device) if need is Need.GRAM else None
        return cls(torch.zeros(width, dtype=torch.float64, device=device), moments)

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add inputs x [tokens, in] of any float dtype, which count in `moments` by a weight [tokens], or alike."""
        for some in Tokens(x, None, weight, self.squares.device).chunks(x.shape[1]):
            chunk = some.x.float()
            self.count += len(chunk)
            self.squares += chunk.square().sum(0, dtype=torch.float64)
            if self.moments is not None:
                self.moments.add(chunk, chunk, some.weight)

    @property
    def norms(self) -> Tensor:
        """[in] fp32 `|X_j|`."""
        return self.squares.sqrt().float()

    @property
    def hessian(self) -> Tensor:
        """[in, in] fp64 `(2 / N) X^T X`."""
        assert self.moments is not None, "the method that asks for it says that it needs the Gram matrix"
        return self.moments.cross * (2 / self.moments.count)


def stream_of(
    model: PreTrainedModel, windows: TextOrSpeech, scratch: str, first: Mapping[int, float] | None = None
) -> Stream:
    """Windows at the start of the model; `scratch` is a folder, and `first` as `Stream` has it."""
    return Stream(model, windows, Path(scratch), _MEMORY_LIMIT, _BATCH_TOKENS, first or {})


def statistics_by_block(
    model: PreTrainedModel, windows: TextOrSpeech, blocks: Sequence[Sequence[ModelMatrix]], need: Need
) -> Iterator[Sequence[InputStatistics | None]]:
    """Per block, statistics of the inputs of its matrices, from one pass of the block over all the windows.

    What the caller does to a block before asking for the next is in what the blocks after it get.

    Args:
        model: in eval mode.
        windows: token ids [windows, length], or speech.
        blocks: the matrices of every block.
        need: what to gather; without any need nothing runs.

    Raises:
        InvalidInputError: inputs are not finite, or a matrix got none.
    """
    if need is Need.NOTHING:
        for block in blocks:
            yield [None] * len(block)
        return
    with tempfile.TemporaryDirectory() as scratch:
        stream = stream_of(model, windows, scratch)
        for index, block in enumerate(blocks):
            with ExitStack() as hooks:
                gathered = [_gather(matrix, need, hooks) for matrix in block]
                stream.visit()
            for matrix, seen in zip(block, gathered, strict=True):
                if not seen.count:
                    raise InvalidInputError(
                        f"{matrix.name} got no input when its block ran; compress with scope='ffn', which leaves it "
                        "out."
                    )
            yield gathered
            if index + 1 < len(blocks):
                stream.advance()


def _gather(matrix: ModelMatrix, need: Need, hooks: ExitStack) -> InputStatistics:
    """Statistics of what a matrix gets, as long as the hooks are there."""
    statistics = InputStatistics.zeros(matrix.weight.shape[1], need, matrix.weight.device)

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        statistics.add(finite_rows(args[0], matrix.name))

    hooks.callback(matrix.module.register_forward_pre_hook(enter).remove)
    return statistics


def finite_rows(x: Tensor, name: str) -> Tensor:
    """Inputs x [..., in] of the module `name` as [tokens, in].

    Raises:
        InvalidInputError: they are not finite.
    """
    if not bool(torch.isfinite(x).all()):
        raise InvalidInputError(
            f"the inputs of {name} are NaN or infinite on the calibration text. Check the weights of the blocks up to "
            "it, and load the model in bfloat16 or float32 if it overflows float16."
        )
    return x.reshape(-1, x.shape[-1])
