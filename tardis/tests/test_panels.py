"""Matrices in panels hold the same numbers, and products, folded FFNs and models with them compute the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from folds import SETTINGS, text
from models import tiny_model, tokens
from synthetic import correlated, generator, half_fixed, normal, packed, random_ffn
from torch import Tensor, nn

from tardis_llm import fold
from tardis_llm.architectures import FFNWeights
from tardis_llm.config import Storage
from tardis_llm.decoding import prepare_decoding
from tardis_llm.errors import TardisError
from tardis_llm.folding.lowbit import PackedMatrix, pack, quantise
from tardis_llm.folding.stack import store_fold
from tardis_llm.runtime import ffn as reference
from tardis_llm.runtime import ops
from tardis_llm.runtime.cpu.library import MAX_TOKENS, Batch, Matrix, Vector, open_library
from tardis_llm.runtime.ffn import FoldedFFN, folded_ffns
from tardis_llm.runtime.linear import KernelLinear, kernel_linear, put_in_panels
from tardis_llm.runtime.panels import Panels, fits

BUILT = open_library()
needs_panels = pytest.mark.skipif(
    BUILT is None or not BUILT.has_panels, reason="the kernels are not built, or this processor lacks AVX-512 with bf16"
)
#: (out, in): smaller than a panel and a line; divisible by nothing; several panels, blocks and groups
SHAPES = [(3, 6), (37, 100), (70, 518), (100, 1024)]
#: tokens of tiles and of several of them, and more than the kernels take at once
TOKENS = [1, 2, 3, 5, 7, 8, 11, 12, 13, 24, 25, 40, MAX_TOKENS]
BITS = [1, 2, 4, 8]


def product(x: Tensor, matrix: Panels | PackedMatrix, rows: int, bits: int) -> Tensor:
    """By the kernel for up to 64 tokens."""
    assert BUILT is not None
    y = x.new_empty(len(x), rows)
    BUILT.linear(Matrix.of(matrix), Vector.of(None), Batch.of(x, y, bits))
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_matrix_comes_back_as_it_was(shape: tuple[int, int]) -> None:
    weight = normal(*shape, seed=1).bfloat16()
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
    codes = torch.randint(4, (40, 32), generator=generator(1))
    panels = Panels.of(PackedMatrix(pack(codes, 2), torch.ones(40, 1).half(), 32, 32))
    assert panels.data.shape == (2, 2, 32, 4)
    expected = sum(int(codes[35, 16 + 4 * q + 3]) << (2 * q) for q in range(4))
    assert panels.data[1, 1, 3, 3] == expected


def test_matrices_that_cannot_be_in_panels() -> None:
    assert fits(normal(4, 8, seed=1).bfloat16())
    assert not fits(normal(4, 8, seed=1)) and not fits(normal(4, 9, seed=1).bfloat16())
    assert not fits(packed(4, 600, 3, 64)) and not fits(packed(4, 600, 2, 48)) and not fits(packed(4, 600, 2, 192))
    assert fits(packed(4, 600, 2, 512)) and fits(packed(4, 600, 2, 600)) and fits(packed(4, 48, 2, 64))
    assert ops.panels_of(normal(4, 8, seed=1).bfloat16().to("meta"), torch.bfloat16) is None
    assert ops.panels_of(packed(4, 64, 2, 64), torch.float16) is None


@needs_panels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_in_bf16(shape: tuple[int, int]) -> None:
    weight, bias = normal(*shape, seed=1).bfloat16(), normal(shape[0], seed=2).bfloat16()
    panels = Panels.of(weight)
    for count in (*TOKENS, MAX_TOKENS + 1, 256, 263):
        x = normal(count, shape[1], seed=count).bfloat16()
        expected, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        for b in (None, bias):
            found = torch.ops.tardis.panels_linear(x, panels.data, b, shape[0]).double()
            wanted = expected if b is None else expected + b.double()
            assert ((found - wanted).abs() <= 2**-8 * wanted.abs() + 2**-20 * (size + 1)).all()


@needs_panels
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_in_few_bits_are_those_of_planes(shape: tuple[int, int], bits: int) -> None:
    for group_size in (64, 128, 256, 512, 2048):
        matrix = packed(*shape, bits, group_size)
        panels = Panels.of(matrix)
        for count in TOKENS:
            x = normal(count, shape[1], seed=count)
            for activation_bits in (8, 16):
                expected = product(x, matrix, shape[0], activation_bits)
                found = product(x, panels, shape[0], activation_bits)
                assert float((found - expected).abs().max()) <= 4e-6 * float(expected.abs().max())


@needs_panels
def test_what_a_token_gets_depends_on_no_other() -> None:
    matrix, weight = Panels.of(packed(70, 518, 2, 128)), Panels.of(normal(70, 518, seed=1).bfloat16())
    x = normal(40, 518, seed=2).bfloat16()
    x[17, 3] = torch.nan
    for run in (
        lambda some: product(some, matrix, 70, 8),
        lambda some: torch.ops.tardis.panels_linear(some, weight.data, None, 70),
    ):
        found, alone = run(x), torch.cat([run(one) for one in x.split(1)])
        others = torch.arange(40) != 17
        assert found[17].isnan().all() and torch.equal(found[others], alone[others])


@needs_panels
def test_the_operator_passes_the_checks_of_torch_and_refuses_what_it_would_misread() -> None:
    x, weight, bias = (normal(*shape, seed=1).bfloat16() for shape in ((8, 12), (10, 12), (10,)))
    panels, run = Panels.of(weight).data, torch.ops.tardis.panels_linear
    torch.library.opcheck(run.default, (x, panels, bias, 10), test_utils=("test_schema", "test_faketensor"))
    assert run(x[:0], panels, bias, 10).shape == (0, 10)
    for call in (
        lambda: run(x.float(), panels, None, 10),
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
        assert ops.panels_of(normal(10, 12, seed=1).bfloat16(), torch.bfloat16) is None
        with pytest.raises(TardisError, match="do not fit together"):
            torch.ops.tardis.panels_linear(x, panels.data, None, 10)


def folded(fold_bits: int | None) -> tuple[FoldedFFN, FFNWeights]:
    """A folded FFN of width 520 in bf16 and its dense weights."""
    ffn = random_ffn(520, 700, "gelu")
    weights = half_fixed(ffn)
    storage = Storage(64, fold_bits)
    weights = replace(
        weights,
        weight=store_fold(weights.weight, storage, torch.bfloat16, None),
        bias=weights.bias.bfloat16(),
        predictor=quantise(ffn.w1, 2, 64),
    )
    dense = FFNWeights(*(tensor.bfloat16() for tensor in (ffn.w1, ffn.b1, ffn.w2, ffn.b2)))
    return FoldedFFN(weights, "gelu"), dense._replace(w2=dense.w2.T.contiguous().T)


@needs_panels
@pytest.mark.parametrize("fold_bits", [None, 8, 4])
@torch.no_grad()
def test_a_folded_ffn_computes_the_same_in_panels(fold_bits: int | None) -> None:
    module, dense = folded(fold_bits)
    before, size = module.state_dict(), module.nbytes
    for count in (1, 9, MAX_TOKENS + 3):
        x = correlated(count, 520).bfloat16()
        module.unpack()
        expected, fixed = module(x, dense), module.fixed(x, dense)
        module.pack(x.dtype)
        assert module.predictor.in_panels and module.fold.in_panels
        # sums in another order: a neuron next to a bound may be fixed or not
        assert (module.fixed(x, dense) != fixed).float().mean() < 1e-4
        torch.testing.assert_close(module(x, dense), expected, rtol=0.02, atol=0.02)
    assert size <= module.nbytes <= 1.2 * size  # the last panel is filled up
    reference_fixed = reference.fixed_neurons(x, module.weights, dense.b1)
    assert (module.fixed(x, dense) != reference_fixed).float().mean() < 0.01
    copied, after = copy.deepcopy(module), module.state_dict()
    assert not module.predictor.in_panels and not copied.predictor.in_panels
    for state in (after, copied.state_dict()):
        assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)


@needs_panels
@torch.no_grad()
def test_a_compiled_model_runs_folded_ffns_in_panels() -> None:
    module, dense = folded(None)
    module.pack(torch.bfloat16)
    x = correlated(3, 520).bfloat16()
    compiled = torch.compile(lambda x: module(x, dense) + 1, backend="eager")
    assert torch.equal(compiled(x), module(x, dense) + 1)


@pytest.fixture
def layer() -> Iterator[nn.Linear]:
    """A linear layer in bf16."""
    made = nn.Linear(100, 70).bfloat16().requires_grad_(False)
    made.weight.copy_(normal(70, 100, seed=1))
    yield made


@needs_panels
def test_a_linear_layer_in_panels_saves_moves_and_differentiates_as_before(layer: nn.Linear) -> None:
    mine, x = kernel_linear(layer), normal(2, 5, 100, seed=2).bfloat16()
    weight = layer.weight.clone()
    mine.pack(torch.bfloat16)
    with torch.no_grad():
        assert mine.in_panels and mine(x).shape == (2, 5, 70)
        torch.testing.assert_close(mine(x), F.linear(x, weight, layer.bias))
    given = x.clone().requires_grad_()
    mine(given).sum().backward()
    torch.testing.assert_close(given.grad[0, 0], weight.sum(0))
    assert torch.equal(mine.state_dict()["weight"], weight) and not mine.in_panels
    mine.pack(torch.bfloat16)
    assert torch.equal(mine.float().weight, weight.float())


@needs_panels
def test_a_weight_that_two_modules_share_stays_as_it_lies(layer: nn.Linear) -> None:
    other = kernel_linear(nn.Linear(8, 8).bfloat16())
    model = nn.ModuleDict({"one": kernel_linear(layer), "two": kernel_linear(layer), "other": other})
    put_in_panels(model)
    assert [part.in_panels for part in model.values() if isinstance(part, KernelLinear)] == [False, False, True]


@needs_panels
@pytest.mark.parametrize("name", ["gpt2", "falcon", "opt"])
@torch.no_grad()
def test_a_model_that_is_prepared_for_decoding_keeps_its_probabilities_and_its_folds(name: str) -> None:
    model = tiny_model(name).bfloat16()
    fold(model, text(), SETTINGS)
    ids, before = tokens(3, 20), {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(ids).logits.float().log_softmax(-1)
    prepare_decoding(model)
    assert all(ffn.predictor.in_panels for ffn in folded_ffns(model).values())
    torch.testing.assert_close(model(ids).logits.float().log_softmax(-1), expected, rtol=0.02, atol=0.06)
    after = model.state_dict()
    folds = [key for key in before if ".tardis." in key]
    assert len(folds) > 20 and all(torch.equal(after[key], before[key]) for key in folds)
