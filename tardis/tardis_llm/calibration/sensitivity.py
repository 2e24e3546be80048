"""How much more an error counts in the first token of a text than in the others.

Most models learn to lean on the first token in their attention. Its stream is then hundreds of times larger than those
of others, so that least squares which count errors over that size leave it wrong; and what is wrong there is wrong for
all tokens behind it. How much it counts is measured: by the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..families.sites import FFNSite, named_blocks, running
from ..families.table import family_of
from ..precision import quick_products
from .inputs import TextOrSpeech

_WINDOWS, _LENGTH = 4, 512  # that are measured on, the most, and their tokens


def first_token_importance(model: PreTrainedModel, sites: Sequence[FFNSite], inputs: TextOrSpeech) -> dict[int, float]:
    """By how much more an error of a block's FFN counts in the first token than in others, from 1.

    Errors are taken relative to what the norms behind the FFN divide by, as in `Stream.observe`.

    Args:
        model: dense, in eval mode.
        sites: its FFNs.
        inputs: windows to measure on.

    Returns:
        The factor of each block, by its number. Without entries where there is no loss of next tokens to measure: for
        encoders, speech, and models without a head.
    """
    if not isinstance(inputs, Tensor) or not family_of(model.config).causal or model.get_output_embeddings() is None:
        return {}
    squares = [torch.zeros(min(_LENGTH, inputs.shape[1])) for _ in sites]
    for window in inputs[:_WINDOWS, :_LENGTH]:
        for total, some in zip(squares, _relative_gradients(model, sites, window), strict=True):
            total += some
    ratios = (float(each[0] / each[1:].mean().clamp_min(1e-30)) for each in squares)
    return {site.index: max(1.0, ratio) for site, ratio in zip(sites, ratios, strict=True)}


@torch.enable_grad()
def _relative_gradients(model: PreTrainedModel, sites: Sequence[FFNSite], window: Tensor) -> list[Tensor]:
    """For each FFN [tokens] fp32, the squared gradient of the loss by its output, times the squares of norms' inputs.

    Args:
        model, sites: as `first_token_importance`.
        window: [tokens] token ids.
    """
    probes: list[Tensor] = []
    sizes: list[Tensor] = []

    def probe(down: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        probes.append(torch.zeros_like(output, requires_grad=True))
        sizes.append(_mean_square(output))
        return output + probes[-1]

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        after = _mean_square(output[0] if isinstance(output, tuple) else output)
        sizes[-1] = after if normless[len(sizes) - 1] else after * sizes[-1]

    normless = [site.norm is None for site in sites]
    with ExitStack() as hooks:
        for site in sites:
            hooks.callback(site.down.register_forward_hook(probe).remove)
            hooks.callback(site.block.register_forward_hook(leave).remove)
        for block in named_blocks(model).values():  # each is computed again on the way back, and kept no longer
            again = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts
            )
            hooks.enter_context(running(block, again))
        ids = window.to(model.device)
        with quick_products():
            logits = model(input_ids=ids[None], use_cache=False, return_dict=True).logits[0]
        loss = F.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum")
        first = tuple(probes)  # blocks that are computed again have others
        gradients = torch.autograd.grad(loss, first)
    return [
        (_mean_square(gradient) * size).cpu() for gradient, size in zip(gradients, sizes[: len(first)], strict=True)
    ]


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of a block's forward, which has those around the model's, and of that on the way back, which has none."""
    return nullcontext(), quick_products()


def _mean_square(x: Tensor) -> Tensor:
    """[tokens] fp32, the mean of the squares of x [..., d]."""
    return x.detach().float().square().mean(-1).flatten()
