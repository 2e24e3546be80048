"""The CPU kernels do what the readable reference does, on every instruction set, and step aside where they cannot.

Expected values are computed in fp64 from the numbers that the kernels get. What may differ is stated as bounds: inputs
of a low-bit product are rounded to 16 (or 8) bits per token and group, sums are in fp32, outputs in the dtype of x.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from marks import long, mostly_long
from models import tiny_model, tokens
from synthetic import (
    NAMES,
    correlated,
    edited,
    everything_fixed,
    folded_with,
    half_fixed,
    neuron_major,
    normal,
    packed,
    random_ffn,
    stored_fold,
)
from torch import Tensor

from tardis_llm.errors import InvalidInputError, TardisError
from tardis_llm.families.sites import find_ffns
from tardis_llm.ffn.activations import activation
from tardis_llm.ffn.neuron import value
from tardis_llm.ffn.packed import PackedMatrix
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights, Storage, written_out
from tardis_llm.folding.rounding import quantise
from tardis_llm.pipeline.session import sound_weights
from tardis_llm.runtime import backend, slow
from tardis_llm.runtime.backend import lay_out, prepare
from tardis_llm.runtime.cpu import library
from tardis_llm.runtime.cpu.backend import CpuBackend, CpuFFN
from tardis_llm.runtime.cpu.library import ISAS, MAX_TOKENS, open_library
from tardis_llm.runtime.cpu.panels import Panels
from tardis_llm.runtime.cpu.structures import FFN, Batch
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import install, uninstall
from tardis_llm.runtime.reference import fixed_neurons, folded_ffn

BUILT = open_library()
needs_library = pytest.mark.skipif(BUILT is None, reason="the CPU kernels are not built: no C++ compiler was found")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCHES = [1, 2, 3, 7, 8, MAX_TOKENS]
#: (out, in): smaller than a register, not divisible by 8, by 32 or by 64, and plain
SHAPES = [(3, 5), (37, 100), (70, 259), (32, 512)]
#: fp32 sums of up to some hundred products, in another order
FP32 = 2e-6

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of torch's threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(count: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (normal(count, d, seed=count) * (1 + normal(d, seed=5).abs())).to(dtype)


def assert_within(found: Tensor, expected: Tensor, bound: Tensor | float = 0.0) -> None:
    """Apart by no more than `bound`, a rounding of sums to fp32, and one of results to the dtype of `found`."""
    rounding = 0.0 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps * expected.abs()
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = (found.double() - expected).abs() - rounding - bound
    assert float(error.max()) <= FP32 * (1 + scale)


def input_rounding(x: Tensor, matrix: PackedMatrix, bits: int = 16) -> Tensor:
    """Bound on what rounding x [tokens, d] to `bits` moves the product with `matrix`: half a step per column."""
    d, size = x.shape[1], matrix.group_size
    largest = F.pad(x.double().abs(), (0, -d % size)).unflatten(1, (-1, size)).amax(2)
    steps = (largest / (127 if bits == 8 else 32639)).repeat_interleave(size, 1)[:, :d]
    # 1 % for the rounding of the step itself and of x over the step, both in fp32
    return steps @ magnitudes(matrix) * 0.505


@functools.lru_cache(maxsize=8)
def magnitudes(matrix: PackedMatrix) -> Tensor:
    """[in, out] in fp64, of a matrix that is asked for again and again in a test."""
    return matrix.dequantise().double().abs().T


def lowbit_linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None, bits: int = 16) -> Tensor:
    y: Tensor = torch.ops.tardis.linear(x, matrix.planes, bias, matrix.scale, matrix.group_size, activation_bits=bits)
    return y


def kernel_ffn(x: Tensor, folded: FoldedWeights, dense: DenseFFN, bits: int = 8) -> Tensor:
    """The output by the kernels, inputs of low-bit products rounded to 8 or 16 bits."""
    return CpuFFN(folded.beside(dense), bits)(x)


def predicted(x: Tensor, folded: FoldedWeights, dense: DenseFFN, bits: int = 16) -> Tensor:
    """The fixed neurons as the kernels find them."""
    return CpuFFN(folded.beside(dense), bits).fixed(x)


# ---- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@every_dtype
def test_dense_products(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = normal(*shape, seed=1).to(dtype), normal(shape[0], seed=2).to(dtype)
    for count in BATCHES:
        x = inputs(count, shape[1], dtype)
        expected = x.double() @ weight.double().T
        assert_within(torch.ops.tardis.linear(x, weight, None), expected)
        assert_within(torch.ops.tardis.linear(x, weight, bias), expected + bias.double())


def every_fp16() -> Tensor:
    """All 65,536 of them, from the least in size on."""
    return torch.arange(2**16).to(torch.uint16).view(torch.float16)


def test_every_fp16_number_is_read_and_written(isa: str) -> None:
    numbers = every_fp16()
    found = torch.ops.tardis.linear(torch.ones(1, 1).half(), numbers[:, None], None)[0]
    torch.testing.assert_close(found, numbers, rtol=0, atol=0, equal_nan=True)


def test_sums_are_rounded_to_fp16_as_by_torch(isa: str) -> None:
    numbers = every_fp16()
    numbers = numbers[numbers.isfinite()]
    weight = torch.stack([numbers, numbers.roll(-1), numbers], 1).contiguous()
    for parts in ((0.5, 0.5, 0.0), (0.5, 0.5, 2**-10), (0.5, 0.5, -(2**-10)), (1.5, -0.5, 0.0), (8.0, 0.0, 0.0)):
        x = torch.tensor([parts]).half()  # halves between neighbours, next to them, elsewhere, and beyond the largest
        expected = (weight.double() @ x.double()[0]).float().half()
        assert torch.equal(torch.ops.tardis.linear(x, weight, None)[0], expected)


def test_what_overflows_fp16_is_infinite_as_in_torch(isa: str) -> None:
    weight = torch.tensor([[60000.0, 10000.0], [-60000.0, -10000.0], [60000.0, -10000.0]]).half()
    x, bias = torch.tensor([[1.0, 1.0], [0.5, 0.5]]).half(), torch.tensor([0.0, 0.0, 60000.0]).half()
    expected = torch.nn.functional.linear(x, weight, bias)
    assert expected.isinf().tolist() == [[True, True, True], [False, False, True]]
    assert torch.equal(torch.ops.tardis.linear(x, weight, bias), expected)
    folded, dense = stored_fold(40, 150, Storage(48), torch.float16)
    bias = folded.bias.clone()
    bias[3], bias[5] = torch.inf, 65504
    y = kernel_ffn(correlated(2, 40).half(), replace(folded, bias=bias), dense)
    assert y.isinf().nonzero()[:, 1].tolist() == [3, 3] and float(y[:, 5].min()) > 6e4


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_low_bit_products_for_every_width_and_group_size(isa: str, shape: tuple[int, int], bits: int) -> None:
    for group_size in (1, 7, 64, 100, 256):  # within bytes, across them, divisible by 64, more than the columns
        matrix = packed(*shape, bits, group_size)
        weight = matrix.dequantise().double().T
        for count in (1, 3, 8):
            x = inputs(count, shape[1])
            expected = x.double() @ weight
            for activation_bits in (8, 16):
                bound = input_rounding(x, matrix, activation_bits)
                assert_within(lowbit_linear(x, matrix, None, activation_bits), expected, bound)


@pytest.mark.parametrize("count", BATCHES)
@every_dtype
def test_low_bit_products_for_every_batch_and_dtype(isa: str, dtype: torch.dtype, count: int) -> None:
    matrix, bias = packed(37, 200, 4, 64), normal(37, seed=2).to(dtype)
    x = inputs(count, 200, dtype)
    expected = x.double() @ matrix.dequantise().double().T + bias.double()
    assert_within(lowbit_linear(x, matrix, bias), expected, input_rounding(x, matrix))


def test_sums_of_very_wide_groups_do_not_overflow(isa: str) -> None:
    planes = torch.full((2, 8, 1250), 255, dtype=torch.uint8)  # every code the largest, 255
    matrix = PackedMatrix(planes, torch.full((2, 1), 0.5, dtype=torch.float16), 10_000, 10_000)
    x = torch.full((1, 10_000), 3.0)
    assert_within(lowbit_linear(x, matrix), torch.full((1, 2), 127.5 * 0.5 * 3.0 * 10_000, dtype=torch.double))


def test_inputs_of_any_size_are_rounded_relative_to_their_own_group(isa: str) -> None:
    matrix = packed(8, 192, 4, 64)
    for size in (0.0, 1e-35, 1e-20, 1e20):
        x = inputs(2, 192) * size
        x[:, 64:128] = 0
        expected = x.double() @ matrix.dequantise().double().T
        assert_within(lowbit_linear(x, matrix), expected, input_rounding(x, matrix) + FP32 * size + 1e-28)


def test_what_is_not_finite_makes_low_bit_products_nan(isa: str) -> None:
    matrix = packed(8, 192, 4, 64)
    clean = inputs(4, 192)
    x = clean.clone()
    x[1, 5], x[2, 191], x[3, 70] = torch.nan, torch.inf, -torch.inf
    y = lowbit_linear(x, matrix)
    assert y[1:].isnan().all()
    assert torch.equal(y[:1], lowbit_linear(clean, matrix)[:1])


@needs_library
def test_the_portable_kernels_round_inputs_as_the_others_do() -> None:
    assert BUILT is not None
    matrix, x = packed(40, 259, 3, 100), inputs(5, 259)
    results = []
    for name in BUILT.isas:
        with BUILT.using(name):
            results.append(lowbit_linear(x, matrix))
    for result in results[1:]:  # the integers are the same; the sum over groups may round differently
        torch.testing.assert_close(result, results[0], rtol=FP32, atol=FP32 * float(results[0].abs().max()))


# ---- predictor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("range_dtype", [torch.float16, torch.float32])
def test_predicted_neurons_are_those_of_the_reference(isa: str, bits: int, range_dtype: torch.dtype) -> None:
    ffn = random_ffn(100, 77)
    folded = replace(half_fixed(ffn), predictor=quantise(ffn.w1, bits, 48))
    folded = edited(folded, low=folded.neurons.low.to(range_dtype), high=folded.neurons.high.to(range_dtype))
    for count in BATCHES:
        x = correlated(count, 100, count)
        zhat = x.double() @ folded.predictor.dequantise().double().T + ffn.b1
        distance = torch.minimum((zhat - folded.neurons.low).abs(), (zhat - folded.neurons.high).abs())
        clear = distance > input_rounding(x, folded.predictor) + FP32 * 10
        assert clear.double().mean() > 0.95
        assert torch.equal(predicted(x, folded, neuron_major(ffn))[clear], fixed_neurons(x, folded.beside(ffn))[clear])


@pytest.mark.parametrize("name", NAMES)
def test_gated_neurons_leave_their_ranges_by_the_residual_that_is_predicted(isa: str, name: str) -> None:
    ffn = random_ffn(100, 77, name, k=2)
    folded = half_fixed(ffn)
    for count in (1, 5, MAX_TOKENS):
        x = correlated(count, 100, count)
        z = x.double() @ folded.predictor.dequantise().double().T + ffn.b1
        bound = input_rounding(x, folded.predictor) + FP32 * 10
        moved = (steepness(z, bound, ffn, folded.neurons.slope) * bound).unflatten(1, (2, -1)).sum(1)
        residual = folded.neurons.residual(z)
        clear = torch.minimum((residual - folded.neurons.low).abs(), (residual - folded.neurons.high).abs()) > moved
        assert clear.double().mean() > 0.95
        assert torch.equal(predicted(x, folded, neuron_major(ffn))[clear], fixed_neurons(x, folded.beside(ffn))[clear])


@needs_library
@pytest.mark.parametrize("h", [40, 64, 131])  # the second half of the rows begins within a panel, or with one
@pytest.mark.parametrize("tokens", [1, 3, MAX_TOKENS])
def test_a_predictor_in_panels_predicts_the_same_of_gated_neurons(h: int, tokens: int) -> None:
    folded, dense = stored_fold(128, h, Storage(64, 8, 4), torch.float32, "silu", k=2)
    layout = CpuBackend().lay_out(folded.predictor, torch.float32)
    if layout is None:
        pytest.skip("this processor, or the compiler, lacks AVX-512")
    x, laid = correlated(tokens, 128), replace(folded, predictor=layout)
    assert torch.equal(predicted(x, laid, dense, 8), predicted(x, folded, dense, 8))
    torch.testing.assert_close(kernel_ffn(x, laid, dense), kernel_ffn(x, folded, dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2])
def test_nan_counts_as_out_of_range(isa: str, k: int) -> None:
    ffn = random_ffn(40, 33, k=k)
    everywhere = torch.full((33,), torch.inf)
    folded = folded_with(ffn, -everywhere, everywhere)
    x = correlated(3, 40)
    x[1, 2] = torch.nan
    assert predicted(x, folded, neuron_major(ffn)).all(1).tolist() == [False, True, False]


# ---- the folded FFN ------------------------------------------------------------------------------------------------

#: of which AMX computes every neuron: predictor and remainder of 4 and 8 bits in all, one of 3 bits, or of none
EXACT_STORAGES = [Storage(64, 8, 4), Storage(64, 4, 8), Storage(128, 4, 4, 3), Storage(64, 8, 4, 0)]
STORAGES = [Storage(48), Storage(48, 8), Storage(64, 8, 4), Storage(100, 4, 8), Storage(48, None, 2)]
#: what more there is where neurons are gated: a remainder in other bits than the predictor leaves of the fallback
GATED = [Storage(48), Storage(64, 8, 4), Storage(48, None, 2), Storage(64, 4, 4, remainder_bits=3)]
#: fp16 differs from bf16 in what is dense only
every_form = pytest.mark.parametrize(
    ("dtype", "storage", "k"),
    [
        *itertools.product(DTYPES[:2], STORAGES, [1]),
        *((torch.float16, STORAGES[0], 1), (torch.float16, STORAGES[4], 1)),
        *itertools.product(DTYPES[:1], GATED, [2]),
        *itertools.product(DTYPES[1:], [STORAGES[0], GATED[3]], [2]),
    ],
    ids=str,
)
every_fold = pytest.mark.parametrize(
    ("storage", "k"), [*itertools.product(STORAGES, [1]), *itertools.product(GATED, [2])], ids=str
)
every_k = pytest.mark.parametrize("k", [1, 2])


@functools.cache
def specified(x: Tensor, folded: FoldedWeights, dense: DenseFFN, bits: int = 16) -> tuple[Tensor, Tensor]:
    """Output [tokens, d] in fp64 with the neurons that the kernels fix, and a bound on what rounding x moves it."""
    b1, neurons = dense.b1, folded.neurons
    w1, w2 = folded.beside(dense).fallback(torch.float32)
    z_bound = torch.zeros(len(x), len(w1), dtype=torch.double)
    for matrix in filter(None, (folded.predictor, folded.up) if folded.stacked else ()):
        z_bound += input_rounding(x, matrix, bits)
    x64, fixed = x.double(), predicted(x, folded, dense, bits if folded.stacked else 8)
    z = x64 @ w1.double().T + (0 if b1 is None else b1.double())
    lines = (neurons.slope.double() * z).unflatten(1, (neurons.k, -1)).sum(1)
    residual = (value(z, dense.act, neurons.k) - lines - neurons.offset.double()) * fixed
    y = x64 @ written_out(folded.fold).double().T + folded.bias.double() + residual @ w2.double().T
    z_bound += FP32 * (1 + z.abs())
    bound = (steepness(z, z_bound, dense, neurons.slope) * z_bound).unflatten(1, (neurons.k, -1)).sum(1) * fixed
    bound = bound @ w2.double().abs().T
    if isinstance(folded.fold, PackedMatrix):
        bound = bound + input_rounding(x, folded.fold, bits)
    return y, bound


def steepness(z: Tensor, bound: Tensor, dense: DenseFFN, slope: Tensor) -> Tensor:
    """[tokens, k h] how fast residuals move at most, for up-projections z that are known but for a bound.

    No activation is steeper than relu2, 2 |z|, and no line than its slope.
    """
    if dense.k == 1:
        return 2 + 2 * z.abs() + slope.abs()
    (gate, up), (gate_bound, up_bound) = (each.unflatten(1, (2, -1)).unbind(1) for each in (z, bound))
    by_gate = (2 + 2 * (gate.abs() + gate_bound)) * (up.abs() + up_bound)
    return torch.cat([by_gate, dense.act(gate).abs()], 1) + slope.abs()


@pytest.mark.parametrize("name", NAMES)
@every_k
@every_dtype
def test_every_activation(isa: str, name: str, k: int, dtype: torch.dtype) -> None:
    folded, dense = stored_fold(40, 150, Storage(48), dtype, name, k=k)
    x = correlated(5, 40).to(dtype)
    assert_within(kernel_ffn(x, folded, dense, 16), *specified(x, folded, dense))


@pytest.mark.parametrize("name", NAMES)
def test_activations_of_all_sizes(isa: str, name: str) -> None:
    z = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([1e-30, 1e-6, 40, 90, 1e4, 1e12])])
    z = torch.cat([z, -z])
    count, line = len(z), torch.zeros(len(z), dtype=torch.float16)
    folded, _ = stored_fold(count, count, Storage(count), torch.float32, name, "all")
    folded = edited(replace(folded, fold=torch.zeros(count, count), bias=torch.zeros(count)), slope=line, offset=line)
    each_alone = neuron_major(DenseFFN(torch.diag(z), torch.zeros(count), torch.eye(count), None, name))
    y = kernel_ffn(torch.ones(1, count), folded, each_alone)[0]
    torch.testing.assert_close(y.double(), activation(name)(z.double()), rtol=1e-6, atol=1e-6)


@every_form
def test_every_storage_and_batch(isa: str, dtype: torch.dtype, storage: Storage, k: int) -> None:
    assert_as_specified(dtype, storage, k, "half", {(41, 131): (1, 7), (192, 300): (2, MAX_TOKENS)})


@pytest.mark.parametrize("ranges", ["none", "all"])
@every_fold
def test_every_storage_fixes_nothing_and_everything(isa: str, storage: Storage, k: int, ranges: str) -> None:
    assert_as_specified(torch.float32, storage, k, ranges, {(41, 131): (MAX_TOKENS,), (192, 300): (1,)})


def assert_as_specified(
    dtype: torch.dtype, storage: Storage, k: int, ranges: str, sizes: dict[tuple[int, int], tuple[int, ...]]
) -> None:
    """An FFN does what it should; its (d, h), with the numbers of tokens."""
    for (d, h), counts in sizes.items():
        folded, dense = stored_fold(d, h, storage, dtype, ranges=ranges, k=k)
        for count in counts:
            x = correlated(count, d, count).to(dtype)
            share = float(predicted(x, folded, dense).double().mean())
            assert share == {"none": 0.0, "all": 1.0}.get(ranges, share) and (ranges != "half" or 0.1 < share < 0.9)
            assert isinstance(prepare(folded.beside(dense), x), CpuFFN)
            for bits in (8, 16):
                y = kernel_ffn(x, folded, dense, bits)
                assert_within(y, *specified(x, folded, dense, bits))


@every_form
def test_rows_longer_than_what_is_fetched_ahead(isa: str, dtype: torch.dtype, storage: Storage, k: int) -> None:
    folded, dense = stored_fold(600, 40, storage, dtype, k=k)
    for count in (1, 7):
        x = correlated(count, 600, count).to(dtype)
        assert 0 < predicted(x, folded, dense).sum() < 40 * count
        assert_within(kernel_ffn(x, folded, dense), *specified(x, folded, dense, 8))


@pytest.mark.parametrize("storage", STORAGES[::2], ids=str)
@every_k
@every_dtype
def test_the_kernels_agree_with_the_reference(isa: str, dtype: torch.dtype, k: int, storage: Storage) -> None:
    folded, dense = stored_fold(96, 384, storage, dtype, k=k)
    x = correlated(MAX_TOKENS, 96).to(dtype)
    same = predicted(x, folded, dense, 16 if folded.stacked else 8) == fixed_neurons(x, folded.beside(dense))
    assert same.float().mean() > 0.99
    x = x[same.all(1)]  # a prediction next to a bound may fall on its other side
    assert len(x) >= 5
    found = kernel_ffn(x, folded, dense, 16)
    expected = folded_ffn(x, folded.beside(dense))
    assert found.dtype == dtype
    atol = 2e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps  # the reference rounds in between to bf16
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("storage", STORAGES[::2], ids=str)
@every_k
def test_biases_may_be_missing(isa: str, k: int, storage: Storage) -> None:
    folded, dense = stored_fold(41, 131, storage, torch.float32, k=k)
    x, dense = correlated(3, 41), replace(dense, b1=None, b2=None)
    assert_within(kernel_ffn(x, folded, dense, 16), *specified(x, folded, dense))


@every_fold
def test_nan_comes_out_where_it_came_in_and_nowhere_else(isa: str, storage: Storage, k: int) -> None:
    folded, dense = stored_fold(72, 131, storage, torch.float32, k=k)
    clean = correlated(6, 72)
    x = clean.clone()
    x[2, 7] = torch.nan
    y, expected = (kernel_ffn(each, folded, dense) for each in (x, clean))
    assert y[2].isnan().all()
    others = torch.arange(6) != 2
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("tokens", [3, 9])
@every_fold
def test_results_are_the_same_each_time_and_close_for_any_number_of_threads(
    isa: str, storage: Storage, k: int, tokens: int, threads: None
) -> None:
    folded, dense = stored_fold(264, 700, storage, torch.float32, k=k)
    x = correlated(tokens, 264)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        same = [kernel_ffn(x, folded, dense) for _ in range(3)]
        assert all(torch.equal(y, same[0]) for y in same)
        results.append(same[0])
    # neurons are added up in other parts, and residuals that meet low-bit rows are rounded with other neighbours
    bound = 2e-6 if storage.fallback_bits is None else 2e-4
    assert all(float((y - results[0]).abs().max() / y.abs().max()) < bound for y in results)


@pytest.mark.parametrize("tokens", mostly_long([5, 9, 64], [64]))  # 64 find more than wait for their products
@every_fold
def test_what_a_token_gets_does_not_depend_on_its_batch(isa: str, storage: Storage, k: int, tokens: int) -> None:
    folded, dense = stored_fold(72, 2900, storage, torch.float32, k=k)
    x = correlated(tokens, 72)
    fixed = predicted(x, folded, dense, 8)
    assert fixed.any(0).sum() > 1100 and len(set(fixed.sum(1).tolist())) >= 5  # in more than one round, unequal
    alone = torch.cat([kernel_ffn(one, folded, dense) for one in x.split(1)])
    assert torch.equal(kernel_ffn(x, folded, dense), alone)


def laid_out(weights: FoldedWeights) -> FoldedWeights:
    """Stacked weights in the order of memory of the instruction set in use."""
    assert isinstance(weights.predictor, PackedMatrix) and isinstance(weights.down, PackedMatrix)
    down = lay_out(weights.down, torch.bfloat16, by_rows=True) or weights.down
    return replace(weights, predictor=Panels.of(weights.predictor), down=down)


@pytest.mark.parametrize("name", ["avx2", "avxvnni", "amx"])
@pytest.mark.parametrize("storage", EXACT_STORAGES, ids=str)
@pytest.mark.parametrize(("d", "h", "k"), [(128, 64, 1), (576, 160, 2), (1024, 32, 2)])
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_every_neuron_is_computed_by_the_weights_in_few_bits(
    name: str, storage: Storage, d: int, h: int, k: int, tokens: int
) -> None:
    if name not in library.loaded().isas:
        pytest.skip(f"this processor or build has no {name}")
    folded, dense = stored_fold(d, h, storage, torch.bfloat16, "silu" if k == 2 else "gelu", k=k)
    x, weights = correlated(tokens, d).bfloat16(), folded.beside(dense)
    with library.loaded().using(name):
        ffn = CpuFFN(laid_out(weights))
        assert not ffn.quick_exact(x.float())
        for b2 in (dense.b2, None):
            expected = weights.exact(x, b2)
            error = (ffn.exact(x, b2).float() - expected.float()).abs().max()
            assert float(error) <= 2**-6 * float(expected.abs().max())  # hidden activations and sums are in bf16


@pytest.mark.parametrize(("ranges", "often"), [("all", True), ("none", False)])
def test_where_many_neurons_are_fixed_all_are_as_quick(ranges: str, often: bool, isa: str) -> None:
    folded, dense = stored_fold(128, 64, Storage(64, 4, 4), torch.bfloat16, ranges=ranges)
    weights = folded.beside(dense)
    ffn = CpuFFN(laid_out(weights))
    expected = {"avx2": often, "avxvnni": often, "amx": True}.get(isa, False)
    assert ffn.quick_exact(correlated(40, 128).bfloat16()) == expected


def test_without_a_kernel_every_neuron_is_computed_by_the_reference(isa: str) -> None:
    folded, dense = stored_fold(100, 37, Storage(48, 8, 4), torch.float32)
    x, ffn = correlated(3, 100), CpuFFN(folded.beside(dense))
    assert not ffn.quick_exact(x)
    assert torch.equal(ffn.exact(x, dense.b2), folded.beside(dense).exact(x, dense.b2))


def test_residuals_of_any_size_are_rounded_relative_to_their_neighbours(isa: str) -> None:
    folded, dense = stored_fold(40, 150, Storage(48, 8, 4), torch.float32, ranges="all")
    x = correlated(3, 40)
    for size in (1e-4, 1e4):
        assert isinstance(folded.down, PackedMatrix)
        down = replace(folded.down, scale=(folded.down.scale.float() * size).half())
        flat = edited(folded, slope=0 * folded.neurons.slope, offset=0 * folded.neurons.offset)
        scaled = replace(flat, down=down)
        y, bound = specified(x, scaled, dense)
        assert_within(kernel_ffn(x, scaled, dense, 16), y, bound)


@needs_library
def test_calls_from_several_threads_at_once_do_not_disturb_each_other(threads: None) -> None:
    torch.set_num_threads(2)
    cases = [
        (*stored_fold(264, 1000, storage, torch.bfloat16), correlated(4, 264, 1).bfloat16()) for storage in STORAGES[:3]
    ]
    expected = [kernel_ffn(x, folded, dense) for folded, dense, x in cases]
    wrong: list[int] = []

    def work(number: int) -> None:
        folded, dense, x = cases[number % 3]
        for _ in range(30):
            if not torch.equal(kernel_ffn(x, folded, dense), expected[number % 3]):
                wrong.append(number)

    running = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong


_ALONE = """
import os, torch, tardis_llm
def threads():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
torch.set_num_threads(2)
x, weight = torch.empty(2, 512), torch.empty(2000, 512)  # filling them would start threads of torch
counts = [threads()]
torch.ops.tardis.linear(x, weight, None)
counts.append(threads())
x.fill_(1), weight.fill_(1)
expected = torch.ops.tardis.linear(x, weight, None)
child = os.fork() if hasattr(os, "fork") else -1
if child == 0:
    ok = all(torch.equal(torch.ops.tardis.linear(x, weight, None), expected) for _ in range(20))
    os._exit(0 if ok else 3)
