"""Dense linear layers through our CPU kernels, which use the bandwidth and take weights that lie neuron by neuron."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import ops
from .cpu.library import MAX_TOKENS
from .relaid import InPanels


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


class KernelLinear(InPanels, nn.Linear):
    """`nn.Linear` by the kernels.

    Args:
        weight: [out, in], shared, not copied, until it is put in panels.
        bias: [out] or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self._panels = None
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] for x [..., in], in the dtype of x."""
        panels = self._panels
        if panels is None:
            return linear(x, self.weight, self.bias)
        if x.dtype != torch.bfloat16 or torch.is_grad_enabled():
            return linear(x, self._matrix(), self.bias)
        y: Tensor = torch.ops.tardis.panels_linear(_flat(x), panels.data, self.bias, self.out_features)
        return y.view(*x.shape[:-1], self.out_features)

    def _matrix(self) -> Tensor:
        stored = self.stored
        assert isinstance(stored, Tensor)
        return stored

    def _get(self) -> Tensor:
        return self.weight

    def _set(self, matrix: Tensor) -> None:
        self.weight = nn.Parameter(matrix, requires_grad=False)

    def _clear(self) -> None:
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)


def put_in_panels(model: nn.Module) -> None:
    """Put the weight of every `KernelLinear` in panels that no other module of the model has."""
    owners = Counter(id(part) for module in model.modules() for part in module.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, KernelLinear) and owners[id(module.weight)] == 1:
            module.pack(module.weight.dtype)


def kernel_linear(layer: nn.Module) -> KernelLinear:
    """The same layer through the kernels. Conv1D, which stores its weight transposed, is laid out anew, in a copy."""
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    if isinstance(layer, Conv1D):
        weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    return KernelLinear(weight, bias)
