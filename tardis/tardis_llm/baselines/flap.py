"""FLAP (An et al. 2023, arXiv 2312.11983): the neurons that fluctuate least are removed, their mean goes into a bias.

Section 3: the score of a neuron is the variance of its output over calibration tokens times the squared norm of its
column of down ("WIFV"). Scores are standardised layer by layer, and the neurons with the least are removed from the
whole model ("AL"), so layers lose different shares. What the removed neurons gave on average is added to the bias of
down, which a layer without one gets. Everything is measured on the dense model, as published.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.inputs import token_count
from ..calibration.text import Windows
from ..calibration.tokens import chunks
from ..families.linear import bias_of
from ..families.sites import FFNSite
from ..report import Progress, silent
from .ffns import checked_sites, down_weight, hidden_of, matrices_of, unchanged
from .inputs import stream_of
from .matrices import ModelMatrix, Scope
from .pruning import removed, smallest
from .report import BaselineReport, MatrixReport

NAME = "flap"


@dataclass(frozen=True)
class Fluctuation:
    """Mean and variance of the outputs of neurons, both [h] fp64."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, site: FFNSite, x: Tensor) -> Fluctuation:
        """Those of the FFN at a site for inputs x [tokens, d]."""
        sums = torch.zeros(2, site.intermediate_size, dtype=torch.float64, device=down_weight(site).device)
        for chunk in chunks(x, site.intermediate_size):
            h = hidden_of(site, chunk).double()
            sums += torch.stack([h.sum(0), h.square().sum(0)])
        mean, square = sums / len(x)
        return cls(mean, (square - mean.square()).clamp_min(0))


def flap_scores(variance: Tensor, down: Tensor) -> Tensor:
    """[h] standardised scores of the neurons of one layer: their variance [h] times `|down[:, i]|^2`, down [d, h]."""
    scores = variance * down.double().square().sum(0)
    return (scores - scores.mean()) / scores.std().clamp_min(1e-30)


@torch.no_grad()
def prune_flap(
    model: PreTrainedModel, windows: Windows, sparsity: float, scope: Scope = "ffn", progress: Progress = silent
) -> BaselineReport:
    """Remove neurons from the FFNs of a model: their weights become zero.

    Args:
        model: of a supported family, in eval mode.
        windows: calibration tokens.
        sparsity: share of all neurons to remove, between 0 and 1.
        scope: must be "ffn".
        progress: told of each block.

    Raises:
        UnsupportedModelError: the family is not supported.
        InvalidInputError: another scope, weights or inputs that are not finite, or a model in training mode.
    """
    sites = checked_sites(model, NAME, scope)
    seen = []
    with tempfile.TemporaryDirectory() as scratch:
        stream = stream_of(model, windows.fit, scratch)
        for done, site in enumerate(sites):
            progress(f"compressing with {NAME}", done, len(sites))
            seen.append(Fluctuation.of(site, stream.ffn_inputs(site)))
            stream.advance()
    scores = torch.stack(
        [flap_scores(each.variance, down_weight(site)) for site, each in zip(sites, seen, strict=True)]
    )
    masks = smallest(scores, removed(scores.numel(), sparsity))
    triples = zip(sites, masks, seen, strict=True)
    rows = [row for site, mask, each in triples for row in remove_neurons(site, mask, each.mean)]
    progress(f"compressing with {NAME}", len(sites), len(sites))
    return BaselineReport(NAME, "ffn", sparsity, token_count(windows.fit), rows)


def remove_neurons(site: FFNSite, mask: Tensor, mean: Tensor) -> list[MatrixReport]:
    """Remove the neurons in a mask [h] from an FFN, and add what they give at their mean output [h] to its bias."""
    *ups, down = matrices_of(site)
    before = [unchanged(matrix) for matrix in (*ups, down)]
    lost = down.weight.double() @ (mean * mask)
    for up in ups:
        rows = mask.repeat(len(up.weight) // len(mask))
        up.weight[rows] = 0
        bias = bias_of(up.module)
        if bias is not None:
            bias[rows] = 0
    down.weight[:, mask] = 0
    _add_bias(down.module, lost)
    kept = 1 - float(mask.double().mean())
    shares = [*[kept] * len(ups), 1.0]
    return [_row(*each, kept) for each in zip((*ups, down), before, shares, strict=True)]


def _add_bias(layer: nn.Module, more: Tensor) -> None:
    """Add to the bias of a linear layer, which gets one if it has none."""
    bias, weight = bias_of(layer), layer.get_parameter("weight")
    total = more if bias is None else bias.double() + more
    layer.bias = nn.Parameter(total.to(weight.dtype), requires_grad=False)


def _row(matrix: ModelMatrix, before: MatrixReport, biases: float, kept: float) -> MatrixReport:
    """The row of a matrix of which a share of the neurons is kept, and a share of the biases."""
    stored = round(kept * matrix.weight.nbytes + biases * matrix.bias_bytes)
    nonzero = int(matrix.weight.count_nonzero())
    return MatrixReport(matrix.name, before.weights, nonzero, before.dense, stored, stored)
