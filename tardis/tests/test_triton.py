"""The GPU kernels do what the reference does, for every format, batch and fix set, in Triton's interpreter.

Sums are in fp32; what may differ is rounding to the dtype of x, of inputs' products with levels and of residuals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from marks import long, mostly_long
from models import tiny_model, tokens
from synthetic import NAMES, correlated, folded_with, neuron_major, normal, packed, random_ffn, stored_fold
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from interpreted import quick_interpreter
from tardis_llm.errors import KernelsError
from tardis_llm.families.sites import find_ffns
from tardis_llm.ffn.packed import PackedMatrix
from tardis_llm.ffn.weights import DenseFFN, FoldedWeights, Storage
from tardis_llm.pipeline.session import sound_weights
from tardis_llm.runtime import backend as choosing
from tardis_llm.runtime.cpu.backend import CpuBackend
from tardis_llm.runtime.linears.lowbit import LowBitLinear
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import install
from tardis_llm.runtime.reference import fixed_neurons, folded_ffn
from tardis_llm.runtime.triton import backend as gpu
from tardis_llm.runtime.triton.backend import TritonBackend, TritonFFN
from tardis_llm.runtime.triton.codes import Codes, lines, widths, words

needs_triton = pytest.mark.skipif(not gpu.available(), reason="Triton is not installed")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: how far outputs may be from the reference, relative to the largest
BOUNDS = {FP32: 2e-5, BF16: 2e-2, FP16: 3e-3}
DENSE, STACKED, FINE, UNEVEN = Storage(64), Storage(64, 8, 4), Storage(100, 4, 8), Storage(64, 4, 4, remainder_bits=3)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run, in few programs."""
    if not gpu.available():
        pytest.skip("Triton is not installed")
    quick_interpreter(monkeypatch)


