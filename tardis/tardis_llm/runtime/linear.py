"""Dense linear layers through our CPU kernel while few tokens are decoded: torch's own leaves bandwidth unused then."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import ops
from .cpu.library import MAX_TOKENS


class KernelLinear(nn.Linear):
    """`nn.Linear` whose product with up to 64 tokens is `tardis::bf16_linear`; otherwise it is as any other.

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
        alike = x.dtype == self.weight.dtype and self.weight.is_contiguous() and not torch.is_grad_enabled()
        if not alike or x.numel() > MAX_TOKENS * x.shape[-1] or not ops.takes(x):
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.tardis.bf16_linear(x.reshape(-1, x.shape[-1]).contiguous(), self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def kernel_linear(layer: nn.Module) -> KernelLinear:
    """The same layer through the kernel. Conv1D, which stores its weight transposed, is laid out anew, in a copy."""
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    if isinstance(layer, Conv1D):
        weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    return KernelLinear(weight, bias)
