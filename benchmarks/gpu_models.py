"""Whole models of a shape on a GPU, one token at a time, with random weights; see `gpu.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_layers import BF16, Shape, Step, codes, dense_matrix, dense_step, layers_of, low_bit_step
from tardis_llm.runtime.triton.backend import product

CONTEXT = 512  #: keys and values that attention reads for each token


def attention(shape: Shape, bits: int | None) -> Step:
    """Attention of new tokens, each of another sequence, to what is kept of `CONTEXT` tokens."""
    d, kv, heads = shape.d, shape.kv, shape.d // (64 if shape.kv == 64 else 128)
    size = d // heads
    wanted = [(d + 2 * kv, d), (d, d)]
    into, out = (codes(*each, 4) if bits else dense_matrix(*each) for each in wanted)
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def run(x: Tensor) -> Tensor:
        if len(x) not in cache:
            kept = (torch.randn(len(x), kv // size, CONTEXT, size, dtype=BF16, device="cuda") for _ in range(2))
            cache[len(x)] = tuple(kept)  # type: ignore[assignment]
        keys, values = cache[len(x)]
        q = product(x, into, None)[:, :d].reshape(len(x), heads, 1, size)
        y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return product(y.reshape(len(x), d), out, None)

    return run


def decoder(shape: Shape, ffns: Sequence[Step], bits: int | None) -> Step:
    """One token of a model for each row of its inputs [batch, d], to logits."""
    blocks = [(attention(shape, bits), ffn) for ffn in ffns]
    head = codes(shape.vocabulary, shape.d, 4) if bits else dense_matrix(shape.vocabulary, shape.d)

    def run(x: Tensor) -> Tensor:
        for attend, ffn in blocks:
            x = x + attend(F.rms_norm(x, x.shape[-1:]))
            x = x + ffn(F.rms_norm(x, x.shape[-1:]))
        return product(F.rms_norm(x, x.shape[-1:]), head, None)

    return run


def models(shape: Shape, count: int) -> Iterator[tuple[str, Step]]:
    """Whole models with so many layers: dense in bf16 and int4, folded beside bf16 and stacked on int4."""
    layers = layers_of(shape, None, count)
    yield "dense bf16", decoder(shape, [dense_step(layer.dense) for layer in layers if layer.dense], None)
    yield "folded bf16", decoder(shape, [layer.folded for layer in layers], None)
    del layers
    yield "dense int4", decoder(shape, [low_bit_step(shape) for _ in range(count)], 4)
    yield "folded int4", decoder(shape, [layer.folded for layer in layers_of(shape, 4, count)], 4)
