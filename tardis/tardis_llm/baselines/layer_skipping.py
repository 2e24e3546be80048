"""Layer skipping: the FFNs that the loss misses least are left out whole.

Depth pruning as of ShortGPT (Men et al. 2024, arXiv 2403.03853) or "What Matters in Transformers?" (He et al. 2024,
arXiv 2406.15786), for FFNs alone. These rank layers by how similar their input and output are. Here they are ranked by
what is asked of the whole model: the loss on held-out text without the FFN of one layer, which counts its effect on all
layers behind it, too.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.inputs import TextOrSpeech, token_count
from ..calibration.text import Windows
from ..families.sites import FFNSite
from ..report import Progress, silent
from .ffns import checked_sites, matrices_of, replace_ffn, unchanged
from .inputs import stream_of
from .matrices import Scope
from .pruning import removed, smallest
from .report import BaselineReport

NAME = "skip"


class Nothing(nn.Module):
    """Gives zeros in the shape of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x)


@torch.no_grad()
def losses_without(model: PreTrainedModel, sites: list[FFNSite], windows: TextOrSpeech, progress: Progress) -> Tensor:
    """[layers] fp64, the loss on windows when the FFN of one layer gives nothing."""
    losses = []
    with tempfile.TemporaryDirectory() as scratch:
        stream = stream_of(model, windows, scratch)
        reference = stream.reference()
        for done, site in enumerate(sites):
            progress("measuring losses", done, len(sites))
            hook = site.down.register_forward_hook(_nothing)
            try:
                losses.append(stream.loss(reference))
            finally:
                hook.remove()
            stream.advance()
    progress("measuring losses", len(sites), len(sites))
    return torch.tensor(losses, dtype=torch.float64)


def _nothing(down: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def skip_layers(
    model: PreTrainedModel, windows: Windows, share: float, scope: Scope = "ffn", progress: Progress = silent
) -> BaselineReport:
    """Leave out the FFNs of some layers: they give nothing.

    Args:
        model: of a supported family, in eval mode.
        windows: calibration tokens, of which the held-out ones are used.
        share: of the layers whose FFNs go, between 0 and 1; one at least goes.
        scope: must be "ffn".
        progress: told of each layer.

    Raises:
        UnsupportedModelError: the family is not supported.
        InvalidInputError: another scope, weights that are not finite, or a model in training mode.
    """
    sites = checked_sites(model, NAME, scope)
    losses = losses_without(model, sites, windows.heldout, progress)
    gone = smallest(losses, max(1, removed(len(sites), share))).tolist()
    rows = []
    for site, without in zip(sites, gone, strict=True):
        rows += [replace_ffn(model, site, Nothing())] if without else [unchanged(each) for each in matrices_of(site)]
    return BaselineReport(NAME, "ffn", share, token_count(windows.heldout), rows)
