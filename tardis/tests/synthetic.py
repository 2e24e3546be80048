"""Made-up statistics: correlated inputs, random FFNs, binned neurons, and folds of them with chosen ranges."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor

from tardis_llm.calibration.moments import SecondMoments
from tardis_llm.calibration.neurons import BinnedMoments
from tardis_llm.config import FoldConfig
from tardis_llm.ffn.activations import ACTIVATIONS, named
from tardis_llm.ffn.neuron import Neurons, value
from tardis_llm.ffn.packed import PackedMatrix, pack
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights, Storage
from tardis_llm.folding.fold import FoldQuality, Inputs, choose_ranges, finish, predict
from tardis_llm.folding.rounding import quantise
from tardis_llm.folding.stack import quantise_fallback, store_fold

Act = Callable[[Tensor], Tensor]

XIELU = named("xielu", 0.9, 1.2, 0.5, -1e-6)
#: an activation of every kind
NAMES = [*ACTIVATIONS, XIELU]

#: the same examples on every run, and no time limit on a busy machine
quick = settings(max_examples=25, deadline=None, derandomize=True)


def generator(seed: int) -> torch.Generator:
    """A generator that starts at `seed`."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, fp32."""
    return torch.randn(shape, generator=generator(seed))


def correlated(tokens: int, d: int, seed: int = 0) -> Tensor:
    """Inputs [tokens, d] in four clusters, with a decaying spectrum that is rotated, and a mean that is not zero.

    The clusters matter: for normal inputs the lines of single neurons would make the best affine map already. All
    but the draw of the tokens is the same for every seed, so that seeds give different tokens of one distribution.
    """
    spread = torch.logspace(0.3, -1, d)
    cluster = torch.randint(4, (tokens,), generator=generator(seed))
    return (normal(tokens, d, seed=seed) * spread) @ _rotation(d) + normal(4, d, seed=2000 + d)[cluster]


@functools.cache
def _rotation(d: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=1000 + d)).Q


def random_ffn(d: int, h: int, activation: str = "gelu", seed: int = 0, k: int = 1) -> DenseFFN:
    """An FFN whose neurons are mostly off, as trained ones are; k: up-projections of each."""
    return DenseFFN(
        normal(k * h, d, seed=seed) / d**0.5,
        0.3 * normal(k * h, seed=seed + 1) - 0.5,
        normal(d, h, seed=seed + 2) / h**0.5,
        0.1 * normal(d, seed=seed + 3),
        activation,
    )


def forward(ffn: DenseFFN, x: Tensor) -> Tensor:
    """The dense FFN in fp64."""
    a = value(x.double() @ ffn.w1.double().T + ffn.b1.double(), ffn.act, ffn.k)
    return a @ ffn.w2.double().T + ffn.b2.double()


def second_moments(x: Tensor, y: Tensor) -> SecondMoments:
    """Moments of x beside y, taken at once."""
    moments = SecondMoments.zeros(x.shape[1], y.shape[1])
    moments.add(x, y)
    return moments


def binned(u: Tensor, z: Tensor, name: str, like: BinnedMoments | None = None) -> BinnedMoments:
    """Binned moments of neurons [tokens, h] of the activation `name` in bins around u, or in those of `like`."""
    if like is None:
        moments = BinnedMoments.around(name, u.mean(0), u.std(0))
    else:
        moments = BinnedMoments(name, like.edge, like.width, torch.zeros_like(like.sums))
    moments.add(u, z)
    return moments


def bin_of(moments: BinnedMoments, u: Tensor) -> Tensor:
    """[tokens, h] number of the bin of each u, by comparing with the edges."""
    inner = moments.edges()[:, 1:-1]
    return (u[:, :, None] >= inner).sum(-1)


