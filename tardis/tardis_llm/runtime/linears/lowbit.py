"""What linear layers in few bits have in common: they store codes and scales, and multiply by kernels of others.

`LowBitLinear.dequantise` and a product specify what they compute, and run wherever the kernels do not: on GPUs, and
where gradients flow. docs/linears.md says why there are the formats of `int8` and `nf4`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InvalidInputError
from ...ffn.weights import nbytes
from ..backend import differentiated
from ..cpu.operands import check_kind
from ..operators import Numbered, library, numbered
from ..stored import Stored, changing_layout, reading_layout, refuse_training
from .prepared import PreparedWeight

#: rows of a weight that are rounded at once, which bounds the working memory
_ROWS = 2048
#: tokens that are multiplied at once, which bounds the working memory too: a head has many outputs
_TOKENS = 256


class LowBitLinear(Numbered, Stored):
    """A linear layer whose weight [out, in] is stored in few bits.

    State: `codes`, `scale`, `bias` if there is one, and `weight`, which is empty but there: a loader that does not know
    TARDIS stops at its shape, where it would draw a missing weight at random.

    The first product prepares the weight for its kernel, and codes and scales are then empty; saving, copying and
    moving the layer restores them. So there is one copy of the weight at any time.

    Args:
        codes: as the subclass says.
        scale: bf16.
        bias: [out], or None.
        shape: (out, in).
        dtype: of the model, and of the empty weight.
    """

    format_tensors = frozenset({"codes", "scale"})
    bits: ClassVar[int]
    weight: Tensor
    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self._prepared: PreparedWeight | None = None
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=codes.device), requires_grad=False)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> LowBitLinear:
        """Round a weight [out, in] to the nearest codes; the bias [out] is copied.

        Raises:
            InvalidInputError: the weight is not finite.
        """
        parts = [cls.quantise(rows.float()) for rows in weight.detach().split(_ROWS)]
        codes, scale = (torch.cat(each) for each in zip(*parts, strict=True))
        if not bool(torch.isfinite(scale).all()):
            raise InvalidInputError("a weight has NaN or infinite entries; reload a sound checkpoint.")
        shape = weight.shape[0], weight.shape[1]
        return cls(codes, scale, None if bias is None else bias.detach().clone(), shape, weight.dtype)

    @classmethod
    def empty(
        cls, shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> LowBitLinear:
        """A layer of this shape (out, in) without content, which takes the bias."""
        codes, scale = (
            torch.empty(shape[0], *part.shape[1:], dtype=part.dtype, device=device)
            for part in cls.quantise(torch.zeros(1, shape[1]))
        )
        return cls(codes, scale, bias, shape, dtype)

    @staticmethod
    def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of rows [rows, in] fp32."""
        raise NotImplementedError

    def dequantise(self) -> Tensor:
        """The weight [out, in] that is stored, in fp32: the specification."""
        raise NotImplementedError

    def _prepare(self, codes: Tensor, scale: Tensor) -> PreparedWeight:
        """Choose the kernel for this processor, and put codes and scales as they are stored into its order."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., out] for x [..., in], in the dtype of x.

        Raises:
            InvalidInputError: the weight is set to train.
        """
        refuse_training([self.weight], "weights in few bits are")
        tokens = x.reshape(-1, self.in_features)
        if not tokens.is_cpu or len(tokens) == 0 or differentiated(tokens):
            y = F.linear(tokens, self.dequantise().to(x.dtype))
        elif torch.compiler.is_compiling():
            y = torch.ops.tardis.numbered_linear(tokens, self.number, self.out_features)
        else:
            y = self.product(tokens)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """x W^T by the kernel, [tokens, out] in the dtype of x [tokens, in]."""
        weight = self.prepared()
        parts = [weight.product(some) for some in x.split(_TOKENS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads and that stay in memory."""
        with reading_layout():
            return nbytes(self._prepared, self.codes, self.scale, self.bias)

    def prepared(self) -> PreparedWeight:
        """The weight ready for its kernel; from the first call on the layer has it in this order alone.

        An offloaded weight is prepared for each call: accelerate fetches codes and scales for it as they are stored.

        Raises:
            TardisError: codes or scales are not what the kernel reads.
        """
        prepared = self._prepared
        if prepared is not None:
            return prepared
        with changing_layout():
            if self._prepared is not None:  # another thread was quicker
                return self._prepared
            self._check()
            prepared = self._prepare(self.codes.data, self.scale.data)
            if not hasattr(self, "_hf_hook"):
                self._prepared = prepared
                self.codes, self.scale = self.codes.new_empty(0), self.scale.new_empty(0)
            return prepared

    def restore(self) -> None:
        """Put codes and scales back into the order in which they are stored."""
        with changing_layout():
            if self._prepared is not None:
                self.codes, self.scale = self._prepared.restored()
                self._prepared = None

    def stored(self) -> tuple[Tensor, Tensor]:
        """Codes and scales in the order in which they are stored; the layer has them in this order from now on."""
        with reading_layout():
            if self._prepared is not None:
                self.restore()
            return self.codes, self.scale

    def freeze(self) -> None:
        """Take no gradients for the weight; the bias is an ordinary parameter, and may train."""
        self.weight.requires_grad_(False)

    def _check(self) -> None:
        """Raise TardisError for codes and scales that kernels would misread."""
        like = self.quantise(torch.zeros(1, self.in_features))
        for what, tensor, row in zip(("codes", "scales"), (self.codes, self.scale), like, strict=True):
            check_kind(what, tensor, (row.dtype,), (self.out_features, *row.shape[1:]))

    def extra_repr(self) -> str:
        """Shape and bits, for people."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def _numbered_linear(x: Tensor, number: int, outputs: int) -> Tensor:
    """[tokens, outputs] for x [tokens, in], by the `LowBitLinear` of that number, without its bias."""
    layer: LowBitLinear = numbered(number)
    return layer.product(x).contiguous()


library.define("numbered_linear(Tensor x, int number, int outputs) -> Tensor")
library.impl("numbered_linear", _numbered_linear, "CPU")


@torch.library.register_fake("tardis::numbered_linear")
def _(x: Tensor, number: int, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def nonzero(scale: Tensor) -> Tensor:
    """The scales to divide a weight by: 1 in place of each 0, where there is nothing to scale."""
    return torch.where(scale == 0, 1.0, scale)
