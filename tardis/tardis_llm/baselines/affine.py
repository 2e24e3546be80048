"""The best affine map in place of every FFN: `y ~ x C^T + c`, what folding without any fixing could reach at best.

C is found by ridge regression on the inputs and outputs of the FFN behind the maps already in place, the damping
chosen on held-out tokens.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.inputs import token_count
from ..calibration.moments import SecondMoments
from ..calibration.stream import Stream
from ..calibration.text import Windows
from ..errors import InvalidInputError
from ..families.sites import FFNSite, find_ffns, set_module
from ..folding.ridge import Spectrum, ridge
from ..report import Progress, silent
from .inputs import finite_rows, stream_of
from .matrices import find_matrices
from .report import BaselineReport, MatrixReport

NAME = "affine"
_STAGE = f"compressing with {NAME}"


@dataclass(frozen=True)
class FFNMoments:
    """Second moments of the inputs of an FFN beside themselves (x) and beside its outputs (y)."""

    x: SecondMoments
    y: SecondMoments

    @classmethod
    def zeros(cls, d: int) -> FFNMoments:
        """Nothing seen yet, d inputs and outputs."""
        return cls(SecondMoments.zeros(d, d), SecondMoments.zeros(d, d))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add inputs and outputs [tokens, d] of any float dtype."""
        self.x.add(x, x)
        self.y.add(x, y)


def best_affine(fit: FFNMoments, heldout: FFNMoments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """C [d, d] and c [d] in `dtype`; c makes up for the rounding of C at the mean input."""
    C = ridge(Spectrum.of(fit.x), fit.x, fit.y, heldout.x, heldout.y).weight.to(dtype).contiguous()
    c = (fit.y.y_sum - C.double() @ fit.x.x_sum) / fit.x.count
    return C, c.to(dtype)


@torch.no_grad()
def replace_by_affine(model: PreTrainedModel, windows: Windows, progress: Progress = silent) -> BaselineReport:
    """Put the best affine map in the place of every FFN of a model.

    Args:
        model: of a supported family, in eval mode, on the CPU; its dtype is that of the maps.
        windows: calibration tokens, to fit on and to choose the damping with.
        progress: told of each block.

    Raises:
        UnsupportedModelError: the family is not supported.
        InvalidInputError: weights or inputs that are not finite, or a model in training mode.
    """
    find_matrices(model, "ffn")  # checks the weights of all before any is replaced
    sites, rows = find_ffns(model), []
    with tempfile.TemporaryDirectory() as scratch:
        streams = [stream_of(model, inputs, scratch) for inputs in windows]
        for done, site in enumerate(sites):
            progress(_STAGE, done, len(sites))
            fit, heldout = (_moments(site, stream) for stream in streams)
            rows.append(install(model, site, *best_affine(fit, heldout, site.parts()[0].dtype)))
            if done + 1 < len(sites):
                for stream in streams:
                    stream.advance()
    progress(_STAGE, len(sites), len(sites))
    return BaselineReport(NAME, "ffn", None, token_count(windows.fit), rows)


def install(model: nn.Module, site: FFNSite, weight: Tensor, bias: Tensor) -> MatrixReport:
    """Put `x weight^T + bias` into the model in place of the FFN at `site`.

    It becomes the down projection behind parts that do nothing, or stands for the module around a gated FFN.
    """
    linear = torch.nn.utils.skip_init(nn.Linear, *weight.T.shape, dtype=weight.dtype)
    linear.weight, linear.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
    for name in site.replaced:
        set_module(model, name, nn.Identity())
    set_module(model, list(site.replaced)[-1], linear.eval())
    before = [part for part in site.parts() if part is not None]
    dense, weights = sum(part.nbytes for part in before), sum(part.numel() for part in before if part.ndim == 2)
    stored = weight.nbytes + bias.nbytes
    return MatrixReport(site.prefix, weights, int(weight.count_nonzero()), dense, stored, stored)


def _moments(site: FFNSite, stream: Stream) -> FFNMoments:
    """Moments of the FFN at `site`, in the next block, over all the windows of the stream."""
    moments, inputs = FFNMoments.zeros(site.hidden_size), []

    def enter(up: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(finite_rows(args[0], site.up_name))

    def leave(down: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        y = output.reshape(-1, output.shape[-1])
        if not bool(torch.isfinite(y).all()):
            raise InvalidInputError(
                f"the outputs of {site.down_name} are NaN or infinite on the calibration text. Load the model in "
                "bfloat16 or float32 if it overflows float16."
            )
        moments.add(inputs.pop(), y)

    with ExitStack() as hooks:
        hooks.callback(site.up.register_forward_pre_hook(enter).remove)
        hooks.callback(site.down.register_forward_hook(leave).remove)
        stream.visit()
    return moments
