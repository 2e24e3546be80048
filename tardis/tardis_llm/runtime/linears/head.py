"""The head in few bits: a predictor gives all logits, and the rows of the greatest are computed with all their bits.

    p = x P^T + b
    y_i = p_i + x . R_i where p_i is among the greatest, else p_i

P is the weight rounded to half of the bits that other layers have, and R is what that leaves, in few bits, too. So a
token reads P, and of R the rows that count: as the predictor of a folded FFN finds the neurons that count. SVD-softmax
(Shim and others, NIPS 2017) previews logits by some singular values instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ffn.packed import PackedMatrix
from ...ffn.weights import Matrix, kind, nbytes, written_out
from ..backend import REFERENCE, backend_for, predicted_head
from ..cpu.operands import HEAD_ROWS
from ..matrices import LowBit
from ..operators import Numbered, library, numbered
from ..stored import Stored, changing_layout, reading_layout, refuse_training

#: bits per weight of the remainder
REMAINDER_BITS = 4
#: for half of the groups of rows, one of their logits at least is computed with all bits, on the mean 1.4 of them
_SHARE = 2 * HEAD_ROWS


def top_of(vocabulary: int) -> int:
    """`top` for a vocabulary: see `predicted_head`."""
    return -(-vocabulary // _SHARE)


class PredictedHead(Numbered, Stored):
    """A linear layer [out, in] that gives logits, by a predictor and a remainder in few bits.

    State: `predictor` and `remainder`, each with `planes` and `scale` as `LowBit` has them; `bias`, if there is one;
    and an empty `weight`, as `LowBitLinear` has it.

    Args:
        predictor: of the weight, [out, in].
        remainder: what it leaves of the weight.
        bias: [out], or None.
        top: says which logits are the greatest: see `predicted_head`.
        dtype: of the model, and of the empty weight.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, predictor: PackedMatrix, remainder: PackedMatrix, bias: Tensor | None, top: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.top = len(predictor.planes), predictor.columns, top
        self.predictor, self.remainder = LowBit(predictor), LowBit(remainder)
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=predictor.planes.device), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        bias: Tensor | None,
        bits: tuple[int, int],
        group_size: int,
        top: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PredictedHead:
        """A head of this shape (out, in) without content, with so many bits of predictor and remainder."""
        first, rest = (PackedMatrix.empty(*shape, each, min(group_size, shape[1]), device) for each in bits)
        return cls(first, rest, bias, top, dtype)

    @property
    def bits(self) -> tuple[int, int]:
        """Bits per weight of predictor and remainder."""
        first, rest = (kind(part.current)[1] for part in (self.predictor, self.remainder))
        return first, rest

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.predictor.group_size

    def dequantise(self) -> Tensor:
        """The weight [out, in] with all its bits, in fp32."""
        first, rest = (written_out(part.current) for part in (self.predictor, self.remainder))
        return first + rest

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., out] for x [..., in], in the dtype of x.

        Raises:
            InvalidInputError: the weight is set to train.
        """
        refuse_training([self.weight], "weights in few bits are")
        if torch.compiler.is_compiling() and backend_for(x, self.bias) is not REFERENCE:
            tokens = x.reshape(-1, self.in_features)
            y: Tensor = torch.ops.tardis.numbered_head(tokens, self.number, self.out_features)
            return y.view(*x.shape[:-1], self.out_features)
        return predicted_head(x, *self.prepared(x), self.bias, self.top)

    def prepared(self, x: Tensor) -> tuple[Matrix, Matrix]:
        """Predictor and remainder as the kernels read them for inputs like x; as they are stored if offloaded."""
        if backend_for(x) is not REFERENCE and not hasattr(self.predictor, "_hf_hook"):
            self.lay_out(x.dtype)
        return self.predictor(), self.remainder()  # called, so that what is offloaded comes

    def lay_out(self, dtype: torch.dtype) -> None:
        """Put both matrices into the order in which their kernel reads them for inputs of a dtype."""
        with changing_layout():
            self.predictor.lay_out(dtype)
            self.remainder.lay_out(dtype, by_rows=True)

    @property
    def nbytes(self) -> int:
        """Bytes that stay in memory."""
        with reading_layout():
            return nbytes(self.predictor.current, self.remainder.current, self.bias)

    @property
    def touched(self) -> float:
        """Bytes that one token reads, where the greatest logits are those of any rows."""
        groups = max(self.top, self.out_features / HEAD_ROWS)
        share = 1 - (1 - self.top / groups) ** (1 / HEAD_ROWS)
        with reading_layout():
            return nbytes(self.predictor.current, self.bias) + share * self.remainder.current.nbytes

    def freeze(self) -> None:
        """Take no gradients for the weight; the bias is an ordinary parameter, and may train."""
        self.weight.requires_grad_(False)

    def extra_repr(self) -> str:
        """Shape and `top`, for people."""
        return f"in_features={self.in_features}, out_features={self.out_features}, top={self.top}"


def _numbered_head(x: Tensor, number: int, outputs: int) -> Tensor:
    """[tokens, outputs] for x [tokens, in], by the `PredictedHead` of that number."""
    head: PredictedHead = numbered(number)
    return predicted_head(x, *head.prepared(x), head.bias, head.top).contiguous()


library.define("numbered_head(Tensor x, int number, int outputs) -> Tensor")
library.impl("numbered_head", _numbered_head, "CompositeExplicitAutograd")


@torch.library.register_fake("tardis::numbered_head")
def _(x: Tensor, number: int, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)
