"""Dense linear layers that multiply by our kernels, which use more of the memory bandwidth than torch's."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...families.linear import is_transposed, turned
from ..backend import linear
from ..stored import LaidOut, refuse_training
from .head import PredictedHead
from .lowbit import LowBitLinear

_PREPARED = (
    "they lie in another order. Load the model anew and train it before it is prepared, or freeze them with "
    "tardis_llm.freeze(model)."
)


class ThroughKernels(LaidOut):
    """A dense linear layer that multiplies by the kernels, and whose weight may be laid out for them.

    `kernel_linear` makes it of another layer.
    """

    weight: Tensor
    matrix_tensors = frozenset({"weight"})

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., out] for x [..., in], in the dtype of x.

        Raises:
            InvalidInputError: the weight is laid out and set to train.
        """
        if self._layout is not None:
            refuse_training([self._parameters["weight"]], "weights that are prepared for decoding are", _PREPARED)
        return linear(x, self._layout or self.current, self.bias)

    def _get(self) -> Tensor:
        return turned(self, self.weight)

    def _set(self, matrix: Tensor) -> None:
        self.weight = nn.Parameter(turned(self, matrix), requires_grad=False)

    def _clear(self) -> None:
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)


class KernelLinear(ThroughKernels, nn.Linear):
    """`nn.Linear` that multiplies by the kernels."""


class KernelConv1D(ThroughKernels, Conv1D):
    """Conv1D of transformers that multiplies by the kernels; its weight [in, out] is a transposed view."""


def lay_out_linears(model: nn.Module) -> None:
    """Freeze the layers of a model that multiply by the kernels, and lay out each weight that no other module has.

    Those in few bits are laid out, too.
    """
    owners = Counter(id(part) for module in model.modules() for part in module.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, ThroughKernels):
            module.freeze()
            weight = module._parameters["weight"]  # `module.weight` would be put back for it
            assert weight is not None, "a linear layer has a weight"
            if owners[id(weight)] == 1:
                module.lay_out(weight.dtype)
        elif isinstance(module, LowBitLinear | PredictedHead):
            module.lay_out(module.weight.dtype)


def kernel_linear(layer: nn.Module) -> ThroughKernels:
    """A dense linear layer that multiplies by the kernels and shares another layer's parameters, hooks and mode.

    The weight of a Conv1D is copied, as its transpose: the kernels read a weight output by output.
    """
    cls = KernelConv1D if is_transposed(layer) else KernelLinear
    made = cls.__new__(cls)
    made.__dict__ = {**layer.__dict__, "_parameters": dict(layer._parameters)}
    if is_transposed(made):
        weight = made.weight
        made.weight = nn.Parameter(weight.detach().T.contiguous().T, requires_grad=weight.requires_grad)
    return made
