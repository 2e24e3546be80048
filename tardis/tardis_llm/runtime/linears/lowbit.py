"""Linear layers in few bits, for those outside the FFNs, through kernels that others wrote and that are there.

    8 bits    one scale per output; torch's own oneDNN product of int8 weights and inputs in 16 bits
    4 bits    NF4 of QLoRA (arXiv 2305.14314), one scale per 64 inputs; the product of bitsandbytes

`benchmarks/linears.py` measured what there is; docs/linears.md has the figures and why these two. What they compute is
`LowBitLinear.dequantise` and a product: that is also what runs where a kernel does not, on GPUs and under gradients.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InvalidInputError, TardisError
from ..backend import differentiated
from ..cpu.operands import check_kind
from ..operators import Numbered, library, numbered
from ..stored import Stored, changing_layout, reading_layout, refuse_training

#: rows that are rounded at once, which bounds the working memory
_ROWS = 2048
#: tokens that are multiplied at once, for the same reason: a head has many outputs
_TOKENS = 256
#: values of the codes of NF4, the quantiles of a normal distribution that QLoRA names
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_GROUP = 64  # input weights that share a scale of NF4
_BLOCK = 32  # rows that the kernel of bitsandbytes takes together
_TINY = 1e-30  # to divide zeros by


class LowBitLinear(Numbered, Stored):
    """A linear layer whose weight [out, in] is stored in few bits.

    State: `codes`, `scale`, `bias` if there is one, and `weight`, which is empty but there: a loader that does not know
    TARDIS stops at its shape, where it would draw a missing weight at random.

    The kernels want the codes in an order of their own. They are put into it by the first product, and back when the
    layer is saved, copied or moved, so that there is one copy of them at any time.

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
        self._packed: tuple[Tensor, ...] | None = None
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=codes.device), requires_grad=False)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> LowBitLinear:
        """Round a weight [out, in] to the nearest; the bias [out] is copied.

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

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] for x [..., in], in the dtype of x."""
        if torch.is_grad_enabled():
            refuse_training([self.weight], "weights in few bits are")
        tokens = x.reshape(-1, self.in_features)
        if not self._takes(tokens):
            y = F.linear(tokens, self.dequantise().to(x.dtype))
        elif torch.compiler.is_compiling():
            y = torch.ops.tardis.numbered_linear(tokens, self.number, self.out_features)
        else:
            y = self.products(tokens)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _takes(self, x: Tensor) -> bool:
        """Whether the kernel takes x [tokens, in]: in main memory, and without gradients."""
        return x.device.type == "cpu" and len(x) > 0 and not differentiated(x)

    def products(self, x: Tensor) -> Tensor:
        """[tokens, out] in the dtype of x [tokens, in], by the kernel and without the bias."""
        parts = [self._product(some) for some in x.split(_TOKENS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _product(self, x: Tensor) -> Tensor:
        """The same for a few tokens."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads and that stay in memory, in whatever order the codes are."""
        with reading_layout():
            weight = self._packed or (self.codes, self.scale)
        return sum(part.nbytes for part in (*weight, self.bias) if part is not None)

    def packed(self) -> tuple[Tensor, ...]:
        """Codes and scales as the kernel takes them; from the first call on they are kept so, and only so.

        Offloaded ones are put in order for each call: accelerate fetches them for it as they are stored.
        """
        packed = self._packed
        if packed is not None:
            return packed
        with changing_layout():
            if self._packed is not None:  # another thread was quicker
                return self._packed
            self._check(self.codes, self.scale)
            packed = self._pack(self.codes, self.scale)
            if not hasattr(self, "_hf_hook"):
                self._packed = packed
                self.codes, self.scale = self.codes.new_empty(0), self.scale.new_empty(0)
            return packed

    def restore(self) -> None:
        """Put codes and scales back into the order in which they are stored."""
        with changing_layout():
            if self._packed is not None:
                self.codes, self.scale = self._unpack(*self._packed)
                self._packed = None

    def stored(self) -> tuple[Tensor, Tensor]:
        """Codes and scales in the order in which they are stored."""
        with reading_layout():
            if self._packed is not None:
                self.restore()
            return self.codes, self.scale

    def freeze(self) -> None:
        """Take no gradients for the weight; the bias is an ordinary one."""
        self.weight.requires_grad_(False)

    def _pack(self, codes: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """For the kernel."""
        raise NotImplementedError

    def _unpack(self, *packed: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `_pack`."""
        raise NotImplementedError

    def _check(self, codes: Tensor, scale: Tensor) -> None:
        """Raise TardisError for codes and scales that kernels would misread."""
        like = self.quantise(torch.zeros(1, self.in_features))
        shapes = [(self.out_features, *part.shape[1:]) for part in like]
        check_kind("codes", codes, (like[0].dtype,), shapes[0])
        check_kind("scales", scale, (like[1].dtype,), shapes[1])

    def extra_repr(self) -> str:
        """Shape and bits, for people."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def _numbered_linear(x: Tensor, number: int, outputs: int) -> Tensor:
    """[tokens, outputs] for x [tokens, in], by the `LowBitLinear` of that number, without its bias."""
    layer: LowBitLinear = numbered(number)
    return layer.products(x).contiguous()


library.define("numbered_linear(Tensor x, int number, int outputs) -> Tensor")
library.impl("numbered_linear", _numbered_linear, "CPU")


@torch.library.register_fake("tardis::numbered_linear")
def _(x: Tensor, number: int, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


class Int8Linear(LowBitLinear):
    """8 bits: weight = codes * scale, `codes` [out, in] int8 from -127 to 127, `scale` [out].

    The inputs of each token are rounded to 16 bits and multiplied as two rows of 8: outliers, which inputs of large
    models have, would leave nothing of the others in 8 bits. It costs little, since reading weights takes the time.
    """

    bits = 8

    @staticmethod
    def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [rows, in] and scales [rows] of rows in fp32."""
        scale = (weight.abs().amax(1) / 127).bfloat16()
        codes = (weight / _nonzero(scale.float())[:, None]).round_().clamp_(-127, 127)
        return codes.to(torch.int8), scale

    def dequantise(self) -> Tensor:
        """[out, in] fp32."""
        codes, scale = self.stored()
        return codes.float() * scale.float()[:, None]

    def _pack(self, codes: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        self._check(codes, scale)
        if not exact_in_int8():
            return F.pad(codes.data, (0, -self.in_features % _BLOCK)), scale.data
        packed = torch.ops.onednn.qlinear_prepack(codes.data.clone(), None)
        return packed, scale.data.float(), torch.zeros(len(scale), dtype=torch.int32)

    def _unpack(self, *packed: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale, *zero = packed
        if not zero:
            return codes[:, : self.in_features].contiguous(), scale
        return codes.to_dense().T.contiguous(), scale.bfloat16()

    def _product(self, x: Tensor) -> Tensor:
        codes, scale, *zero = self.packed()
        if not zero:
            x = F.pad(x, (0, codes.shape[1] - self.in_features))
            return torch.ops.aten._weight_int8pack_mm(x, codes, scale.to(x.dtype))
        step = (x.abs().amax(1, keepdim=True).float() / (127 * 256)).clamp_min(_TINY)
        whole = (x / step + 128.5 * 256).round_().to(torch.uint16)  # its bytes: x / step = 256 (high - 128) + low - 128
        rows = whole.view(torch.uint8).unflatten(1, (-1, 2)).permute(2, 0, 1).flatten(0, 1)
        low, high = _onednn(rows, codes, scale, zero[0]).chunk(2)
        return torch.add(low, high, alpha=256).mul_(step).to(x.dtype)


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
        values = torch.tensor(NF4)
        codes = torch.bucketize(groups / _nonzero(scale.float())[..., None], (values[1:] + values[:-1]) / 2)
        codes = codes.flatten(1).to(torch.uint8)
        return codes[:, ::2] << 4 | codes[:, 1::2], scale

    def dequantise(self) -> Tensor:
        """[out, in] fp32."""
        stored, scale = self.stored()
        codes = torch.stack([stored >> 4, stored & 15], -1).flatten(1)
        values = _values(codes.device)[codes.int()].unflatten(1, (-1, _GROUP))
        return (values * scale.float()[..., None]).flatten(1)[:, : self.in_features]

    def _pack(self, codes: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        self._check(codes, scale)
        padding = (0, 0, 0, -len(codes) % _BLOCK)
        codes, scale = F.pad(codes.data, padding), F.pad(scale.data, padding)
        halves = torch.stack([codes >> 4, codes & 15], -1)  # [rows, columns / 2, 2]
        blocks = halves.unflatten(0, (-1, _BLOCK)).transpose(1, 2).reshape(-1, 2, _BLOCK)
        return (blocks[:, 1] << 4 | blocks[:, 0]).view_as(codes), scale.T.contiguous()

    def _unpack(self, *packed: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = packed
        blocks = codes.view(-1, _BLOCK)
        halves = torch.stack([blocks & 15, blocks >> 4], 1).view(-1, codes.shape[1], _BLOCK, 2)
        halves = halves.transpose(1, 2).reshape(*codes.shape, 2)[: self.out_features]
        return halves[..., 0] << 4 | halves[..., 1], scale.T[: self.out_features].contiguous()

    def _product(self, x: Tensor) -> Tensor:
        return self.by_kernel(x) if multiplies_nf4() else F.linear(x, self._written_out(x.dtype))

    def by_kernel(self, x: Tensor) -> Tensor:
        """[tokens, out] in the dtype of x, by the product of bitsandbytes."""
        codes, scale = self.packed()
        columns = 2 * codes.shape[1]
        padding = columns - self.in_features
        x16 = F.pad(x.bfloat16(), (0, padding)) if padding else x.bfloat16()
        y = torch.ops.bitsandbytes.gemv_4bit(x16, codes, (len(codes), columns), scale, _values(x.device), _GROUP)
        return y[:, : self.out_features].to(x.dtype)

    def _written_out(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in a dtype, by bitsandbytes, which is quicker at it than `dequantise`."""
        codes, scale = self.stored()
        shape = self.out_features, 2 * codes.shape[1]
        codes, scale = codes.flatten()[:, None], scale.flatten().float()
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scale, _GROUP, "nf4", shape, dtype)
        return weight[:, : self.in_features]


#: bits -> what stores a linear layer in them
KINDS: dict[int, type[LowBitLinear]] = {kind.bits: kind for kind in (Int8Linear, Nf4Linear)}


def _nonzero(scale: Tensor) -> Tensor:
    """To divide by: 1 where there is nothing to scale."""
    return torch.where(scale == 0, 1.0, scale)


def _onednn(rows: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(rows - 128) codes^T scale in fp32, for rows [n, in] in uint8 and prepacked codes."""
    product = torch.ops.onednn.qlinear_pointwise
    y: Tensor = product(rows, 1.0, 128, codes, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return y


@cache
def exact_in_int8() -> bool:
    """Whether oneDNN's int8 product is exact here: without VNNI instructions it may saturate, and is not used."""
    features = torch.cpu.get_capabilities()
    if not (features.get("avx512_vnni") or features.get("avx_vnni")):
        return False
    rows, codes = torch.full((2, 64), 255, dtype=torch.uint8), torch.full((32, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    y = _onednn(rows, packed, torch.ones(32), torch.zeros(32, dtype=torch.int32))
    return bool((y == 127.0 * 127 * 64).all())


@cache
def multiplies_nf4() -> bool:
    """Whether bitsandbytes has its product for NF4 here, which needs AVX-512 BF16; says so once if not.

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
    layer = Nf4Linear(*Nf4Linear.quantise(weight), None, (70, 200), x.dtype)
    expected = F.linear(x, layer.dequantise())
    if not torch.allclose(layer.by_kernel(x), expected, atol=0.02 * float(expected.abs().max())):
        raise TardisError("bitsandbytes orders int4 weights in another way; pip install 'tardis-llm[quant]' anew.")
    return True


@cache
def _values(device: torch.device) -> Tensor:
    """The values of the codes; one tensor for all calls, as a CUDA graph cannot copy another to its device."""
    with torch.inference_mode(False):
        return torch.tensor(NF4, device=device)
