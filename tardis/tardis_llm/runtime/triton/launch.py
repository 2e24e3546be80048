"""What is launched for a product or a folded FFN: kernels with grids, arguments and constants.

Shapes alone decide it: `few_tokens` gives the same launches for every input of a shape, so that they can be captured
once in a CUDA graph, and compiled ahead of time for processors that are not there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...ffn.activations import kind, parameters
from ...ffn.neuron import Neurons
from . import kernels
from .codes import LINE, WORD, Codes

#: tokens that are computed at once
MAX_TOKENS = 64
#: neurons that a program gathers
_GATHERED = 1024
#: programs that share the neurons that were found; enough for the largest GPU, several a multiprocessor
_PROGRAMS = 1024
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

GPUMatrix = Tensor | Codes


@dataclass(frozen=True)
class Launch:
    """A kernel that is ready to run.

    Attributes:
        kernel: of `kernels`.
        grid: programs along each axis.
        arguments: tensors, numbers, and None of what is not there, by name.
        constants: known when it is compiled.
        warps: of a program.
        stages: of what is loaded ahead into shared memory, where tensor cores multiply.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 1

    def run(self) -> None:
        """Launch it on the current stream."""
        if all(self.grid):
            self.kernel[self.grid](
                **self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages, **OPTIONS
            )


#: sums of products are fused, which is no longer the default of every version of Triton
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Tile:
    """How a product is cut into programs.

    Attributes:
        tokens: T, of a program; those of a batch and more.
        rows: R, of a program.
        step: columns that are read at once of a dense matrix, words of one in few bits.
        warps: of a program.
    """

    tokens: int
    rows: int
    step: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        """As kernels name them."""
        return {"T": self.tokens, "R": self.rows, "STEP": self.step}


def padded(tokens: int) -> int:
    """T for so many tokens: 1, or what tensor cores multiply at once."""
    return 1 if tokens == 1 else min(MAX_TOKENS, max(16, 1 << (tokens - 1).bit_length()))


def streamed(matrix: GPUMatrix, tokens: int) -> Tile:
    """The tile of products that read a whole matrix: rows enough to share the inputs, programs enough to fill a GPU."""
    many = padded(tokens)
    if isinstance(matrix, Tensor):
        return Tile(many, 4, 512, 4) if many == 1 else Tile(many, 16, 128, 4)
    return Tile(many, 16, 64, 4) if many == 1 else Tile(many, 32, 32, 4 if many <= 16 else 8)


def scattered(matrix: GPUMatrix | None, tokens: int) -> Tile:
    """The tile of products with rows here and there, a few for each program."""
    many = padded(tokens)
    if isinstance(matrix, Codes):
        return Tile(many, 4, 32, 2) if many == 1 else Tile(many, 16, 16, 4)
    return Tile(many, 1, 1024, 4) if many == 1 else Tile(many, 16, 128, 4)


def format_of(matrix: GPUMatrix | None) -> tuple[int, int, float, int]:
    """What kernels know of a matrix: see `kernels`."""
    if isinstance(matrix, Codes):
        return matrix.bits, min(matrix.group_size, matrix.columns), matrix.middle, matrix.data.shape[1]
    return 0, 0, 0.0, 0


def _matrix(matrix: GPUMatrix | None) -> dict[str, Tensor | None]:
    """Data and scales, as kernels get them."""
    if isinstance(matrix, Codes):
        return {"data": matrix.data, "scale": matrix.scale}
    return {"data": matrix, "scale": None}


def columns_of(matrix: GPUMatrix) -> int:
    """Columns of a matrix."""
    return matrix.columns if isinstance(matrix, Codes) else matrix.shape[1]


def rows_of(matrix: GPUMatrix) -> int:
    """Rows of a matrix."""
    return len(matrix.data) if isinstance(matrix, Codes) else len(matrix)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def multiply(
    x: Tensor, matrix: GPUMatrix | None, bias: Tensor | None, y: Tensor, parts: Tensor | None = None
) -> Launch:
    """y [tokens, out] = x W^T + bias + parts summed over their first dimension; x [tokens, in], any of them missing."""
    tokens, rows = y.shape
    tile = Tile(padded(tokens), 16 if tokens > 1 else 64, 64, 4) if matrix is None else streamed(matrix, tokens)
    return Launch(
        kernels.multiply,
        (_blocks(rows, tile.rows), _blocks(tokens, tile.tokens)),
        {"x": x, **_matrix(matrix), "bias": bias, "parts": parts, "y": y, "tokens": tokens, "rows": rows},
        {
            **tile.constants,
            "FORMAT": format_of(matrix),
            "COLUMNS": x.shape[1],
            "PARTS": 0 if parts is None else len(parts),
        },
        tile.warps,
    )


def write_out(matrix: Codes, numbers: Tensor) -> Launch:
    """numbers [rows, columns] of a matrix in few bits."""
    rows, columns = numbers.shape
    return Launch(
        kernels.write_out,
        (_blocks(rows, 8), _blocks(columns, 512)),
        {**_matrix(matrix), "numbers": numbers, "rows": rows},
        {"FORMAT": format_of(matrix), "COLUMNS": columns, "R": 8, "STEP": 512},
    )