forked = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child > 0 else -1
assert torch.equal(torch.ops.tardis.linear(x, weight, None), expected)
torch.nn.functional.linear(x.repeat(200, 1), weight)
print(*counts, threads(), forked)
"""


@functools.cache
def alone() -> list[int]:
    """What a process of its own finds: its threads before the kernels, behind them, behind torch; a child's status."""
    done = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@long
@needs_library
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list a process's threads")
def test_the_kernels_run_on_the_threads_of_torch() -> None:
    before, with_ours, with_torchs, _ = alone()
    assert before < with_ours == with_torchs


@long
@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_gets_the_same_without_its_parents_threads() -> None:
    assert alone()[-1] == 0


# ---- as torch operators --------------------------------------------------------------------------------------------


@needs_library
def test_the_operators_pass_the_checks_of_torch() -> None:
    folded, dense = stored_fold(64, 96, Storage(64, 8, 4), torch.float32)
    x, p = correlated(3, 64), folded.predictor
    tests = ("test_schema", "test_faketensor")
    linear = torch.ops.tardis.linear.default
    for arguments in ((x, dense.w1, dense.b1), (x, p.planes, dense.b1, p.scale, p.group_size)):
        assert set(torch.library.opcheck(linear, arguments, test_utils=tests).values()) == {"SUCCESS"}