@pytest.fixture
def chosen(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's kernels are chosen for tensors in main memory."""
    monkeypatch.setattr(CpuBackend, "accepts", lambda self, x: False)
    monkeypatch.setattr(CpuBackend, "lay_out", lambda self, *args: None)
    monkeypatch.setattr(TritonBackend, "accepts", lambda self, x: x.numel() > 0)
    monkeypatch.setattr(
        TritonBackend,
        "lay_out",
        lambda self, matrix, dtype, by_rows: Codes.of(matrix) if isinstance(matrix, PackedMatrix) else None,
    )


def prepared(folded: FoldedWeights, dense: DenseFFN, dtype: torch.dtype) -> TritonFFN:
    """A folded FFN for the kernels."""
    ffn = TritonBackend().prepare(folded.beside(dense), dtype)
    assert ffn is not None
    return ffn


def assert_near(found: Tensor, expected: Tensor, bound: float) -> None:
    """Of one dtype and shape, and apart by no more than a share of the largest number."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert float((found - expected).float().abs().max()) <= bound * float(expected.float().abs().max())


# ---- codes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_the_same_matrix_in_hardly_more_bytes(bits: int) -> None:
    for columns in (5, 41, 448, 512, 600, 4544):
        matrix = packed(7, columns, bits, 64)
        codes = Codes.of(matrix)
        assert torch.equal(codes.matrix().planes, matrix.planes) and codes.kind == (
            (7, columns), bits, min(64, columns), False,
        )  # fmt: skip
        assert codes.data.shape[1] == words(columns, bits)
        assert 4 * words(columns, bits) - matrix.planes[0].nbytes <= 64 * len(widths(bits))
        assert sum(widths(bits)) == bits and lines(columns, 8) >= 1


def test_the_first_part_of_three_bits_is_that_of_two() -> None:
    codes = torch.randint(8, (3, 512), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    from tardis_llm.ffn.packed import pack

    three, two = (
        Codes.of(PackedMatrix(pack(part, bits), torch.ones(3, 8).half(), 512, 64))
        for part, bits in ((codes, 3), (codes >> 1, 2))
    )
    assert torch.equal(three.data[:, : words(512, 2)], two.data)


# ---- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", mostly_long(range(1, 9), [2, 4, 5, 8]))
@pytest.mark.parametrize(("count", "columns", "group_size"), [(1, 600, 64), (1, 41, 7), (1, 1100, 256), (3, 259, 100)])
def test_low_bit_products(interpreter: None, bits: int, count: int, columns: int, group_size: int) -> None:
    matrix = packed(5, columns, bits, group_size)
    matrix = replace(matrix, has_zero=bits > 2)
    x, bias = normal(count, columns, seed=bits), normal(5, seed=1)
    expected = (x.double() @ matrix.dequantise().double().T + bias).float()
    assert_near(gpu.product(x, Codes.of(matrix), bias), expected, BOUNDS[FP32])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("count", [2, 17, 65])
def test_low_bit_products_of_batches(interpreter: None, dtype: torch.dtype, count: int) -> None:
    matrix, x = packed(37, 200, 4, 64), normal(count, 200).to(dtype)
    found = TritonBackend().linear(x.view(1, count, 200), Codes.of(matrix), None)
    assert found is not None
    expected = (x.double() @ matrix.dequantise().double().T).to(dtype)
    assert_near(found, expected[None], BOUNDS[dtype])


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_matrices_are_written_out_as_the_reference_does(interpreter: None, bits: int) -> None:
    matrix = packed(9, 600, bits, 48)
    torch.testing.assert_close(gpu.numbers(Codes.of(matrix), FP32), matrix.dequantise(), rtol=1e-6, atol=0)


# ---- the folded FFN ------------------------------------------------------------------------------------------------

#: each format with each number of up-projections, batch sizes and dtypes taking turns
CASES = [
    (DENSE, 1, "half", 1, BF16), (DENSE, 1, "half", 64, BF16), (DENSE, 1, "none", 1, FP32), (DENSE, 1, "all", 2, FP32),
    (DENSE, 2, "half", 1, FP16), (DENSE, 2, "all", 9, BF16), (DENSE, 2, "none", 33, FP32), (DENSE, 2, "half", 70, FP32),
    (STACKED, 1, "half", 1, FP32), (STACKED, 1, "all", 1, BF16), (STACKED, 1, "none", 5, BF16), (STACKED, 1, "half", 64, FP32),  # noqa: E501
    (STACKED, 2, "half", 1, BF16), (STACKED, 2, "half", 16, FP32), (STACKED, 2, "all", 65, FP32),
    (FINE, 1, "half", 1, FP32), (FINE, 1, "half", 3, BF16), (UNEVEN, 2, "half", 1, FP32), (UNEVEN, 2, "half", 4, FP16),
]  # fmt: skip
#: without some whose formats, batch sizes and dtypes others have, too
QUICK = [case for case in CASES if case[3] not in (4, 5, 9, 16, 65) and (case[0] is DENSE or case[3] != 64)]


@pytest.mark.parametrize(("storage", "k", "ranges", "count", "dtype"), mostly_long(CASES, QUICK), ids=str)
def test_every_storage_fix_set_and_batch(
    interpreter: None, storage: Storage, k: int, ranges: str, count: int, dtype: torch.dtype
) -> None:
    folded, dense = stored_fold(72, 131, storage, dtype, "silu" if k == 2 else "gelu", ranges, k)
    ffn, x = prepared(folded, dense, dtype), correlated(count, 72, count).to(dtype)
    fixed, expected = ffn.fixed(x), fixed_neurons(x, folded.beside(dense))
    assert float((fixed == expected).float().mean()) > (0.999 if dtype == FP32 else 0.97)  # those next to a bound
    share = float(fixed.float().mean())
    assert share == {"none": 0.0, "all": 1.0}.get(ranges, share) and (ranges != "half" or 0.1 < share < 0.9)
    # the reference with the neurons that the kernels fix
    low = torch.where(fixed, torch.inf, -torch.inf)
    wanted = torch.cat(
        [folded_ffn(one, _fixing(folded, row).beside(dense)) for one, row in zip(x.split(1), low, strict=True)]
    )
    assert_near(ffn(x), wanted, BOUNDS[dtype])


def _fixing(folded: FoldedWeights, low: Tensor) -> FoldedWeights:
    """The fold with ranges that every prediction is in, or none."""
    return replace(folded, neurons=replace(folded.neurons, low=low, high=-low))


@pytest.mark.parametrize("name", NAMES)
def test_every_activation(interpreter: None, name: str) -> None:
    for k, count in ((1, 1), (2, 3)):
        folded, dense = stored_fold(40, 60, DENSE, FP32, name, "all", k)
        x = correlated(count, 40)
        assert_near(prepared(folded, dense, FP32)(x), folded_ffn(x, folded.beside(dense)), BOUNDS[FP32])


@pytest.mark.parametrize("storage", [DENSE, STACKED], ids=str)
@pytest.mark.parametrize("with_fold", [True, False])
def test_fold_and_biases_may_be_missing(interpreter: None, storage: Storage, with_fold: bool) -> None:
    folded, dense = stored_fold(41, 70, storage, FP32, ranges="all")
    weights = replace(folded.beside(replace(dense, b1=None)), **({} if with_fold else {"fold": None, "bias": None}))
    ffn, x = TritonBackend().prepare(weights, FP32), correlated(2, 41)
    assert ffn is not None
    assert_near(ffn(x), folded_ffn(x, weights), BOUNDS[FP32])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("storage", "k"), mostly_long([(DENSE, 1), (STACKED, 2)], [(DENSE, 1)]), ids=str)
def test_nan_and_infinities_come_out_where_they_came_in_and_nowhere_else(
    interpreter: None, storage: Storage, k: int
) -> None:
    folded, dense = stored_fold(72, 131, storage, FP32, k=k)
    ffn, clean = prepared(folded, dense, FP32), correlated(6, 72)
    x = clean.clone()
    x[2, 7], x[4, 1] = torch.nan, torch.inf
    y = ffn(x)
    others = torch.tensor([0, 1, 3, 5])
    assert y[2].isnan().all() and not y[4].isfinite().any()
    torch.testing.assert_close(y[others], ffn(clean)[others], rtol=1e-5, atol=1e-5)  # more neurons are fixed
    assert ffn(x[2:3]).isnan().all() and ffn.fixed(x[2:3]).all()


def test_nan_counts_as_out_of_range(interpreter: None) -> None:
    ffn = random_ffn(40, 33)
    folded = folded_with(ffn, torch.full((33,), -torch.inf), torch.full((33,), torch.inf))
    x = correlated(3, 40)
    x[1, 2] = torch.nan
    assert prepared(folded, neuron_major(ffn), FP32).fixed(x).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("count", mostly_long([1, 40, 70], [40]))
def test_every_neuron_is_computed_by_the_weights_in_few_bits(interpreter: None, count: int) -> None:
    folded, dense = stored_fold(72, 131, UNEVEN, FP32, k=2)
    ffn, x = prepared(folded, dense, FP32), correlated(count, 72)
    assert ffn.quick_exact(x)
    assert_near(ffn.exact(x, dense.b2), folded.beside(dense).exact(x, dense.b2), BOUNDS[FP32])


@long
def test_results_are_the_same_each_time(interpreter: None) -> None:
    folded, dense = stored_fold(72, 131, STACKED, BF16)
    ffn, x = prepared(folded, dense, BF16), correlated(3, 72).to(BF16)
    assert torch.equal(ffn(x), ffn(x))


def test_what_the_kernels_cannot_read_is_left_to_the_reference() -> None:
    folded, dense = stored_fold(72, 131, DENSE, BF16)
    backend, weights = TritonBackend(), folded.beside(dense)
    assert backend.prepare(weights, FP32) is None  # dense weights in another dtype
    assert backend.prepare(folded.beside(replace(dense, w2=dense.w2.contiguous())), BF16) is None


# ---- how it is chosen ----------------------------------------------------------------------------------------------


def test_it_is_chosen_on_gpus_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "available", lambda: True)
    with FakeTensorMode():
        there, none = (torch.empty(count, 8, dtype=BF16, device="cuda") for count in (1, 0))
        assert choosing.backend_for(there).name == "triton"
        assert choosing.backend_for(torch.empty(1, 8, dtype=BF16)).name != "triton"
        assert choosing.backend_for(there.double()).name == choosing.backend_for(none).name == "reference"


def test_without_triton_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "available", lambda: False)
    with FakeTensorMode(), pytest.raises(KernelsError, match=r"pip install triton.*TARDIS_KERNELS=off"):
        choosing.backend_for(torch.empty(1, 8, dtype=BF16, device="cuda"))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_a_model_computes_as_by_the_reference_and_keeps_its_weights(
    chosen: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(name, blocks=1), tokens(1, 3)
    for site in find_ffns(model):
        install(model, site, FoldedFFN(_narrow(sound_weights(site).in_fp32())))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model(ids).logits
    for key, before in state.items():
        assert torch.equal(model.state_dict()[key], before)
    monkeypatch.setattr(TritonBackend, "accepts", lambda self, x: False)
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)


@long
@torch.no_grad()
def test_what_is_stored_in_few_bits_is_laid_out_at_the_first_call_and_put_back_when_it_is_saved(chosen: None) -> None:
    folded, dense = stored_fold(72, 131, STACKED, FP32)
    module, x = FoldedFFN(folded), correlated(2, 72)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    y = module(x, dense)
    assert all(isinstance(getattr(module, part).layout, Codes) for part in ("fold", "predictor", "remainder", "down"))
    assert torch.equal(module(x, dense), y)
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(module(x, dense), y)
    old = module.swap(replace(folded, bias=folded.bias + 1))
    torch.testing.assert_close(module(x, dense), y + 1)
    module.swap(old)
    assert torch.equal(module(x, dense), y)


@torch.no_grad()
def test_linear_layers_in_few_bits_are_laid_out_at_the_first_call(chosen: None) -> None:
    matrix, bias = packed(30, 200, 4, 64), normal(30, seed=2)
    layer, x = LowBitLinear(matrix, bias, FP32), normal(2, 3, 200)
    assert_near(layer(x), x @ matrix.dequantise().T + bias, BOUNDS[FP32])
    assert isinstance(layer.layout, Codes) and torch.equal(layer.planes, matrix.planes)


# ---- graphs --------------------------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """Names of the operators of torch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("storage", "k"), [(DENSE, 1), (STACKED, 2)], ids=str)
def test_a_step_of_decoding_does_nothing_but_make_room_and_launch(
    storage: Storage, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not gpu.available():
        pytest.skip("Triton is not installed")
    from tardis_llm.runtime.triton.launch import Launch

    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(Launch, "run", lambda launch: grids.append(launch.grid))
    folded, dense = stored_fold(72, 131, storage, BF16, k=k)
    ffn = prepared(folded, dense, BF16)
    for x in (torch.zeros(4, 72).to(BF16), correlated(4, 72).to(BF16)):
        with Recorded() as seen:
            ffn(x)
        assert seen.names <= {"empty", "new_empty", "view", "detach"}  # no nonzero, no item, no copy to the host
    assert grids[:5] == grids[5:] and len(grids) == 10  # and the same for all inputs


@pytest.mark.parametrize("count", [1, 16])
def test_a_layer_in_few_bits_does_nothing_but_make_room_and_launch(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not gpu.available():
        pytest.skip("Triton is not installed")
    from tardis_llm.runtime.triton.launch import Launch

    launched: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch))
    matrix, bias, x = Codes.of(packed(30, 72, 4, 64)), normal(30).to(BF16), correlated(count, 72).to(BF16)
    with Recorded() as seen:
        y = TritonBackend().linear(x, matrix, bias)
    assert y is not None and y.shape == (count, 30) and len(launched) == 1
    assert seen.names <= {"empty", "new_empty", "view", "detach"}


