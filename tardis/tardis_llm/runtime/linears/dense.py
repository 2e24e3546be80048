"""Dense linear layers through our CPU kernels, which use the bandwidth and take weights that lie neuron by neuron."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...families.linear import is_transposed, turned
from ..backend import linear
from ..stored import LaidOut, refuse_training

_PREPARED = (
    "they lie in another order. Load the model anew and train it before it is prepared, or freeze them with "
    "tardis_llm.freeze(model)."
)


class ThroughKernels(LaidOut):
    """A dense linear layer by the kernels, made by `kernel_linear`; its weight may be laid out for them."""

    weight: Tensor

    matrix_tensors = frozenset({"weight"})

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., out] for x [..., in], in the dtype of x.

        Raises:
            InvalidInputError: it is laid out and set to train.
        """
        if self._layout is not None and torch.is_grad_enabled():
            refuse_training([self._parameters["weight"]], "weights that are prepared for decoding are", _PREPARED)
        return linear(x, self._layout or self.current, self.bias)

    def _get(self) -> Tensor:
        return turned(self, self.weight)

    def _set(self, matrix: Tensor) -> None:
        self.weight = nn.Parameter(turned(self, matrix), requires_grad=False)

    def _clear(self) -> None:
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)


class KernelLinear(ThroughKernels, nn.Linear):
    """`nn.Linear` by the kernels."""


class KernelConv1D(ThroughKernels, Conv1D):
    """Conv1D of transformers by the kernels: its weight is [in, out], and lies in memory as its transpose."""


def lay_out_linears(model: nn.Module) -> None:
    """Freeze every layer `ThroughKernels`, and lay its weight out where no other module of the model has it."""
    owners = Counter(id(part) for module in model.modules() for part in module.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, ThroughKernels):
            module.freeze()
            if owners[id(module._parameters["weight"])] == 1:
                module.lay_out(module.weight.dtype)


def kernel_linear(layer: nn.Module) -> ThroughKernels:
    """The same layer through the kernels: with its parameters, until they are laid out, its hooks and its mode.

    The weight of a Conv1D is laid out anew, in a copy: the kernels read a weight output by output.
    """
    kind = KernelConv1D if is_transposed(layer) else KernelLinear
    made = kind.__new__(kind)
    made.__dict__ = {**layer.__dict__, "_parameters": dict(layer._parameters)}
    if is_transposed(made):
        weight = made.weight
        made.weight = nn.Parameter(weight.detach().T.contiguous().T, requires_grad=weight.requires_grad)
    return made
