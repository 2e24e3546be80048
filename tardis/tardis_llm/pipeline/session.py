"""What the steps of one fold share: the model, its FFNs, the calibration windows and the settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.stream import Stream
from ..calibration.text import Windows
from ..config import FoldConfig
from ..errors import InvalidInputError
from ..families.naming import check_wiring
from ..families.sites import FFNSite, find_ffns
from ..ffn.accounting import Cost, planned
from ..ffn.weights import DenseFFN
from ..folding.fold import Inputs
from ..report import Progress

_GIB = 2**30
_BUFFERS = 2  # of one stream: hidden states, and the inputs of one FFN


@dataclass(frozen=True)
class Session:
    """One fold under way.

    Attributes:
        model: to fold, in eval mode.
        sites: the FFNs to fold.
        windows: calibration tokens.
        config: settings.
        scratch: folder for hidden states that exceed the memory limit.
        progress: told of each step.
    """

    model: PreTrainedModel
    sites: list[FFNSite]
    windows: Windows
    config: FoldConfig
    scratch: Path
    progress: Progress

    def cost(self, site: FFNSite, bits: int) -> Cost:
        """Bytes of the FFN at `site`, if it is folded as configured with a predictor of so many bits."""
        return planned(site.outline(), self.config.storage, bits)

    def stream(self, ids: Tensor) -> Stream:
        """Windows of token ids [windows, length] at the start of the model."""
        return Stream(self.model, ids, self.scratch, _buffer_limit(self.config), self.config.batch_tokens)


def _buffer_limit(config: FoldConfig) -> float:
    """Bytes of a buffer that stay in memory: hidden states and the inputs of one FFN share the limit."""
    return config.memory_limit_gib * _GIB / _BUFFERS


def hidden_bytes_on_disk(model: PreTrainedModel, windows: Windows, config: FoldConfig) -> int:
    """Bytes of hidden states that a fold keeps in files, because they exceed the memory limit."""
    per_token = find_ffns(model)[0].hidden_size * model.dtype.itemsize
    buffers = (ids.numel() * per_token for ids in (windows.fit, windows.heldout))
    return sum(_BUFFERS * buffer for buffer in buffers if buffer > _buffer_limit(config))


def inputs_at(site: FFNSite, fit: Stream, heldout: Stream) -> Inputs:
    """Move both streams in front of the site's block, and take the inputs of its FFN."""
    advance_to(site.index, fit, heldout)
    return Inputs(fit.ffn_inputs(site), heldout.ffn_inputs(site))


def advance_to(index: int, *streams: Stream) -> None:
    """Move streams that are not there yet in front of block `index`."""
    for stream in streams:
        while stream.position < index:
            stream.advance()


def sound_weights(site: FFNSite) -> DenseFFN:
    """The dense weights at `site`, of which none is NaN or infinite.

    Raises:
        UnsupportedModelError: the activation is none that can be folded.
        InvalidInputError: a weight is not finite.
    """
    ffn = site.weights()
    for name in ("w1", "b1", "w2", "b2"):
        part = getattr(ffn, name)
        if part is not None and not bool(torch.isfinite(part).all()):
            raise InvalidInputError(f"{name} of {site.prefix} has NaN or infinite entries; reload a sound checkpoint.")
    return ffn


def choose_sites(model: PreTrainedModel, config: FoldConfig) -> list[FFNSite]:
    """The FFNs to fold, checked before any long work starts."""
    sites = find_ffns(model)
    if config.layers is not None:
        wrong = sorted(set(config.layers) - set(range(len(sites))))
        if wrong or not config.layers:
            raise InvalidInputError(f"layers is {config.layers}; choose from 0 to {len(sites) - 1}.")
        sites = [site for site in sites if site.index in config.layers]
    for site in sites:
        sound_weights(site)
    check_wiring(model, sites)
    return sites