@dataclass(frozen=True)
class Fixing:
    """What finds and fixes neurons.

    Attributes:
        predictor: [k h, d].
        up: [k h, d] W1; beside a predictor that is part of it, what that leaves; None where that is nothing.
        down: [h, d] W2 transposed; None where nothing is fixed.
        b1: [k h], or None.
        neurons: lines and hot ranges.
        stacked: whether the predictor is part of W1.
    """

    predictor: Codes
    up: GPUMatrix | None
    down: GPUMatrix
    b1: Tensor | None
    neurons: Neurons
    stacked: bool

    @functools.cached_property
    def _neurons(self) -> dict[str, Any]:
        """Arguments that say what the neurons are."""
        own = [*parameters(self.neurons.activation), 0.0, 0.0, 0.0, 0.0][:4]
        return {"slope": self.neurons.slope, "offset": self.neurons.offset, "count": self.neurons.count} | {
            f"p{number}": value for number, value in enumerate(own)
        }

    @functools.cached_property
    def _kinds(self) -> dict[str, Any]:
        return {"KIND": kind(self.neurons.activation), "K": self.neurons.k, "COLUMNS": self.predictor.columns}

    def predict(self, x: Tensor, fixed: Tensor, some: Tensor | None, predicted: Tensor | None) -> Launch:
        """fixed [tokens, h] int8, some [h] int8 and predicted [tokens, k h] fp32 of inputs x [tokens, d]."""
        tile = streamed(self.predictor, len(x))
        ranges = {"low": self.neurons.low, "high": self.neurons.high}
        return Launch(
            kernels.predict,
            (_blocks(self.neurons.count, tile.rows), _blocks(len(x), tile.tokens)),
            {"x": x, **_matrix(self.predictor), "bias": self.b1, **ranges, **self._neurons, "fixed": fixed}
            | {"some": some, "predicted": predicted, "tokens": len(x)},
            {**tile.constants, **self._kinds, "FORMAT": format_of(self.predictor)},
            tile.warps,
        )

    def gather(self, some: Tensor, neurons: Tensor, found: Tensor) -> Launch:
        """neurons [h] int32 that some token fixes, and found [1] int32, how many."""
        arguments: dict[str, Any] = {"some": some, "neurons": neurons, "found": found, "count": len(some)}
        return Launch(kernels.gather, (_blocks(len(some), _GATHERED),), arguments, {"SIZE": _GATHERED})

    def residuals(
        self, x: Tensor, fixed: Tensor, predicted: Tensor | None, neurons: Tensor, found: Tensor, left: Tensor
    ) -> Launch:
        """left [tokens, h] fp32 of the neurons that were found, one after the other."""
        tile = scattered(self.up, len(x))
        arrays = {"fixed": fixed, "predicted": predicted, "neurons": neurons, "found": found, "left": left}
        return Launch(
            kernels.residuals,
            (min(_PROGRAMS, _blocks(self.neurons.count, tile.rows)),),
            {"x": x, **_matrix(self.up), "bias": self.b1, **self._neurons, **arrays, "tokens": len(x)},
            {**tile.constants, **self._kinds, "FORMAT": format_of(self.up)},
            tile.warps,
        )

    def correct(self, x: Tensor, left: Tensor, neurons: Tensor, found: Tensor, parts: Tensor) -> Launch:
        """parts [parts, tokens, d] fp32 of what fixing adds."""
        down, tokens = self.down, padded(len(x))
        step = LINE * WORD // down.bits if isinstance(down, Codes) else 256 if tokens == 1 else 64
        arrays = {"left": left, "neurons": neurons, "found": found, "parts": parts}
        return Launch(
            kernels.correct,
            (_blocks(columns_of(down), step), len(parts)),
            {**_matrix(down), **arrays, "tokens": len(x), "count": self.neurons.count},
            {"FORMAT": format_of(down), "COLUMNS": columns_of(down), "T": tokens, "STEP": step}
            | {"R": 4 if tokens == 1 else 16, "DTYPE": _DTYPES[x.dtype]},
        )

    def parts(self, tokens: int) -> int:
        """Parts in which corrections are added up: many for one token, whose parts are small."""
        return 32 if tokens == 1 else 8 if tokens <= 16 else 4

    def launches(self, x: Tensor) -> tuple[list[Launch], Tensor]:
        """The launches that fix neurons for a few inputs x [tokens, d], and the parts [parts, tokens, d] to add up."""
        tokens, h = len(x), self.neurons.count

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        fixed, some = empty(tokens, h, dtype=torch.int8), empty(h, dtype=torch.int8)
        predicted = empty(tokens, self.neurons.k * h) if self.stacked else None
        neurons, found = empty(h, dtype=torch.int32), empty(1, dtype=torch.int32)
        left, parts = empty(tokens, h), empty(self.parts(tokens), tokens, columns_of(self.down))
        return [
            self.predict(x, fixed, some, predicted),
            self.gather(some, neurons, found),
            self.residuals(x, fixed, predicted, neurons, found, left),
            self.correct(x, left, neurons, found, parts),
        ], parts
