"""Whole models of a shape on a GPU, one token at a time, with random weights; see `gpu.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_layers import (
    BF16,
    Linear,
    Shape,
    Step,
    dense_linear,
    dense_step,
    ffn_step,
    int4_linears,
    layers_of,
    low_bit_linear,
)

CONTEXT = 512  #: keys and values that attention reads for each token


def attention(shape: Shape, linear: Linear) -> Step:
    """Attention of new tokens, each of another sequence, to what is kept of `CONTEXT` tokens."""
    d, kv, heads = shape.d, shape.kv, shape.d // (64 if shape.kv == 64 else 128)
    size = d // heads
    into, out = linear(d + 2 * kv, d), linear(d, d)
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def run(x: Tensor) -> Tensor:
        if len(x) not in cache:
            kept = (torch.randn(len(x), kv // size, CONTEXT, size, dtype=BF16, device="cuda") for _ in range(2))
            cache[len(x)] = tuple(kept)  # type: ignore[assignment]
        keys, values = cache[len(x)]
        q = into(x)[:, :d].reshape(len(x), heads, 1, size)
        y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return out(y.reshape(len(x), d))

    return run


def decoder(shape: Shape, ffns: Sequence[Step], linear: Linear) -> Step:
    """One token of a model for each row of its inputs [batch, d], to logits."""
    blocks = [(attention(shape, linear), ffn) for ffn in ffns]
    head = linear(shape.vocabulary, shape.d)

    def run(x: Tensor) -> Tensor:
        for attend, ffn in blocks:
            x = x + attend(F.rms_norm(x, x.shape[-1:]))
            x = x + ffn(F.rms_norm(x, x.shape[-1:]))
        return head(F.rms_norm(x, x.shape[-1:]))

    return run


def models(shape: Shape, count: int) -> Iterator[tuple[str, Step]]:
    """Whole models with so many layers: dense in bf16 and int4, by our kernels and torch's, and folded beside both."""
    layers = layers_of(shape, None, count)
    yield "dense bf16", decoder(shape, [dense_step(layer.dense) for layer in layers if layer.dense], dense_linear)
    yield "folded bf16", decoder(shape, [layer.folded for layer in layers], dense_linear)
    del layers
    for name, linear in int4_linears().items():
        yield f"dense int4{name}", decoder(shape, [ffn_step(shape, linear) for _ in range(count)], linear)
    yield "folded int4", decoder(shape, [layer.folded for layer in layers_of(shape, 4, count)], low_bit_linear)