def residuals(act: Act, z: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """act(z) - slope z - offset in fp64, for z [tokens, h]."""
    z = z.double()
    return act(z) - slope.double() * z - offset.double()


def folded_with(ffn: DenseFFN, low: Tensor, high: Tensor, dtype: torch.dtype = torch.float32) -> FoldedWeights:
    """The fold of random lines, unfitted, with a 4-bit predictor and the given ranges [h]."""
    neurons = lines(ffn, low, high)
    w2 = ffn.w2.repeat(1, ffn.k) * neurons.slope  # [d, k h]
    weight = w2 @ ffn.w1
    bias = w2 @ ffn.b1 + ffn.w2 @ neurons.offset + ffn.b2
    return FoldedWeights(weight.to(dtype), bias.to(dtype), quantise(ffn.w1, 4, 16), neurons)


def lines(ffn: DenseFFN, low: Tensor, high: Tensor) -> Neurons:
    """Random lines of an FFN's neurons, the same for every activation, with the given ranges [h]."""
    slope, offset = 0.3 + 0.2 * normal(len(ffn.w1), seed=7), 0.1 * normal(ffn.h, seed=8)
    return Neurons(ffn.activation, low, high, slope, offset)


def ranges_that_fix(share: str, ffn: DenseFFN) -> tuple[Tensor, Tensor]:
    """Ranges [h] that all, half or none of the pre-activations, or of the residuals of gated neurons, leave."""
    everything = torch.full((ffn.h,), torch.inf)
    if share != "half":
        return (-everything, everything) if share == "none" else (everything, -everything)
    width = 0.2 + normal(ffn.h, seed=9).abs()
    if ffn.k == 1:
        return ffn.b1 - width, ffn.b1 + width
    middle = lines(ffn, -everything, everything).residual(ffn.b1[None])[0]
    return middle - width / 2, middle + width / 2


def everything_fixed(ffn: DenseFFN, dtype: torch.dtype = torch.float32) -> FoldedWeights:
    """A fold with empty ranges."""
    return folded_with(ffn, *ranges_that_fix("all", ffn), dtype)


def nothing_fixed(ffn: DenseFFN, dtype: torch.dtype = torch.float32) -> FoldedWeights:
    """A fold with unbounded ranges."""
    return folded_with(ffn, *ranges_that_fix("none", ffn), dtype)


def half_fixed(ffn: DenseFFN, dtype: torch.dtype = torch.float32) -> FoldedWeights:
    """A fold with ranges that about half of the pre-activations, or of the residuals of gated neurons, leave."""
    return folded_with(ffn, *ranges_that_fix("half", ffn), dtype)


def fitted(
    ffn: DenseFFN, inputs: Inputs, rate: float, bits: int = 2, **settings: Any
) -> tuple[FoldedWeights, FoldQuality]:
    """Fold and quality for calibrated ranges at a fix rate; `settings` are those of `FoldConfig`."""
    config = FoldConfig(group_size=16, **settings)
    predicted = predict(ffn, inputs, bits, config)
    return finish(ffn, inputs, predicted, choose_ranges(ffn, predicted, rate, config), config, torch.float32)


def fallback(ffn: DenseFFN, dtype: torch.dtype = torch.float32) -> DenseFFN:
    """The dense weights as the runtime gets them."""
    return DenseFFN(*(tensor.to(dtype) for tensor in (ffn.w1, ffn.b1, ffn.w2, ffn.b2)), ffn.activation)


def neuron_major(weights: DenseFFN) -> DenseFFN:
    """The same weights, neuron by neuron in memory."""
    return replace(weights, w2=weights.w2.T.contiguous().T)


@functools.cache
def stored_fold(
    d: int, h: int, storage: Storage, dtype: torch.dtype, name: str = "gelu", ranges: str = "half", k: int = 1
) -> tuple[FoldedWeights, DenseFFN]:
    """A fold as it is stored and the dense weights, neuron by neuron; `ranges`: none, half or all are fixed.

    Rounding takes most of a test's time, so that the same are made once; nobody may change them.
    """
    ffn = random_ffn(d, h, name, k=k)
    neurons = lines(ffn, *ranges_that_fix(ranges, ffn))
    return replace(_stored(d, h, storage, dtype, k), neurons=neurons), neuron_major(fallback(ffn, dtype))


@functools.cache
def _stored(d: int, h: int, storage: Storage, dtype: torch.dtype, k: int) -> FoldedWeights:
    """What is stored alike for all activations and ranges."""
    ffn = random_ffn(d, h, k=k)
    return as_stored(nothing_fixed(ffn), ffn, storage, dtype)


def as_stored(folded: FoldedWeights, ffn: DenseFFN, storage: Storage, dtype: torch.dtype) -> FoldedWeights:
    """A fold of an FFN with a 2-bit predictor, and fold and fallback as stored."""
    predictor = quantise(ffn.w1, 2, storage.group_size)
    up, down = quantise_fallback(ffn.w1, ffn.w2, predictor, storage, None)
    fold, bias = store_fold(folded.fold, storage, dtype, None), folded.bias.to(dtype)
    return replace(folded, fold=fold, bias=bias, predictor=predictor, up=up, down=down)


def edited(folded: FoldedWeights, **lines: Tensor) -> FoldedWeights:
    """The fold with other ranges or lines."""
    return replace(folded, neurons=replace(folded.neurons, **lines))


def packed(rows: int, d: int, bits: int, group_size: int) -> PackedMatrix:
    """Random codes and scales."""
    codes = torch.randint(2**bits, (rows, d), generator=generator(bits))
    group_size = min(group_size, d)
    scale = (0.1 + normal(rows, -(-d // group_size), seed=1).abs()) / 2**bits
    return PackedMatrix(pack(codes, bits), scale.half(), d, group_size)