@torch.no_grad()
def test_the_operators_pass_the_checks_of_torch(chosen: None) -> None:
    folded, dense = stored_fold(40, 48, DENSE, FP32)
    module, layer, x = FoldedFFN(folded), LowBitLinear(packed(30, 40, 4, 64), None, FP32), correlated(2, 40)
    checks = ("test_schema", "test_faketensor")
    arguments = (x, module.number, dense.w1, dense.b1, dense.w2, dense.b2, False)
    for operator, given in (
        (torch.ops.tardis.numbered_ffn.default, arguments),
        (torch.ops.tardis.numbered_linear.default, (x, layer.number, 30)),
    ):
        assert set(torch.library.opcheck(operator, given, test_utils=checks).values()) == {"SUCCESS"}


def operators(found: list[str]) -> Callable[..., Callable[..., Any]]:
    """A compiler that runs graphs as they are and notes their operators."""

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    return compiler


@pytest.mark.parametrize("name", mostly_long(["gpt2", "llama"], ["gpt2"]))
@torch.no_grad()
def test_a_folded_model_traces_whole_with_one_operator_for_each_ffn(chosen: None, name: str) -> None:
    model, ids, found = tiny_model(name, blocks=2), tokens(1, 2), []
    sites = find_ffns(model)
    for site in sites:
        install(model, site, FoldedFFN(_narrow(sound_weights(site).in_fp32())))
    expected = model(ids, use_cache=False).logits
    logits = torch.compile(model, backend=operators(found), fullgraph=True)(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected)
    assert sum("numbered_ffn" in each for each in found) == len(sites)


