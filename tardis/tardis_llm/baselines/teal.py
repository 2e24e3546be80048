"""TEAL (Liu et al. 2024, arXiv 2408.14690): inputs of small magnitude are skipped, in every matrix of an FFN.

Section 4: an input of a matrix whose magnitude is below the matrix's threshold counts as zero, and the column that it
would be multiplied with is not read. Thresholds are quantiles of the magnitudes of calibration inputs. How many inputs
each matrix of a block skips is found by the paper's block-wise greedy search (its Algorithm 1): the sparsity of one
matrix after another is raised, each time of that which then leaves the least error, until the block skips as much as
asked for. The blocks all skip the same share. A gate and up that are apart have a threshold each, merged ones have one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.text import Windows, spread
from ..calibration.tokens import chunks
from ..families.sites import FFNSite
from ..report import Progress, silent
from .ffns import hidden_of, matrices_of, output_of
from .matrices import Scope
from .report import BaselineReport
from .skipping import Magnitudes, Skip, skip_inputs, skip_layerwise

NAME = "teal"
_STEP = 0.02  # of an FFN's weights, by which the greedy search raises the sparsity
_TOKENS = 512  # that the search measures errors on


def greedy_sparsities(
    error: Callable[[list[float]], float], sizes: Sequence[int], target: float, step: float = _STEP
) -> list[float]:
    """Sparsities of some matrices that together skip a share of their weights: Algorithm 1 of the paper.

    Args:
        error: what sparsities, one per matrix, cost.
        sizes: weights of each matrix.
        target: share of all the weights to skip, between 0 and 1.
        step: share of all the weights by which a step raises it.
    """
    sparsities, total, left = [0.0] * len(sizes), sum(sizes), target
    while left > 1e-9:
        raised = []
        for index, size in enumerate(sizes):
            more = min(min(step, left) * total / size, 1 - sparsities[index])
            if more > 1e-9:
                raised.append([*sparsities[:index], sparsities[index] + more, *sparsities[index + 1 :]])
        sparsities = min(raised, key=error)
        left = target - sum(share * size for share, size in zip(sparsities, sizes, strict=True)) / total
    return sparsities


@torch.no_grad()
def apply_teal(
    model: PreTrainedModel, windows: Windows, sparsity: float, scope: Scope = "ffn", progress: Progress = silent
) -> BaselineReport:
    """Let the FFNs of a model skip inputs, each behind those before it that skip already.

    The report's bytes are those read on `windows.heldout`.

    Args:
        model: of a supported family, in eval mode.
        windows: calibration tokens.
        sparsity: share of the weights of each FFN to skip, between 0 and 1.
        scope: must be "ffn".
        progress: told of each block.

    Raises:
        UnsupportedModelError: the family is not supported.
        InvalidInputError: another scope, weights or inputs that are not finite, or a model in training mode.
    """
    return skip_layerwise(model, windows, NAME, sparsity, scope, progress, _install)


def _install(site: FFNSite, x: Tensor, sparsity: float) -> None:
    """Thresholds of the matrices of one FFN with inputs x."""
    matrices = matrices_of(site)
    inputs, hidden = Magnitudes(), Magnitudes()
    inputs.add(x)
    for chunk in chunks(x, site.intermediate_size):
        hidden.add(hidden_of(site, chunk))
    seen = [*[inputs] * (len(matrices) - 1), hidden]
    some = x[spread(len(x), _TOKENS)]
    wanted = output_of(site, some).float()
    skips = [Skip(0.0, {matrix.name: matrix.weight.nbytes}) for matrix in matrices]
    for matrix, skip in zip(matrices, skips, strict=True):
        skip_inputs(matrix.module, skip)

    def put(sparsities: list[float]) -> None:
        for skip, magnitudes, share in zip(skips, seen, sparsities, strict=True):
            skip.threshold = magnitudes.threshold(share)

    def error(sparsities: list[float]) -> float:
        put(sparsities)
        return float((output_of(site, some).float() - wanted).norm(dim=1).mean())

    put(greedy_sparsities(error, [matrix.weight.numel() for matrix in matrices], sparsity))
