"""What the steps of one fold share: the model, its FFNs, the calibration windows and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.blocks import shape_in
from ..calibration.inputs import TextOrSpeech
from ..calibration.stream import Seen, Stream
from ..calibration.text import Windows
from ..calibration.tokens import Tokens, chunks
from ..config import FoldConfig, Select
from ..errors import InvalidInputError
from ..families.naming import check_wiring
from ..families.sites import FFNSite, find_ffns
from ..ffn.accounting import Cost, planned
from ..ffn.weights import DenseFFN
from ..report import Progress

_GIB = 2**30
_BUFFERS = 5  # of one text: hidden states dense and folded; inputs and outputs of one FFN and the stream behind it


@dataclass(frozen=True)
class Session:
    """One fold under way.

    Attributes:
        model: to fold, in eval mode.
        sites: the FFNs to fold.
        windows: to calibrate on.
        config: settings.
        scratch: folder for hidden states that exceed the memory limit.
        progress: told of each step.
        first: by how much more an error counts in the first token of a window, by the number of the block.
    """

    model: PreTrainedModel
    sites: list[FFNSite]
    windows: Windows
    config: FoldConfig
    scratch: Path
    progress: Progress
    first: Mapping[int, float] = field(default_factory=dict)

    def cost(self, site: FFNSite, bits: int) -> Cost:
        """Bytes of the FFN at `site`, if it is folded as configured with a predictor of so many bits."""
        return planned(site.outline(), self.config.storage, bits)

    def stream(self, inputs: TextOrSpeech) -> Stream:
        """Windows of text or speech at the start of the model."""
        limit = _buffer_limit(self.config)
        return Stream(self.model, inputs, self.scratch, limit, self.config.batch_tokens, self.first)

    def follow(self, inputs: TextOrSpeech) -> Followed:
        """Windows of text or speech at the start of the model that is folded and of the dense one."""
        return Followed(self.stream(inputs), self.stream(inputs), self.config)


def selected(config: FoldConfig, sites: list[FFNSite]) -> Select:
    """Which neurons are computed exactly, as configured or as is best for these FFNs."""
    if config.select is not None:
        return config.select
    keeps = config.fallback_bits is not None and config.refit and config.policy == "error"
    return "mixed" if keeps and any(site.gated for site in sites) else "dynamic"


def splits_alike(config: FoldConfig, sites: list[FFNSite]) -> bool:
    """Whether all layers get the same fix rate, as configured or as is best for these FFNs."""
    if config.split is None:
        return config.select == "static" or any(site.gated for site in sites)
    return config.split == "uniform"


def _buffer_limit(config: FoldConfig) -> float:
    """Bytes of a buffer that stay in memory: hidden states and the inputs of one FFN share the limit."""
    return config.memory_limit_gib * _GIB / _BUFFERS


def hidden_bytes_on_disk(model: PreTrainedModel, windows: Windows, config: FoldConfig) -> int:
    """Bytes of hidden states that a fold keeps in files, because they exceed the memory limit."""
    per_token = find_ffns(model)[0].hidden_size * model.dtype.itemsize
    buffers = (shape_in(model, 0, inputs).numel() * per_token for inputs in windows)
    return sum(_BUFFERS * buffer for buffer in buffers if buffer > _buffer_limit(config))


@dataclass(frozen=True)
class Followed:
    """A text on its way through the model that is folded, and through the dense model.

    Attributes:
        folded: behind the folded layers.
        dense: behind dense layers; a block is dense until its fold is installed, so it goes ahead.
        config: settings.
    """

    folded: Stream
    dense: Stream
    config: FoldConfig

    def at(self, site: FFNSite) -> Tokens:
        """Inputs of the FFN at a site behind the folded layers, with the outputs wanted and the tokens' weights."""
        advance_to(site.index, self.folded)
        return self.learn(site, self.teach(site))

    def teach(self, site: FFNSite) -> Seen:
        """What happens at a site in the dense model, whose stream moves behind the site's block."""
        advance_to(site.index, self.dense)
        return self.dense.observe(site, advance=True)

    def learn(self, site: FFNSite, taught: Seen) -> Tokens:
        """What `at` returns, the folded stream in front of the site's block, from what `teach` returned."""
        weight = taught.weight if self.config.weigh else None
        if not self.config.sequential:
            return Tokens(taught.x, None, weight, self.config.torch_device)
        gain = self.folded.gain(site) if self.config.target == "stream" else None
        if gain is None:
            wanted = None if self.config.target == "own" else taught.y
            return Tokens(self.folded.ffn_inputs(site), wanted, weight, self.config.torch_device)
        wanted = taught.after
        del taught  # its other buffers may be as large as memory or disk allow
        own = self.folded.observe(site)
        _make_up(site, own, wanted, gain)
        return Tokens(own.x, own.y, weight, self.config.torch_device)

    def pass_by(self, index: int) -> None:
        """Move the dense stream behind a block that is about to change, and the folded one in front of it."""
        advance_to(index, self.folded)
        advance_to(index + 1, self.dense)


def _make_up(site: FFNSite, seen: Seen, wanted: Tensor, gain: float) -> None:
    """Change an FFN's outputs in place, so that the residual stream behind it is the wanted one.

    A norm behind the FFN is taken for what it is to small changes of its input's direction: a factor per channel over
    the size of the token.

    Args:
        site: the FFN.
        seen: its outputs, and the stream behind it.
        wanted: [tokens, d] the stream.
        gain: by which the block multiplies what it adds to the stream.
    """
    channel = 1 / gain if site.norm is None else _inverse(site.norm, seen.y).to(seen.y.device) / gain
    for y, after, aim in zip(*(chunks(part, seen.y.shape[1]) for part in (seen.y, seen.after, wanted)), strict=True):
        size = 1 if site.norm is None else y.float().square().mean(1, keepdim=True).sqrt()
        y += ((aim.float() - after.float()) * channel * size).to(y.dtype)


def _inverse(norm: nn.Module, like: Tensor) -> Tensor:
    """[d] fp32, one over the factors by which a norm multiplies channels; next to 0 where those are."""
    signs = torch.ones_like(like[:1], device=next(norm.parameters(), like).device)
    signs[:, 1::2] = -1  # of mean 0 and mean square 1, which no norm changes
    factor = ((norm(signs) - norm(-signs)) / 2 * signs)[0].float()
    return factor / (factor.square() + 1e-3 * factor.square().mean())


def tokens_at(site: FFNSite, stream: Stream, config: FoldConfig) -> Tokens:
    """Inputs of the FFN at a site of a dense model; the stream moves in front of the site's block and stays there."""
    advance_to(site.index, stream)
    seen = stream.observe(site)
    return Tokens(seen.x, None, seen.weight if config.weigh else None, config.torch_device)


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
        if config.policy == "coverage" and site.gated:
            raise InvalidInputError(
                f"policy is 'coverage', which is for plain FFNs, and {site.prefix} has a gate; give 'error'."
            )
    check_wiring(model, sites)
    return sites
