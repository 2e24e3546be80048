"""Linear layers in few bits: a matrix as folds have them, with one scale per group of inputs, through the same kernels.

`PackedMatrix.dequantise` and a product specify what they compute, and run wherever kernels do not, as where gradients
flow. docs/linears.md says how fast they are, and how accurate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...config import STACKED_BITS
from ...errors import InvalidInputError
from ...ffn.packed import PackedMatrix
from ...ffn.weights import Matrix, nbytes
from ..backend import REFERENCE, backend_for, linear
from ..cpu.operands import check_kind
from ..matrices import LowBit
from ..operators import Numbered, library, numbered
from ..stored import changing_layout, reading_layout, refuse_training

#: bits per weight that there may be
BITS = STACKED_BITS
#: inputs that share a scale unless a user asks for another number: see docs/linears.md
GROUP_SIZE = 64


class LowBitLinear(Numbered, LowBit):
    """A linear layer whose weight [out, in] is stored in few bits.

    State: `planes` [out, bits, ceil(in / 8)] uint8 and `scale` [out, groups] fp16, as `PackedMatrix` has them; `bias`,
    if there is one; and `weight`, which is empty but there: a loader that does not know TARDIS stops at its shape,
    where it would draw a missing weight at random.

    The first product lays the matrix out for its kernel, and planes and scales are then empty; saving, copying and
    moving the layer restores them. So there is one copy of the weight at any time.

    Args:
        matrix: the weight.
        bias: [out], or None.
        dtype: of the model, and of the empty weight.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(matrix)
        self.out_features, self.in_features, self.bits = len(matrix.planes), matrix.columns, matrix.bits
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=matrix.planes.device), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        bias: Tensor | None,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LowBitLinear:
        """A layer of this shape (out, in) without content, which takes the bias."""
        return cls(PackedMatrix.empty(*shape, bits, min(group_size, shape[1]), device), bias, dtype)

    def dequantise(self) -> Tensor:
        """The weight [out, in] that is stored, in fp32: the specification."""
        matrix = self.matrix
        assert isinstance(matrix, PackedMatrix), "a matrix in few bits is stored in few bits"
        return matrix.dequantise()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Outputs [..., out] for x [..., in], in the dtype of x.

        Raises:
            InvalidInputError: the weight is set to train.
        """
        refuse_training([self.weight], "weights in few bits are")
        if torch.compiler.is_compiling() and backend_for(x, self.bias) is not REFERENCE:
            tokens = x.reshape(-1, self.in_features)
            y: Tensor = torch.ops.tardis.numbered_linear(tokens, self.number, self.out_features)
            return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)
        return linear(x, self.prepared(x), self.bias)

    def prepared(self, x: Tensor) -> Matrix:
        """The weight as its kernel reads it for inputs like x; from the first call on the layer has it so alone.

        An offloaded weight stays as it is stored: accelerate fetches it for each call.

        Raises:
            TardisError: planes or scales are not what kernels read.
        """
        layout = self._layout
        if layout is not None or backend_for(x) is REFERENCE or hasattr(self, "_hf_hook"):
            return layout or self.current
        with changing_layout():  # what another thread restores meanwhile is not what this call gets
            self._check()
            self.lay_out(x.dtype)
            return self.current

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads and that stay in memory."""
        with reading_layout():
            return nbytes(self.current, self.bias)

    def freeze(self) -> None:
        """Take no gradients for the weight; the bias is an ordinary parameter, and may train."""
        self.weight.requires_grad_(False)

    def extra_repr(self) -> str:
        """Shape and bits, for people."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"

    def _check(self) -> None:
        """Raise TardisError for planes and scales that kernels would misread."""
        rows, columns = self.out_features, self.in_features
        with reading_layout():
            check_kind("planes", self.planes, (torch.uint8,), (rows, self.bits, -(-columns // 8)))
            check_kind("scales", self.scale, (torch.float16,), (rows, -(-columns // self.group_size)))


def _numbered_linear(x: Tensor, number: int, outputs: int) -> Tensor:
    """[tokens, outputs] for x [tokens, in], by the `LowBitLinear` of that number, without its bias."""
    layer: LowBitLinear = numbered(number)
    return linear(x, layer.prepared(x), None).contiguous()


library.define("numbered_linear(Tensor x, int number, int outputs) -> Tensor")
library.impl("numbered_linear", _numbered_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("tardis::numbered_linear")
def _(x: Tensor, number: int, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def check_bits(bits: int) -> None:
    """Raise InvalidInputError where no layer stores its weight in so many bits."""
    if bits not in BITS:
        raise InvalidInputError(f"linear layers in {bits} bits are asked for; give one of {list(BITS)}.")
