"""Linear layers of both kinds: `nn.Linear` stores its weight as [out, in], transformers' `Conv1D` as [in, out].

No other module tells the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import InvalidInputError


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a module is a dense linear layer."""
    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer stores its weight as [in, out]."""
    return isinstance(layer, Conv1D)


def turned(layer: nn.Module, weight: Tensor) -> Tensor:
    """A view of a weight in the other order: [out, in] for what a layer stores, or the layer's own for [out, in].

    The two differ in `Conv1D` alone. An empty weight, which is no matrix, stays as it is.

    Args:
        layer: `nn.Linear` or `Conv1D`, whose order counts.
        weight: in one of the two orders.
    """
    return weight.T if is_transposed(layer) and weight.dim() == 2 else weight


def weight_of(layer: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer, as a detached view: writing to it writes to the layer."""
    return turned(layer, layer.get_parameter("weight").detach())


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias [out] of a linear layer, as a detached view; None if it has no bias."""
    bias = getattr(layer, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def one_below_the_other(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices, or vectors, as one: a view of those that follow one another in memory already, else a copy."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if torch.compiler.is_compiling() or not follow_one_another(matrices):  # a graph cannot see where they lie
        return torch.cat(list(matrices))
    return first.as_strided((sum(map(len, matrices)), *first.shape[1:]), first.stride())


def follow_one_another(matrices: Sequence[Tensor]) -> bool:
    """Whether matrices are parts of one storage, each contiguous and behind the one before it."""
    storage = matrices[0].untyped_storage()._cdata
    if any(each.is_meta or not each.is_contiguous() or each.untyped_storage()._cdata != storage for each in matrices):
        return False
    return all(one.data_ptr() + one.nbytes == other.data_ptr() for one, other in pairwise(matrices))


def joined(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    """One bias for several layers, zeros for those that have none; None where none has one."""
    if len(biases) == 1 or not any(bias is not None for bias in biases):
        return biases[0]
    pairs = zip(biases, weights, strict=True)
    return one_below_the_other([w.new_zeros(len(w)) if bias is None else bias for bias, w in pairs])


def check_linear(module: nn.Module, name: str) -> None:
    """Check that a module is a linear layer with a floating-point weight, and a bias that fits it.

    Args:
        module: on any device, including meta.
        name: full name of the module, for the message.

    Raises:
        InvalidInputError: it is no linear layer, its weight is no floating-point matrix, or its bias has another size.
    """
    if not is_linear(module):
        raise InvalidInputError(
            f"{name} is a {type(module).__name__}, not a linear layer. Merge adapters, and pass the original "
            "model rather than one that is already folded or wrapped."
        )
    weight, bias = module.weight, bias_of(module)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise InvalidInputError(
            f"{name}.weight is {weight.dtype} of shape {list(weight.shape)}, not a floating-point matrix. Load the "
            "model without quantisation, in float32, bfloat16 or float16."
        )
    outputs = len(weight_of(module))
    if bias is not None and bias.shape != (outputs,):
        raise InvalidInputError(
            f"{name}.bias has shape {list(bias.shape)} but the layer has {outputs} outputs. Reload "
            "the model from a sound checkpoint."
        )
