"""Linear layers of checkpoints up to format version 3, which had formats of their own: read, and stored anew.

In 8 bits, a weight was code * scale with one scale per output; in 4 bits, the NF4 of QLoRA (arXiv 2305.14314) with one
scale per 64 inputs. Both become 8 bits in groups: rounding NF4 to 4 bits once more would cost accuracy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.linear import bias_of, weight_of
from ..families.sites import set_module
from ..ffn.packed import PackedMatrix, expand_scale, pack
from ..runtime.linears.lowbit import GROUP_SIZE, LowBitLinear
from ..runtime.stored import Stored

#: bits per weight of what they become
NEW_BITS = 8
_NF4_GROUP = 64
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class OldLinear(Stored):
    """A linear layer as old checkpoints store it, to be loaded and then replaced: it does not multiply.

    State: `codes` [out, in] int8 with `scale` [out] bf16, or `codes` [out, columns / 2] uint8, the first of two in the
    high half, with `scale` [out, columns / 64] bf16, where `columns` is `in` rounded up to a multiple of 64; and also
    `bias` and an empty `weight`.

    Args:
        layer: the dense layer in whose place it is, whose bias it takes.
        bits: 8 or 4.
    """

    format_tensors = frozenset({"codes", "scale"})
    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Module, bits: int) -> None:
        super().__init__()
        weight, bias = weight_of(layer), bias_of(layer)
        outputs, self.inputs = weight.shape
        groups = -(-self.inputs // _NF4_GROUP)
        codes, scale, dtype = (
            ((outputs, self.inputs), (outputs,), torch.int8)
            if bits == NEW_BITS
            else ((outputs, groups * _NF4_GROUP // 2), (outputs, groups), torch.uint8)
        )
        self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        self.register_buffer("codes", torch.empty(codes, dtype=dtype, device=weight.device))
        self.register_buffer("scale", torch.empty(scale, dtype=torch.bfloat16, device=weight.device))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def dequantise(self) -> Tensor:
        """The weight [out, in] in fp32."""
        if self.codes.dtype == torch.int8:
            return self.codes.float() * self.scale.float()[:, None]
        halves = torch.stack([self.codes >> 4, self.codes & 15], -1).flatten(1)
        values = torch.tensor(_NF4, device=halves.device)[halves.int()]
        return (values * expand_scale(self.scale.float(), _NF4_GROUP, values.shape[1]))[:, : self.inputs]

    def stored_anew(self) -> LowBitLinear:
        """The layer in 8 bits, as checkpoints have it today."""
        bias = None if self.bias is None else self.bias.data
        return LowBitLinear(_in_groups(self.dequantise()), bias, self.weight.dtype)


def _in_groups(weight: Tensor) -> PackedMatrix:
    """A weight [out, in] in 8 bits, the largest of each group of inputs the outermost level."""
    inputs = weight.shape[1]
    size, top = min(GROUP_SIZE, inputs), 2**NEW_BITS - 1
    largest = F.pad(weight, (0, -inputs % size)).unflatten(1, (-1, size)).abs().amax(-1)
    scale = (largest * 2 / top).half().clamp_min(2.0**-24)
    levels = weight / expand_scale(scale.float(), size, inputs) + top / 2
    return PackedMatrix(pack(levels.round_().clamp_(0, top), NEW_BITS), scale, inputs, size)


def store_anew(model: nn.Module) -> bool:
    """Replace the old layers of a loaded model by layers of today; returns whether there were any."""
    old = {name: layer for name, layer in model.named_modules() if isinstance(layer, OldLinear)}
    for name, layer in old.items():
        set_module(model, name, layer.stored_anew())
    return bool(old)