@needs_library
def test_what_the_kernels_would_misread_is_refused() -> None:
    x, weight = normal(2, 16), normal(8, 16)
    matrix = packed(8, 16, 2, 16)
    linear = torch.ops.tardis.linear
    for call in (
        lambda: linear(x.double(), weight.double(), None),
        lambda: linear(normal(MAX_TOKENS + 1, 16), weight, None),
        lambda: linear(normal(16, 2).T, weight, None),
        lambda: linear(x[:, :8].contiguous(), weight, None),
        lambda: linear(x, weight.bfloat16(), None),
        lambda: linear(x, weight, normal(7)),
        lambda: linear(x, matrix.planes, None, matrix.scale, 8),
        lambda: linear(normal(2, 17), matrix.planes, None, matrix.scale, 16),
        lambda: lowbit_linear(x, matrix, bits=12),
    ):
        with pytest.raises(TardisError):
            call()


# ---- in a model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every call of the kernels' folded FFN."""
    seen: list[int] = []
    stock = library.Kernels.folded_ffn

    def spy(kernels: library.Kernels, ffn: FFN, batch: Batch) -> None:
        seen.append(batch.tokens)
        stock(kernels, ffn, batch)

    monkeypatch.setattr(library.Kernels, "folded_ffn", spy)
    return seen


