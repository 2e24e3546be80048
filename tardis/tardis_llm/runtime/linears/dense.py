"""Dense linear layers through our CPU kernels, which use the bandwidth and take weights that lie neuron by neuron."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...families.linear import is_transposed, turned
from ...ffn.packed import PackedMatrix
from ..cpu import ops
from ..cpu.library import MAX_TOKENS
from ..cpu.panels import Panels
from ..stored import InPanels, refuse_training


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


_PREPARED = (
    "they lie in another order. Load the model anew and train it before it is prepared, or freeze them with "
    "tardis_llm.freeze(model)."
)


class ThroughKernels(InPanels):
    """A dense linear layer by the kernels, made by `kernel_linear`; its weight may be in panels."""

    weight: Tensor

    relaid = frozenset({"weight"})

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in], in the order in which it is stored."""
        return turned(self, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] for x [..., in], in the dtype of x.

        Raises:
            InvalidInputError: it is in panels and set to train.
        """
        panels = self._panels or self.laid
        if not isinstance(panels, Panels):
            return linear(x, _dense(panels), self.bias)
        if torch.is_grad_enabled():
            refuse_training([self._parameters["weight"]], "weights that are prepared for decoding are", _PREPARED)
        if x.dtype != panels.data.dtype or torch.is_grad_enabled():
            return linear(x, _dense(panels.matrix()), self.bias)
        y: Tensor = torch.ops.tardis.panels_linear(_flat(x), panels.data, self.bias, panels.rows)
        return y.view(*x.shape[:-1], panels.rows)

    def _get(self) -> Tensor:
        return self.matrix

    def _set(self, matrix: Tensor) -> None:
        self.weight = nn.Parameter(turned(self, matrix), requires_grad=False)

    def _clear(self) -> None:
        self._set(self.weight.new_empty(0))


def _dense(matrix: Tensor | PackedMatrix) -> Tensor:
    assert isinstance(matrix, Tensor), "the weight of a dense layer is not in few bits"
    return matrix


class KernelLinear(ThroughKernels, nn.Linear):
    """`nn.Linear` by the kernels."""


class KernelConv1D(ThroughKernels, Conv1D):
    """Conv1D of transformers by the kernels: its weight is [in, out], and lies in memory as its transpose."""


def put_in_panels(model: nn.Module) -> None:
    """Freeze every layer `ThroughKernels`, and put its weight in panels where no other module of the model has it."""
    owners = Counter(id(part) for module in model.modules() for part in module.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, ThroughKernels):
            module.freeze()
            if owners[id(module._parameters["weight"])] == 1:
                module.pack(module.weight.dtype)


def kernel_linear(layer: nn.Module) -> ThroughKernels:
    """The same layer through the kernels: with its parameters, until they are put in panels, its hooks and its mode.

    The weight of a Conv1D is laid out anew, in a copy: the kernels read a weight output by output.
    """
    kind = KernelConv1D if is_transposed(layer) else KernelLinear
    made = kind.__new__(kind)
    made.__dict__ = {**layer.__dict__, "_parameters": dict(layer._parameters)}
    if is_transposed(made):
        weight = made.weight
        made.weight = nn.Parameter(weight.detach().T.contiguous().T, requires_grad=weight.requires_grad)
    return made
