"""Linear layers in 4 bits, the NF4 of QLoRA (arXiv 2305.14314) with one scale per 64 inputs, by bitsandbytes."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import TardisError
from .lowbit import LowBitLinear, nonzero
from .prepared import PreparedWeight

#: values of the codes, the quantiles of a normal distribution that QLoRA names
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_GROUP = 64  # input weights that share a scale
_BLOCK = 32  # rows that the kernel of bitsandbytes takes together


class Nf4Linear(LowBitLinear):
    """4 bits: weight = NF4[code] * scale, `codes` [out, columns / 2] uint8, `scale` [out, columns / 64].

    `columns` is `in`, rounded up to a multiple of 64; of two codes in a byte the first is the high half.
    """

    bits = 4

    @staticmethod
    def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [rows, columns / 2] and scales [rows, columns / 64] of rows in fp32."""
        groups = F.pad(weight, (0, -weight.shape[1] % _GROUP)).contiguous().unflatten(1, (-1, _GROUP))
        scale = groups.abs().amax(2).bfloat16()
        values = _values(weight.device)
        codes = torch.bucketize(groups / nonzero(scale.float())[..., None], (values[1:] + values[:-1]) / 2)
        return _in_bytes(codes.flatten(1).to(torch.uint8).unflatten(1, (-1, 2))), scale

    def dequantise(self) -> Tensor:
        """The weight [out, in] in fp32."""
        codes, scale = self.stored()
        values = _values(codes.device)[_halves(codes).flatten(1).int()].unflatten(1, (-1, _GROUP))
        return (values * scale.float()[..., None]).flatten(1)[:, : self.in_features]

    def _prepare(self, codes: Tensor, scale: Tensor) -> PreparedWeight:
        prepared = BitsAndBytesWeight.of if multiplies_nf4() else WrittenOutWeight
        return prepared(codes, scale, self.in_features)


@dataclass(frozen=True)
class BitsAndBytesWeight(PreparedWeight):
    """An NF4 weight for the product of bitsandbytes, which multiplies it by inputs in bf16.

    Attributes:
        codes: [rows, columns / 2] uint8; rows of zeros added to a multiple of 32, a byte has codes of two rows.
        scale: [columns / 64, rows] bf16.
        inputs: columns that are stored.
        outputs: rows that are stored.
    """

    inputs: int
    outputs: int

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, inputs: int) -> BitsAndBytesWeight:
        """Prepare codes [out, columns / 2] and scales [out, columns / 64] as they are stored, for so many inputs."""
        outputs = len(codes)
        padding = (0, 0, 0, -outputs % _BLOCK)
        codes, scale = F.pad(codes, padding), F.pad(scale, padding)
        blocks = _halves(codes).unflatten(0, (-1, _BLOCK)).transpose(1, 2).reshape(-1, 2, _BLOCK)
        codes = (blocks[:, 1] << 4 | blocks[:, 0]).view_as(codes)
        return cls(codes, scale.T.contiguous(), inputs, outputs)

    def product(self, x: Tensor) -> Tensor:
        shape = len(self.codes), 2 * self.codes.shape[1]
        padding = shape[1] - self.inputs
        x16 = F.pad(x.bfloat16(), (0, padding)) if padding else x.bfloat16()
        y = torch.ops.bitsandbytes.gemv_4bit(x16, self.codes, shape, self.scale, _values(x.device), _GROUP)
        return y[:, : self.outputs].to(x.dtype)

    def restored(self) -> tuple[Tensor, Tensor]:
        blocks = self.codes.view(-1, _BLOCK)
        halves = torch.stack([blocks & 15, blocks >> 4], 1).view(-1, self.codes.shape[1], _BLOCK, 2)
        halves = halves.transpose(1, 2).reshape(*self.codes.shape, 2)[: self.outputs]
        return _in_bytes(halves), self.scale.T[: self.outputs].contiguous()


@dataclass(frozen=True)
class WrittenOutWeight(PreparedWeight):
    """An NF4 weight that bitsandbytes writes out in full for each product, more quickly than `dequantise` would.

    Attributes:
        codes: [out, columns / 2] uint8, as they are stored.
        scale: [out, columns / 64] bf16, as they are stored.
        inputs: columns that are stored.
    """

    inputs: int

    def product(self, x: Tensor) -> Tensor:
        shape = len(self.codes), 2 * self.codes.shape[1]
        codes, scale = self.codes.flatten()[:, None], self.scale.flatten().float()
        weight = torch.ops.bitsandbytes.dequantize_4bit(codes, scale, _GROUP, "nf4", shape, x.dtype)
        return F.linear(x, weight[:, : self.inputs])

    def restored(self) -> tuple[Tensor, Tensor]:
        return self.codes, self.scale


@cache
def multiplies_nf4() -> bool:
    """Whether bitsandbytes has its product for NF4 here, which needs AVX-512 BF16; warns once if not.

    Raises:
        TardisError: the product differs from what the format says.
    """
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it recommends a package that fetches code from the hub whenever it is imported
    from bitsandbytes.functional import has_avx512bf16

    log.setLevel(level)
    if not has_avx512bf16():
        warnings.warn(
            "bitsandbytes has no product of int4 weights for this processor: each is written out in full, which is "
            "slow. Store the linear layers in int8.",
            stacklevel=2,
        )
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(70, 200, generator=generator), torch.randn(3, 200, generator=generator)
    layer = Nf4Linear.of(weight, None)
    expected, found = F.linear(x, layer.dequantise()), BitsAndBytesWeight.of(*layer.stored(), 200).product(x)
    if not torch.allclose(found, expected, atol=0.02 * float(expected.abs().max())):
        raise TardisError("bitsandbytes orders int4 weights in another way; pip install 'tardis-llm[quant]' anew.")
    return True


def _halves(codes: Tensor) -> Tensor:
    """The codes [rows, n, 2] of bytes [rows, n], the high half of each first."""
    return torch.stack([codes >> 4, codes & 15], -1)


def _in_bytes(halves: Tensor) -> Tensor:
    """The inverse of `_halves`."""
    return halves[..., 0] << 4 | halves[..., 1]


@cache
def _values(device: torch.device) -> Tensor:
    """The values of the codes; one tensor for all calls, as a CUDA graph cannot copy another to its device."""
    with torch.inference_mode(False):
        return torch.tensor(NF4, device=device)