@needs_library
def test_the_module_uses_the_kernels_where_they_can(calls: list[int]) -> None:
    folded, dense = stored_fold(40, 96, Storage(48), torch.float32)
    module = FoldedFFN(folded)
    x = correlated(MAX_TOKENS + 1, 40)
    module(x[:1], dense)
    module(x[:MAX_TOKENS], dense)
    assert module(x[:6].view(2, 3, 40), dense).shape == (2, 3, 40)
    torch.testing.assert_close(module(x, dense)[:1], module(x[:1], dense))  # some at a time
    assert calls == [1, MAX_TOKENS, 6, MAX_TOKENS, 1, 1]
    module(x[:0], dense)
    module(x[:1].clone().requires_grad_(), dense)
    module(x[:1], replace(dense, w2=dense.w2.contiguous()))  # W2 does not lie neuron by neuron
    assert len(calls) == 6


@needs_library
@every_dtype
@torch.no_grad()
def test_the_module_uses_the_kernels_in_every_dtype(dtype: torch.dtype, calls: list[int]) -> None:
    folded, dense = stored_fold(40, 96, Storage(48), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FoldedFFN(folded)(correlated(3, 40).to(dtype), dense)
    assert calls == [3]


@needs_library
@pytest.mark.parametrize("traced", [False, True])
@torch.no_grad()
def test_a_dtype_that_the_kernels_do_not_take_is_said_once(calls: list[int], traced: bool) -> None:
    slow._warn_of_dtypes.cache_clear()
    folded, dense = stored_fold(40, 96, Storage(48), torch.float64)
    module, x = FoldedFFN(folded), correlated(3, 40).double()
    run = torch.compile(lambda x: module(x, dense), backend="eager", fullgraph=True) if traced else module
    with pytest.warns(
        RuntimeWarning, match=r"in float64 run through the reference.*bfloat16, float16 or float32"
    ) as said:
        for _ in range(2):
            run(*(x,) if traced else (x, dense))
    assert len(said) == 1 and not calls and "dtype=" in str(said[0].message)


@needs_library
@torch.no_grad()
def test_inputs_in_another_dtype_than_the_weights_are_said_once(calls: list[int]) -> None:
    slow._warn_of_dtypes.cache_clear()
    folded, dense = stored_fold(40, 96, Storage(48), torch.float32)
    module, x = FoldedFFN(folded), correlated(3, 40).bfloat16()
    warned = pytest.warns(RuntimeWarning, match="in float32 with inputs in bfloat16.*leave out torch.autocast")
    with warned as said, torch.autocast("cpu", torch.bfloat16):
        module(x, dense)
        module(x, dense)
    assert len(said) == 1 and not calls


@needs_library
@torch.no_grad()
def test_a_module_that_moves_lets_go_of_what_it_leaves() -> None:
    folded, dense = stored_fold(40, 96, Storage(48), torch.float32)
    module, x = FoldedFFN(folded), correlated(3, 40)
    module(x, dense)
    left = weakref.ref(module._ready.ffn)
    module.to(torch.float32)
    assert left() is None


@needs_library
@torch.no_grad()
def test_a_module_that_has_run_follows_its_tensors(calls: list[int]) -> None:
    folded, dense = stored_fold(40, 96, Storage(48), torch.float32)
    module = FoldedFFN(folded)
    x = correlated(3, 40)
    before = module(x, dense)
    copied = copy.deepcopy(module)
    module.fold.bias.data = module.fold.bias + 1
    torch.testing.assert_close(module(x, dense), before + 1)
    moved = replace(dense, w2=(2 * dense.w2.T).contiguous().T)
    twice = folded_ffn(x, module.weights.beside(moved))
    torch.testing.assert_close(module(x, moved), twice, rtol=1e-2, atol=1e-2)
    assert torch.equal(copied(x, dense), before)
    assert len(calls) == 4


@needs_library
@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon"])
@torch.no_grad()
def test_a_model_runs_through_the_kernels_and_keeps_its_weights(name: str, calls: list[int]) -> None:
    model = tiny_model(name)
    ids = tokens()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    sites = find_ffns(model)
    for site in sites:
        ffn = sound_weights(site).in_fp32()
        install(model, site, FoldedFFN(everything_fixed(ffn)))
    logits = model(ids).logits
    assert calls == [ids.numel()] * len(sites)
    for key, before in state.items():  # laid out anew in memory, and the same
        assert torch.equal(model.state_dict()[key], before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuBackend, "accepts", lambda self, x: False)
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
    for site in sites:
        uninstall(model, site)
    assert all(value.is_contiguous() for value in model.state_dict().values())


@needs_library
@pytest.mark.parametrize("name", ISAS)
def test_an_instruction_set_is_used_within_a_context(name: str) -> None:
    assert BUILT is not None
    before = BUILT.isa
    if name not in BUILT.isas:
        pytest.skip(f"this processor, or the compiler, lacks {name}: no test runs on it")
    with BUILT.using(name):
        assert BUILT.isa == name
    assert BUILT.isa == before


@needs_library
@pytest.mark.parametrize("name", ["", *ISAS, "off"])
def test_the_environment_chooses_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BUILT is not None
    monkeypatch.setenv("TARDIS_KERNELS", name)
    monkeypatch.setattr(backend, "_setting", functools.cache(backend._setting.__wrapped__))
    x = torch.ones(1, 8)
    with BUILT.using(BUILT.isa):  # puts the choice back
        if name not in ("", "off", *BUILT.isas):
            with pytest.raises(InvalidInputError, match="cannot run here"):
                backend.backend_for(x)
        else:
            assert backend.backend_for(x).name == ("reference" if name == "off" else "cpu")
            assert BUILT.isa == (name if name in ISAS else BUILT.isas[-1])
            assert (backend.lay_out(torch.ones(2, 2).half(), torch.float16) is None) == (
                name == "off" or BUILT.isa in ("portable", "avx2", "avxvnni", "neon", "i8mm")
            )


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARDIS_KERNELS", "sse2")
    monkeypatch.setattr(backend, "_setting", functools.cache(backend._setting.__wrapped__))
    with pytest.raises(InvalidInputError, match=", ".join(ISAS)):
        backend.backend_for(torch.ones(1, 8))


def test_without_the_library_the_reference_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_candidates", lambda folders: [])
    monkeypatch.setattr(library, "open_library", library.open_library.__wrapped__)
    monkeypatch.setattr(library, "kernels", functools.cache(library.kernels.__wrapped__))
    monkeypatch.delenv("TARDIS_KERNELS", raising=False)
    folded, dense = stored_fold(40, 96, Storage(48), torch.float32)
    x = correlated(2, 40)
    with pytest.warns(RuntimeWarning, match="not built") as caught:
        found = [FoldedFFN(folded)(x, dense) for _ in range(2)]
    assert len(caught) == 1
    expected = folded_ffn(x, folded.beside(dense))
    assert all(torch.equal(y, expected) for y in found)
    with pytest.raises(TardisError, match="not built"):
        torch.ops.tardis.linear(x, dense.w1, None)