@torch.no_grad()
def test_folded_ffns_and_layers_in_few_bits_trace_on_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model cannot: without CUDA, torch cannot take parts of a tensor that says it is on a GPU."""
    monkeypatch.setattr(gpu, "available", lambda: True)
    found: list[str] = []
    folded, dense = stored_fold(72, 131, STACKED, BF16)
    ffn, layer = FoldedFFN(folded), LowBitLinear(packed(30, 72, 4, 64), None, BF16)

    def run(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return layer(ffn(x, DenseFFN(w1, b1, w2, b2, dense.activation)))

    with FakeTensorMode():
        x, *tensors = (
            torch.empty(part.shape, dtype=BF16, device="cuda") for part in (torch.empty(3, 72), *dense.tensors)
        )
        y = torch.compile(run, backend=operators(found), fullgraph=True)(x, *tensors)
    assert y.is_cuda and y.shape == (3, 30)
    assert [each for each in found if "numbered" in each] == ["tardis.numbered_ffn", "tardis.numbered_linear"]


def _narrow(ffn: DenseFFN) -> FoldedWeights:
    """A fold whose ranges many predictions leave."""
    width = torch.full((ffn.h,), 0.1)
    return folded_with(ffn, -width, width)


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    """Graphs of one test are not found by the next."""
    yield
    torch.compiler.reset()
