"""Linear layers in 8 bits, one scale per output, by torch's own kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowbit import LowBitLinear, nonzero
from .prepared import PreparedWeight

_COLUMNS = 32  # torch's int8 product takes a multiple of so many inputs
_TINY = 1e-30  # in place of 0, to divide a token of zeros by


class Int8Linear(LowBitLinear):
    """8 bits: weight = codes * scale, `codes` [out, in] int8 from -127 to 127, `scale` [out]."""

    bits = 8

    @staticmethod
    def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [rows, in] and scales [rows] of rows in fp32."""
        scale = (weight.abs().amax(1) / 127).bfloat16()
        codes = (weight / nonzero(scale.float())[:, None]).round_().clamp_(-127, 127)
        return codes.to(torch.int8), scale

    def dequantise(self) -> Tensor:
        """The weight [out, in] in fp32."""
        codes, scale = self.stored()
        return codes.float() * scale.float()[:, None]

    def _prepare(self, codes: Tensor, scale: Tensor) -> PreparedWeight:
        return OneDnnWeight.of(codes, scale) if exact_in_int8() else TorchInt8Weight.of(codes, scale)


@dataclass(frozen=True)
class OneDnnWeight(PreparedWeight):
    """An int8 weight for oneDNN's product, on processors where it is exact.

    The inputs of each token are rounded to 16 bits and multiplied as two rows of 8: outliers, which inputs of large
    models have, would leave nothing of the others in 8 bits. It costs little, since reading weights takes the time.

    Attributes:
        codes: [in, out] int8, in an order that only oneDNN knows.
        scale: [out] fp32.
        zero: [out] int32, the zero points, all 0.
    """

    zero: Tensor

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor) -> OneDnnWeight:
        """Prepare codes [out, in] and scales [out]."""
        prepacked = torch.ops.onednn.qlinear_prepack(codes.clone(), None)
        return cls(prepacked, scale.float(), torch.zeros(len(scale), dtype=torch.int32))

    def product(self, x: Tensor) -> Tensor:
        step = (x.abs().amax(1, keepdim=True).float() / (127 * 256)).clamp_min(_TINY)
        whole = (x / step + 128.5 * 256).round_().to(torch.uint16)  # its bytes: x / step = 256 (high - 128) + low - 128
        rows = whole.view(torch.uint8).unflatten(1, (-1, 2)).permute(2, 0, 1).flatten(0, 1)
        low, high = self.product_of_bytes(rows).chunk(2)
        return torch.add(low, high, alpha=256).mul_(step).to(x.dtype)

    def product_of_bytes(self, rows: Tensor) -> Tensor:
        """(rows - 128) W^T, [n, out] fp32, for rows [n, in] uint8."""
        weight, product = (self.codes, self.scale, self.zero), torch.ops.onednn.qlinear_pointwise
        y: Tensor = product(rows, 1.0, 128, *weight, None, 1.0, 0, torch.float32, "none", [], "")
        return y

    def restored(self) -> tuple[Tensor, Tensor]:
        return self.codes.to_dense().T.contiguous(), self.scale.bfloat16()


@dataclass(frozen=True)
class TorchInt8Weight(PreparedWeight):
    """An int8 weight for torch's product with inputs in floating point, which is exact on every processor.

    Attributes:
        codes: [out, columns] int8, columns of zeros added to a multiple of 32.
        scale: [out] bf16.
        inputs: columns that are stored.
    """

    inputs: int

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor) -> TorchInt8Weight:
        """Prepare codes [out, in] and scales [out]."""
        inputs = codes.shape[1]
        return cls(F.pad(codes, (0, -inputs % _COLUMNS)), scale, inputs)

    def product(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, self.codes.shape[1] - self.inputs))
        return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scale.to(x.dtype))

    def restored(self) -> tuple[Tensor, Tensor]:
        return self.codes[:, : self.inputs].contiguous(), self.scale


@cache
def exact_in_int8() -> bool:
    """Whether oneDNN's int8 product is exact here: without VNNI instructions it may saturate, and is not used."""
    features = torch.cpu.get_capabilities()
    if not (features.get("avx512_vnni") or features.get("avx_vnni")):
        return False
    weight = OneDnnWeight.of(torch.full((32, 64), 127, dtype=torch.int8), torch.ones(32))
    y = weight.product_of_bytes(torch.full((2, 64), 255, dtype=torch.uint8))
    return bool((y == 127.0 * 127 * 64).all())
