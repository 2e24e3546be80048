"""The best affine map in place of every FFN: `y ~ x C^T + c`, what folding without any fixing could reach at best.

C is found by ridge regression on the inputs and outputs of the FFN behind the maps already in place, the damping
chosen on held-out tokens. `best_affine` serves `repair`, too.
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
from ..families.sites import FFNSite
from ..folding.ridge import Spectrum, ridge
from ..report import Progress, silent
from .ffns import checked_sites, down_weight, replace_ffn
from .gptq import quantise_gptq
from .inputs import finite_rows, stream_of
from .matrices import Scope
from .report import BaselineReport, MatrixReport

NAME = "affine"
_STAGE = f"compressing with {NAME}"


@dataclass(frozen=True)
class FFNMoments:
    """Second moments of inputs beside themselves (x) and beside outputs (y)."""

    x: SecondMoments
    y: SecondMoments

    @classmethod
    def zeros(cls, d: int, k: int, device: torch.device | None = None) -> FFNMoments:
        """Nothing seen yet, d inputs and k outputs; on a device, default: the CPU."""
        return cls(SecondMoments.zeros(d, d, device), SecondMoments.zeros(d, k, device))

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add inputs [tokens, d] and outputs [tokens, k] of any float dtype, which count by weight [tokens]."""
        self.x.add(x, x, weight)
        self.y.add(x, y, weight)

    @property
    def hessian(self) -> Tensor:
        """[d, d] fp64 `(2 / N) X^T X`."""
        return self.x.cross * (2 / self.x.count)

    def bias_beside(self, weight: Tensor) -> Tensor:
        """[k] fp64, what is best added to `x weight^T` for a weight [k, d]."""
        return (self.y.y_sum - weight.double() @ self.x.x_sum) / self.x.count


def best_affine(
    fit: FFNMoments, heldout: FFNMoments, dtype: torch.dtype, bits: int | None = None, group: int = 128
) -> tuple[Tensor, Tensor]:
    """C [d, d] and c [d] in `dtype`; c makes up for the rounding of C at the mean input.

    Args:
        fit: moments to fit.
        heldout: moments to choose the damping on.
        dtype: of C and c.
        bits: per weight of C, which GPTQ then rounds; None for all of the dtype's.
        group: columns of a row of C that share scale and zero point, with `bits`.
    """
    C = ridge(Spectrum.of(fit.x), fit.x, fit.y, heldout.x, heldout.y).weight
    if bits is not None:
        C = quantise_gptq(C, fit.hessian, bits, group)
    C = C.to(dtype).contiguous()
    return C, fit.bias_beside(C).to(dtype)


@torch.no_grad()
def replace_by_affine(
    model: PreTrainedModel, windows: Windows, scope: Scope = "ffn", progress: Progress = silent
) -> BaselineReport:
    """Put the best affine map in the place of every FFN of a model.

    Args:
        model: of a supported family, in eval mode; its dtype is that of the maps.
        windows: calibration tokens, to fit on and to choose the damping with.
        scope: must be "ffn".
        progress: told of each block.

    Raises:
        UnsupportedModelError: the family is not supported.
        InvalidInputError: another scope, weights or inputs that are not finite, or a model in training mode.
    """
    sites, rows = checked_sites(model, NAME, scope), []
    with tempfile.TemporaryDirectory() as scratch:
        streams = [stream_of(model, inputs, scratch) for inputs in windows]
        for done, site in enumerate(sites):
            progress(_STAGE, done, len(sites))
            fit, heldout = (_moments(site, stream) for stream in streams)
            rows.append(install(model, site, *best_affine(fit, heldout, down_weight(site).dtype)))
            if done + 1 < len(sites):
                for stream in streams:
                    stream.advance()
    progress(_STAGE, len(sites), len(sites))
    return BaselineReport(NAME, "ffn", None, token_count(windows.fit), rows)


def install(model: nn.Module, site: FFNSite, weight: Tensor, bias: Tensor) -> MatrixReport:
    """Put `x weight^T + bias` into the model in place of the FFN at `site`."""
    return replace_ffn(model, site, linear_of(weight, bias))


def linear_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    """The layer `x weight^T + bias`."""
    linear = torch.nn.utils.skip_init(nn.Linear, *weight.T.shape, dtype=weight.dtype)
    linear.weight, linear.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
    return linear.eval()


def _moments(site: FFNSite, stream: Stream) -> FFNMoments:
    """Moments of the FFN at `site`, in the next block, over all the windows of the stream."""
    moments, inputs = FFNMoments.zeros(site.hidden_size, site.hidden_size, down_weight(site).device), []

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
