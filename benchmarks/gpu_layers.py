"""Random FFNs of models' shapes on a GPU, dense and folded; see `gpu.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tardis_llm.ffn.activations import activation
from tardis_llm.ffn.neuron import Neurons, value
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights
from tardis_llm.runtime.triton.backend import TritonBackend, TritonFFN, product
from tardis_llm.runtime.triton.codes import Codes

BF16 = torch.bfloat16
FIXED = 0.05  #: share of the neurons that a token fixes
Step = Callable[[Tensor], Tensor]
Linear = Callable[[int, int], Step]  #: makes a product with a matrix of so many rows and columns
_GROUP, _INNER_TILES = 128, 8  # of torch's int4


@dataclass(frozen=True)
class Shape:
    """A model's.

    Attributes:
        d, h: width and neurons of an FFN.
        k: up-projections of a neuron.
        activation: its name.
        layers, vocabulary: of the whole model.
        kv: width of keys, and of values.
    """

    d: int
    h: int
    k: int
    activation: str
    layers: int
    vocabulary: int
    kv: int


SHAPES = {
    "falcon-7b": Shape(4544, 18176, 1, "gelu", 32, 65024, 64),
    "llama-3-8b": Shape(4096, 14336, 2, "silu", 32, 128256, 1024),
}


def dense_matrix(rows: int, columns: int) -> Tensor:
    """[rows, columns] bf16 that keeps the size of its inputs."""
    return torch.randn(rows, columns, dtype=BF16, device="cuda") / columns**0.5


def codes(rows: int, columns: int, bits: int, group_size: int = 128, has_zero: bool = False) -> Codes:
    """A random matrix in few bits of the same size."""
    matrix = Codes.empty(rows, columns, bits, group_size, torch.device("cuda"), has_zero)
    matrix.data.random_(-(2**31), 2**31 - 1)
    matrix.scale.fill_(1 / (columns**0.5 * 2**bits / 12**0.5))
    return matrix


def random_fold(shape: Shape, bits: int | None) -> tuple[FoldedWeights, DenseFFN | None]:
    """A fold that fixes 5 % of the neurons of normal inputs, with its dense FFN, or all in so many bits."""
    d, h, rows = shape.d, shape.h, shape.k * shape.h
    zeros, ones = (torch.full((h,), number, dtype=torch.float16, device="cuda") for number in (0.0, torch.inf))
    neurons = Neurons(
        shape.activation, -ones, ones, torch.full((rows,), 0.1, dtype=torch.float16, device="cuda"), zeros
    )
    bias, predictor = torch.zeros(d, dtype=BF16, device="cuda"), codes(rows, d, 2, 256)
    if bits is None:
        dense = DenseFFN(dense_matrix(rows, d), None, dense_matrix(h, d).T, None, shape.activation)
        weights = FoldedWeights(dense_matrix(d, d), bias, predictor, neurons).beside(dense)
    else:
        dense = None
        up, down = codes(rows, d, bits - 2), codes(h, d, bits, has_zero=True)
        weights = FoldedWeights(codes(d, d, bits), bias, predictor, neurons, down, up)
    return replace(weights, neurons=replace(neurons, high=_high(weights))), dense


def _high(weights: FoldedWeights) -> Tensor:
    """[h] fp16 bounds that 5 % of the predictions for normal inputs are above."""
    assert isinstance(weights.predictor, Codes)
    x = torch.randn(512, weights.predictor.columns, dtype=BF16, device="cuda")
    predicted = torch.cat([product(some, weights.predictor, None) for some in x.split(64)]).float()
    tested = weights.neurons.tested(predicted)
    return torch.quantile(tested, 1 - FIXED, dim=0).half()


@dataclass(frozen=True)
class Layer:
    """An FFN, dense and folded.

    Attributes:
        folded: by the kernels.
        dense: in bf16; None where only weights in few bits are there.
        weights: of the fold.
    """

    folded: TritonFFN
    dense: DenseFFN | None
    weights: FoldedWeights


def layers_of(shape: Shape, bits: int | None, count: int) -> list[Layer]:
    """So many FFNs of a shape."""
    backend, found = TritonBackend(), []
    for _ in range(count):
        weights, dense = random_fold(shape, bits)
        ffn = backend.prepare(weights, BF16)
        assert ffn is not None, "contiguous weights in one dtype are read"
        found.append(Layer(ffn, dense, weights))
    return found


def dense_linear(rows: int, columns: int) -> Step:
    """A product in bf16 by torch."""
    matrix = dense_matrix(rows, columns)
    return lambda x: F.linear(x, matrix)


def low_bit_linear(rows: int, columns: int) -> Step:
    """A product with a matrix in 4 bits by our kernel."""
    matrix = codes(rows, columns, 4)
    return lambda x: product(x, matrix, None)


def torch_int4_linear(rows: int, columns: int) -> Step:
    """A product with a matrix in 4 bits by torch's own kernel, which torchao calls for its weights in int4.

    Groups have 128 columns, of which the last is filled up; rows must be a multiple of 8.
    """
    filled = -(-columns // _GROUP) * _GROUP
    data = torch.randint(256, (rows, filled // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(data, _INNER_TILES)
    scale = torch.full((filled // _GROUP, rows), 12**0.5 / (16 * columns**0.5), dtype=BF16, device="cuda")
    scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), dim=-1)
    return lambda x: torch.ops.aten._weight_int4pack_mm(F.pad(x, (0, filled - columns)), packed, _GROUP, scale_and_zero)


@functools.cache
def int4_linears() -> dict[str, Linear]:
    """Products in 4 bits by what is added to their names: ours, and torch's, of which it says where a GPU lacks it."""
    ways: dict[str, Linear] = {"": low_bit_linear}
    try:
        torch_int4_linear(8, _GROUP)(torch.zeros(1, _GROUP, dtype=BF16, device="cuda"))
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"torch's own int4 is left out, as it does not run here: {error}")
        return ways
    return ways | {" of torch": torch_int4_linear}


def dense_step(dense: DenseFFN) -> Step:
    """An FFN in bf16 by torch."""
    return lambda x: F.linear(value(F.linear(x, dense.w1), dense.act, dense.k), dense.w2)


def ffn_step(shape: Shape, linear: Linear) -> Step:
    """An FFN of such products."""
    up, down, act = linear(shape.k * shape.h, shape.d), linear(shape.d, shape.h), activation(shape.activation)
    return lambda x: down(value(up(x), act, shape.k))
