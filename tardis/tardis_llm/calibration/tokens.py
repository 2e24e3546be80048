"""The tokens that an FFN sees of a text, and parts of them: chunks whose temporaries stay small, or a spread sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

#: tokens of a chunk: enough for efficient matrix products, few enough that temporaries stay below 16 MiB
_CHUNK_TOKENS, _CHUNK_ELEMENTS = 512, 2**22


def chunk_size(width: int) -> int:
    """How many tokens at once have [tokens, width] temporaries that stay small."""
    return min(_CHUNK_TOKENS, max(1, _CHUNK_ELEMENTS // width))


def chunks(x: Tensor, width: int) -> Iterator[Tensor]:
    """Split x [tokens, ...] into chunks whose [chunk, width] temporaries stay small."""
    return iter(x.split(chunk_size(width)))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` in fp32 for x [tokens, in], weight [out, in] and bias [out] in fp32.

    Inputs in bf16, which are what a model in bf16 gives, are multiplied in bf16 where the processor is made for it, as
    GPUs are: several times as fast, and rounded by far less than any low-bit copy.
    """
    if x.dtype == torch.bfloat16 and (not x.is_cpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        y = F.linear(x, weight.bfloat16()).float()
        return y if bias is None else y + bias
    return F.linear(x.float(), weight, bias)


@dataclass(frozen=True)
class Tokens:
    """What an FFN sees of a text, and what is wanted of it.

    Attributes:
        x: [tokens, d] inputs, in any float dtype.
        target: [tokens, d] outputs wanted; None for those of the dense FFN at x.
        weight: [tokens] fp32, by which a token's squared error counts; None for 1.
        computed_on: where chunks of them go; None for where they are. All tokens together may be too many for it.
    """

    x: Tensor
    target: Tensor | None = None
    weight: Tensor | None = None
    computed_on: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where chunks are, and what is computed with them."""
        return self.computed_on or self.x.device

    def chunks(self, width: int) -> Iterator[Tokens]:
        """The tokens in parts whose [tokens, width] temporaries stay small, on the device."""
        size = chunk_size(width)
        for start in range(0, len(self.x), size):
            yield self._at(slice(start, start + size))._moved()

    def spread(self, count: int) -> Tokens:
        """At most `count` of the tokens, at even steps; all where there are no more."""
        return self._at(slice(None, None, max(1, -(-len(self.x) // count))))

    def _at(self, tokens: slice) -> Tokens:
        target, weight = (None if part is None else part[tokens] for part in (self.target, self.weight))
        return replace(self, x=self.x[tokens], target=target, weight=weight)

    def _moved(self) -> Tokens:
        target, weight = (None if part is None else part.to(self.device) for part in (self.target, self.weight))
        return replace(self, x=self.x.to(self.device), target=target, weight=weight)
