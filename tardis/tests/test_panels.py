"""Matrices in panels hold the same numbers, and products, folded FFNs and models with them compute the same."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from folds import SETTINGS, text
from marks import mostly_long
from models import LAYERS, tiny_model, tokens
from synthetic import correlated, fallback, generator, half_fixed, neuron_major, normal, packed, random_ffn
from torch import Tensor, nn

from tardis_llm import fold
from tardis_llm.errors import InvalidInputError, TardisError
from tardis_llm.ffn.packed import PackedMatrix, pack
from tardis_llm.ffn.weights import DenseFFN, Storage
from tardis_llm.folding.rounding import quantise
from tardis_llm.folding.stack import store_fold
from tardis_llm.runtime.backend import lay_out, prepare
from tardis_llm.runtime.cpu.backend import CpuFFN
from tardis_llm.runtime.cpu.library import MAX_TOKENS, can_be_in_panels, open_library
from tardis_llm.runtime.cpu.panels import Panels
from tardis_llm.runtime.cpu.structures import Batch, Matrix, Vector
from tardis_llm.runtime.decoding import prepare_decoding
from tardis_llm.runtime.linears.dense import KernelLinear, kernel_linear, lay_out_linears
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import folded_ffns
from tardis_llm.runtime.reference import fixed_neurons

BUILT = open_library()
needs_panels = pytest.mark.skipif(
    BUILT is None or not BUILT.can_be_in_panels(torch.ones(1, 2).bfloat16()),
    reason="the kernels are not built, or this processor lacks AVX-512",
)
#: (out, in): smaller than a panel and a line; divisible by nothing; several panels, blocks and groups
SHAPES = [(3, 6), (37, 100), (70, 518), (100, 1024)]
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
#: tokens of tiles and of several of them, and more than the kernels take at once
TOKENS = [1, 2, 3, 5, 7, 8, 11, 12, 13, 24, 25, 40, MAX_TOKENS]
BITS = [1, 2, 4, 8]


def skip_without_panels(isa: str, matrix: Tensor | PackedMatrix) -> None:
    """Skip the test where an instruction set in use does not multiply such a matrix in panels."""
    if not can_be_in_panels(matrix):
        pytest.skip(f"{isa} has no panels of these")


def product(x: Tensor, matrix: Panels | PackedMatrix, rows: int, bits: int) -> Tensor:
    """By the kernel for up to 64 tokens."""
    assert BUILT is not None
    y = x.new_empty(len(x), rows)
    BUILT.linear(Matrix.of(matrix), Vector.of(None, rows), Batch.of(x, y, bits))
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_matrix_comes_back_as_it_was(shape: tuple[int, int]) -> None:
    for weight in (normal(*shape, seed=1).bfloat16(), normal(*shape, seed=1).half()):
        assert torch.equal(Panels.of(weight).matrix(), weight)
    for bits in BITS:
        for group_size in (64, 256, 2048):
            matrix = packed(*shape, bits, group_size)
            back = Panels.of(matrix).matrix()
            assert isinstance(back, PackedMatrix)
            assert torch.equal(back.planes, matrix.planes) and torch.equal(back.scale, matrix.scale)


def test_what_a_panel_has_where() -> None:
    weight = torch.arange(40.0 * 4).view(40, 4).bfloat16()
    panels = Panels.of(weight)
    assert panels.data.shape == (2, 2, 32, 2)
    assert torch.equal(panels.data[1, 1, 3], weight[35, 2:]) and not panels.data[1, :, 8:].any()
    panels = Panels.of(weight.half())
    assert panels.data.shape == (2, 4, 32, 1) and torch.equal(panels.data[1, :, 3, 0], weight[35].half())
    codes = torch.randint(4, (40, 32), generator=generator(1))
    panels = Panels.of(PackedMatrix(pack(codes, 2), torch.ones(40, 1).half(), 32, 32))
    assert panels.data.shape == (2, 2, 32, 4)
    expected = sum(int(codes[35, 16 + 4 * q + 3]) << (2 * q) for q in range(4))
    assert panels.data[1, 1, 3, 3] == expected


@needs_panels
def test_matrices_that_cannot_be_in_panels() -> None:
    dense = normal(4, 8, seed=1)
    for matrix in (dense.bfloat16(), dense.half(), dense[:, 1:].half(), dense.T.half()):
        assert can_be_in_panels(matrix)
    for bits, group_size in ((2, 512), (2, 600), (1, 1000), (4, 64), (8, 128)):
        assert can_be_in_panels(packed(4, 600, bits, group_size))
    for matrix in (dense, dense.double(), dense[:0].half(), dense[:, 1:].bfloat16()):
        assert not can_be_in_panels(matrix)
    for bits, group_size in ((3, 64), (2, 48), (2, 192), (2, 320)):
        assert not can_be_in_panels(packed(4, 600, bits, group_size))
    assert lay_out(normal(4, 8, seed=1).bfloat16().to("meta"), torch.bfloat16) is None
    assert lay_out(packed(4, 64, 2, 64), torch.float64) is None


@every_half
@pytest.mark.parametrize("shape", [*SHAPES, (37, 101)], ids=str)
def test_products_of_dense_matrices(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        shape = shape[0], shape[1] // 2 * 2
    weight, bias = normal(*shape, seed=1).to(dtype), normal(shape[0], seed=2).to(dtype)
    skip_without_panels(isa, weight)
    panels, rounding = Panels.of(weight), torch.finfo(dtype).eps / 2
    for count in (*TOKENS, MAX_TOKENS + 1, 256, 263):
        x = normal(count, shape[1], seed=count).to(dtype)
        expected, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        for b in (None, bias):
            found = torch.ops.tardis.linear(x, panels.data, b, outputs=shape[0]).double()
            wanted = expected if b is None else expected + b.double()
            assert ((found - wanted).abs() <= rounding * wanted.abs() + 2**-20 * (size + 1)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_in_few_bits_are_those_of_planes(isa: str, shape: tuple[int, int], bits: int) -> None:
    skip_without_panels(isa, packed(*shape, bits, 64))
    for group_size in (64, 128, 256, 512, 2048):
        matrix = packed(*shape, bits, group_size)
        panels = Panels.of(matrix)
        for count in TOKENS:
            x = normal(count, shape[1], seed=count)
            for activation_bits in (8, 16):
                expected = product(x, matrix, shape[0], activation_bits)
                found = product(x, panels, shape[0], activation_bits)
                assert float((found - expected).abs().max()) <= 4e-6 * float(expected.abs().max())


@every_half
def test_what_a_token_gets_depends_on_no_other(isa: str, dtype: torch.dtype) -> None:
    skip_without_panels(isa, normal(70, 518, seed=1).to(dtype))
    matrix, weight = Panels.of(packed(70, 518, 2, 128)), Panels.of(normal(70, 518, seed=1).to(dtype))
    x = normal(40, 518, seed=2).to(dtype)
    x[17, 3] = torch.nan
    for run in (
        lambda some: product(some, matrix, 70, 8),
        lambda some: torch.ops.tardis.linear(some, weight.data, None, outputs=70),
    ):
        found, alone = run(x), torch.cat([run(one) for one in x.split(1)])
        others = torch.arange(40) != 17
        assert found[17].isnan().all() and torch.equal(found[others], alone[others])


@needs_panels
@every_half
def test_the_operator_passes_the_checks_of_torch_and_refuses_what_it_would_misread(dtype: torch.dtype) -> None:
    x, weight, bias = (normal(*shape, seed=1).to(dtype) for shape in ((8, 12), (10, 12), (10,)))
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    panels, stock = Panels.of(weight).data, torch.ops.tardis.linear.default
    kinds = ("test_schema", "test_faketensor")
    torch.library.opcheck(stock, (x, panels, bias), {"outputs": 10}, test_utils=kinds)

    def run(x: Tensor, data: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        return stock(x, data, bias, outputs=outputs)

    assert run(x[:0], panels, bias, 10).shape == (0, 10)
    for call in (
        lambda: run(x.float(), panels, None, 10),
        lambda: run(x.to(other), panels, None, 10),
        lambda: run(x.to(other), panels.to(other).transpose(2, 3).contiguous(), None, 10),
        lambda: run(x, panels, None, 40),
        lambda: run(x[:, :10].contiguous(), panels, None, 10),
        lambda: run(x, panels, bias[:9], 10),
        lambda: run(x[None], panels, None, 10),
    ):
        with pytest.raises(TardisError):
            call()


@needs_panels
def test_instruction_sets_without_panels_refuse_them() -> None:
    assert BUILT is not None
    panels, x = Panels.of(normal(10, 12, seed=1).bfloat16()), normal(8, 12, seed=2).bfloat16()
    with BUILT.using("portable"):
        assert lay_out(normal(10, 12, seed=1).bfloat16(), torch.bfloat16) is None
        with pytest.raises(TardisError, match="do not fit together"):
            torch.ops.tardis.linear(x, panels.data, None, outputs=10)


def folded(fold_bits: int | None, dtype: torch.dtype = torch.bfloat16) -> tuple[FoldedFFN, DenseFFN]:
    """A folded FFN of width 520 and its dense weights."""
    ffn = random_ffn(520, 700, "gelu")
    weights = half_fixed(ffn)
    storage = Storage(64, fold_bits)
    weights = replace(
        weights,
        fold=store_fold(weights.fold, storage, dtype, None),
        bias=weights.bias.to(dtype),
        predictor=quantise(ffn.w1, 2, 64),
    )
    return FoldedFFN(weights), neuron_major(fallback(ffn, dtype))


@pytest.mark.parametrize(
    ("dtype", "fold_bits"),
    [(torch.bfloat16, None), (torch.bfloat16, 8), (torch.bfloat16, 4), (torch.float16, None), (torch.float16, 8)],
)
@torch.no_grad()
def test_a_folded_ffn_computes_the_same_in_panels(isa: str, dtype: torch.dtype, fold_bits: int | None) -> None:
    module, dense = folded(fold_bits, dtype)
    skip_without_panels(isa, dense.w1)
    before, size = module.state_dict(), module.current.nbytes
    for count in (1, 9, MAX_TOKENS + 3):
        x = correlated(count, 520).to(dtype)
        module.restore()
        expected, fixed = module(x, dense), module.fixed(x, dense)
        module.lay_out(x.dtype)
        assert module.predictor.layout is not None and module.fold.layout is not None
        # sums in another order: a neuron next to a bound may be fixed or not
        assert (module.fixed(x, dense) != fixed).float().mean() < 1e-4
        tolerance = 2.5 * torch.finfo(dtype).eps
        torch.testing.assert_close(module(x, dense), expected, rtol=tolerance, atol=tolerance)
    module.lay_out(dtype)
    assert size <= module.current.nbytes <= 1.2 * size  # the last panel is filled up
    reference_fixed = fixed_neurons(x, module.weights.beside(dense))
    assert (module.fixed(x, dense) != reference_fixed).float().mean() < 0.01
    copied, after = copy.deepcopy(module), module.state_dict()
    assert not module.predictor.layout is not None and not copied.predictor.layout is not None
    for state in (after, copied.state_dict()):
        assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)


@needs_panels
@torch.no_grad()
def test_panels_in_another_dtype_than_the_inputs_go_to_the_reference() -> None:
    module, dense = folded(None, torch.float16)
    module.lay_out(torch.float16)
    weights = module.current.beside(dense)
    assert isinstance(prepare(weights, correlated(3, 520).half()), CpuFFN)
    assert not isinstance(prepare(weights, correlated(3, 520)), CpuFFN)


@needs_panels
@every_half
@torch.no_grad()
def test_a_compiled_model_runs_folded_ffns_in_panels(dtype: torch.dtype) -> None:
    module, dense = folded(None, dtype)
    module.lay_out(dtype)
    x = correlated(3, 520).to(dtype)
    compiled = torch.compile(lambda x: module(x, dense) + 1, backend="eager")
    assert torch.equal(compiled(x), module(x, dense) + 1)


def linear_layer(dtype: torch.dtype) -> nn.Linear:
    """Without gradients."""
    made = nn.Linear(100, 70).to(dtype).requires_grad_(False)
    made.weight.copy_(normal(70, 100, seed=1))
    return made


@needs_panels
@every_half
def test_a_linear_layer_in_panels_saves_moves_and_differentiates_as_before(dtype: torch.dtype) -> None:
    layer, x = linear_layer(dtype), normal(2, 5, 100, seed=2).to(dtype)
    mine, weight = kernel_linear(layer), layer.weight.clone()
    mine.lay_out(dtype)
    with torch.no_grad():
        assert mine.layout is not None and mine(x).shape == (2, 5, 70)
        torch.testing.assert_close(mine(x), F.linear(x, weight, layer.bias))
    given = x.clone().requires_grad_()
    mine(given).sum().backward()
    torch.testing.assert_close(given.grad[0, 0], weight.sum(0))
    assert torch.equal(mine.state_dict()["weight"], weight) and not mine.layout is not None
    mine.lay_out(dtype)
    mine.requires_grad_(True)
    with pytest.raises(InvalidInputError, match="train it before it is prepared"):
        mine(x)
    mine.requires_grad_(False)
    assert torch.equal(mine.float().weight, weight.float())


@needs_panels
def test_a_weight_that_two_modules_share_stays_as_it_lies() -> None:
    layer, other = linear_layer(torch.bfloat16), kernel_linear(nn.Linear(8, 8).bfloat16())
    model = nn.ModuleDict({"one": kernel_linear(layer), "two": kernel_linear(layer), "other": other})
    lay_out_linears(model)
    assert [part.layout is not None for part in model.values() if isinstance(part, KernelLinear)] == [
        False,
        False,
        True,
    ]


@needs_panels
@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_long(
        [("gpt2", torch.bfloat16), ("falcon", torch.bfloat16), ("opt", torch.bfloat16), ("opt", torch.float16)],
        [("falcon", torch.bfloat16), ("opt", torch.float16)],
    ),
)
@torch.no_grad()
def test_a_model_that_is_prepared_for_decoding_keeps_its_probabilities_and_its_folds(
    name: str, dtype: torch.dtype
) -> None:
    model = tiny_model(name).to(dtype)
    fold(model, text(), SETTINGS)
    ids, before = tokens(3, 20), {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(ids).logits.float().log_softmax(-1)
    prepare_decoding(model)
    assert all(ffn.predictor.layout is not None and ffn.fold.layout is not None for ffn in folded_ffns(model).values())
    torch.testing.assert_close(model(ids).logits.float().log_softmax(-1), expected, rtol=0.02, atol=0.06)
    after = model.state_dict()
    folds = [key for key in before if ".tardis." in key]
    assert len(folds) == 8 * LAYERS and all(torch.equal(after[key], before[key]) for key in folds)
