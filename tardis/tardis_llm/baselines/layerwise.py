"""Compress a model block by block, each block on what the compressed blocks before it give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.inputs import token_count
from ..calibration.text import Windows
from ..errors import InvalidInputError
from ..report import Progress, silent
from .inputs import InputStatistics, Need, statistics_by_block
from .matrices import ModelMatrix, Scope, find_matrices
from .owl import outlier_share
from .pruning import wanda_scores
from .report import BaselineReport, MatrixReport


@dataclass(frozen=True)
class MatrixMethod:
    """A way to compress one matrix at a time.

    Attributes:
        name: name in reports.
        need: what `apply` has to know of the inputs of the matrix.
        apply: makes the new weight of w [out, in] fp32, which it leaves as it is, and the statistics that it needs.
        stored_bytes: counts the bytes of a compressed matrix [out, in], without bias.
        asked: share of the weights to remove; None for a method of fixed size.
    """

    name: str
    need: Need
    apply: Callable[[Tensor, InputStatistics | None], Tensor]
    stored_bytes: Callable[[Tensor], int]
    asked: float | None = None


@torch.no_grad()
def compress_layerwise(
    model: PreTrainedModel,
    windows: Windows,
    method: MatrixMethod | Sequence[MatrixMethod],
    scope: Scope = "ffn",
    progress: Progress = silent,
) -> BaselineReport:
    """Compress the matrices of a model in place.

    The inputs of all the matrices of a block are gathered in one pass of the block, on `windows.fit`.

    Args:
        model: of a supported family, in eval mode.
        windows: calibration tokens.
        method: what to do with each matrix; or one per block, of the same need.
        scope: which matrices.
        progress: told of each block.

    Raises:
        UnsupportedModelError: the family is not supported.
        InvalidInputError: weights or inputs that are not finite, or a model in training mode.
    """
    blocks = find_matrices(model, scope)
    methods = [method] * len(blocks) if isinstance(method, MatrixMethod) else list(method)
    first, rows = methods[0], []
    gathered = statistics_by_block(model, windows.fit, blocks, first.need)
    for done, (block, how, seen) in enumerate(zip(blocks, methods, gathered, strict=True)):
        progress(f"compressing with {first.name}", done, len(blocks))
        rows += [compress_matrix(matrix, how, statistics) for matrix, statistics in zip(block, seen, strict=True)]
    progress(f"compressing with {first.name}", len(blocks), len(blocks))
    tokens = 0 if first.need is Need.NOTHING else token_count(windows.fit)
    return BaselineReport(first.name, scope, first.asked, tokens, rows)


@torch.no_grad()
def outlier_shares(
    model: PreTrainedModel, windows: Windows, scope: Scope = "ffn", progress: Progress = silent
) -> list[float]:
    """Per block of the model, which stays as it is, the share of outliers among its Wanda scores.

    Arguments and errors as for `compress_layerwise`.
    """
    blocks = find_matrices(model, scope)
    shares: list[float] = []
    for block, gathered in zip(blocks, statistics_by_block(model, windows.fit, blocks, Need.NORMS), strict=True):
        progress("measuring outliers", len(shares), len(blocks))
        pairs = zip(block, gathered, strict=True)
        shares.append(outlier_share([wanda_scores(m.weight.float(), s.norms) for m, s in pairs if s is not None]))
    progress("measuring outliers", len(blocks), len(blocks))
    return shares


def compress_matrix(
    matrix: ModelMatrix, method: MatrixMethod, statistics: InputStatistics | None, weight: Tensor | None = None
) -> MatrixReport:
    """Compress one matrix in place.

    Args:
        matrix: in the model.
        method: what to do with it.
        statistics: of its inputs, if the method needs them.
        weight: [out, in] fp32 to compress in place of what it holds.

    Raises:
        InvalidInputError: the method refuses the weight, or makes one that is not finite.
    """
    dense, bias = matrix.weight.nbytes, matrix.bias_bytes
    given = matrix.weight.float() if weight is None else weight
    try:
        matrix.write(method.apply(given.contiguous(), statistics))
    except InvalidInputError as error:
        raise InvalidInputError(f"{matrix.name} cannot be compressed: {error}") from error
    now = matrix.weight
    stored = method.stored_bytes(now) + bias
    return MatrixReport(matrix.name, now.numel(), int(now.count_nonzero()), dense + bias, stored, stored)
