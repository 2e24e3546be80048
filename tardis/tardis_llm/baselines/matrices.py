"""The matrices of a model that the baselines compress, block by block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InvalidInputError
from ..families.linear import bias_of, check_linear, is_linear, weight_of
from ..families.sites import find_ffns, named_blocks

#: "ffn": the two or three matrices of every FFN; "all": every linear layer in the blocks, those of attention too
Scope = Literal["ffn", "all"]


@dataclass(frozen=True, eq=False)
class ModelMatrix:
    """A linear layer in a model.

    Attributes:
        name: full name of the module in the model.
        module: the layer.
    """

    name: str
    module: nn.Module = field(repr=False)

    @property
    def weight(self) -> Tensor:
        """[out, in], a detached view of the stored weight: writing to it writes to the model."""
        return weight_of(self.module)

    @property
    def bias_bytes(self) -> int:
        """Bytes of the bias; 0 without one."""
        bias = bias_of(self.module)
        return 0 if bias is None else bias.nbytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + self.bias_bytes

    def write(self, weight: Tensor) -> None:
        """Put `weight` [out, in] into the model, in the model's dtype.

        Raises:
            InvalidInputError: it is not finite there.
        """
        stored = weight.to(self.weight.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise InvalidInputError(
                f"its new weight is NaN or infinite in {stored.dtype}; load the model in bfloat16 or float32 if it "
                "overflows float16, or give more calibration text."
            )
        self.weight.copy_(stored)


def find_matrices(model: PreTrainedModel, scope: Scope) -> list[list[ModelMatrix]]:
    """Per block, the matrices in scope, in the order in which the model lists them.

    Raises:
        UnsupportedModelError: the model's family is not supported.
        InvalidInputError: no such scope, or a weight that is no finite floating-point matrix.
    """
    if scope not in get_args(Scope):
        raise InvalidInputError(f"scope is {scope!r}; give one of {', '.join(get_args(Scope))}.")
    ffn = {name for site in find_ffns(model) for name in site.linears}
    blocks = []
    for prefix, block in named_blocks(model).items():
        linear = [(name, m) for name, m in block.named_modules(prefix=prefix) if is_linear(m)]
        blocks.append([ModelMatrix(name, module) for name, module in linear if scope == "all" or name in ffn])
    for matrix in (matrix for block in blocks for matrix in block):
        _check(matrix)
    return blocks


def _check(matrix: ModelMatrix) -> None:
    check_linear(matrix.module, matrix.name)
    if not bool(torch.isfinite(matrix.weight).all()):
        raise InvalidInputError(f"the weight of {matrix.name} has NaN or infinite entries; reload a sound checkpoint.")
