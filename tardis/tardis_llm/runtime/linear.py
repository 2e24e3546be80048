"""Dense linear layers through our CPU kernels, which use the bandwidth and take weights that lie neuron by neuron."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import ops
from .cpu.library import MAX_TOKENS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by the kernels where they take x and the weight as they lie.

    torch lays a weight out anew in every call, which takes longer than the product with a few dozen tokens.

    Args:
        x: [..., in].
        weight: [out, in], contiguous, or the transpose of what is.
        bias: [out] or None.

    Returns:
        [..., out] in the dtype of x.
    """
    alike = x.dtype == weight.dtype and not torch.is_grad_enabled()
    tokens = x.numel() // x.shape[-1]
    if alike and tokens <= MAX_TOKENS and weight.is_contiguous() and ops.takes(x):
        y = torch.ops.tardis.bf16_linear(_flat(x), weight, bias)
    elif alike and ops.multiplies(x, weight):
        transposed = not weight.is_contiguous()
        y = torch.ops.tardis.gemm(_flat(x), weight.T if transposed else weight, bias, transposed)
    else:
        return F.linear(x, weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


class KernelLinear(nn.Linear):
    """`nn.Linear` by `linear`.

    Args:
        weight: [out, in], shared, not copied.
        bias: [out] or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] for x [..., in], in the dtype of x."""
        return linear(x, self.weight, self.bias)


def kernel_linear(layer: nn.Module) -> KernelLinear:
    """The same layer through the kernels. Conv1D, which stores its weight transposed, is laid out anew, in a copy."""
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    if isinstance(layer, Conv1D):
        weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    return KernelLinear(weight, bias)
