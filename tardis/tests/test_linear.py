"""Dense products of any number of tokens by the kernels, with weights that lie either way."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from synthetic import normal
from torch import Tensor

from tardis_llm.errors import TardisError
from tardis_llm.runtime.backend import linear
from tardis_llm.runtime.cpu import library
from tardis_llm.runtime.cpu.library import MAX_TOKENS, open_library
from tardis_llm.runtime.cpu.operators import multiplies

BUILT = open_library()
needs_gemm = pytest.mark.skipif(
    BUILT is None or not BUILT.has_gemm, reason="the kernels are not built, or this processor lacks AVX-512"
)
#: tokens of tiles and blocks, and some more or fewer
TOKENS = [1, 5, 6, 7, MAX_TOKENS + 1, 256, 263]
#: (out, in): smaller than a register; divisible by nothing; more outputs than a task; more inputs than are packed
SHAPES = [(3, 6), (37, 100), (300, 34), (70, 518)]
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture
def gemm_isa(isa: str) -> str:
    """The kernels run on this instruction set, which has products of any number of tokens."""
    if BUILT is None or not BUILT.has_gemm:
        pytest.skip(f"{isa} has no dense products of many tokens")
    return isa


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels' products that ran."""
    seen: list[str] = []
    for name in ("gemm", "linear"):
        stock = getattr(library.Kernels, name)

        def spy(*arguments: object, name: str = name, stock=stock) -> None:
            seen.append(name)
            stock(*arguments)

        monkeypatch.setattr(library.Kernels, name, spy)
    return seen


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bf16(*shape: int, seed: int) -> Tensor:
    return normal(*shape, seed=seed).bfloat16()


def fp16(*shape: int, seed: int) -> Tensor:
    return normal(*shape, seed=seed).half()


def turned(weight: Tensor) -> Tensor:
    """The same, as the transpose of what is contiguous."""
    return weight.T.contiguous().T


@every_half
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", [*SHAPES, (37, 259)], ids=str)
@torch.no_grad()
def test_products_for_every_shape_and_layout(
    gemm_isa: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype, calls: list[str]
) -> None:
    if dtype == torch.bfloat16:
        shape = shape[0], shape[1] // 2 * 2
    weight, bias, x = (
        normal(*size, seed=seed).to(dtype) for seed, size in enumerate((shape, shape[:1], (tokens, shape[1])))
    )
    rounding = torch.finfo(dtype).eps / 2
    for given in (weight, turned(weight)):
        for b in (None, bias):
            expected = x.double() @ weight.double().T + (0 if b is None else b.double())
            size = x.double().abs() @ weight.double().abs().T  # what fp32 sums are rounded relative to
            found = linear(x, given, b).double()
            assert ((found - expected).abs() <= rounding * expected.abs() + 2**-20 * size).all()
    few = tokens <= MAX_TOKENS
    assert calls == ["linear" if few else "gemm"] * 2 + ["gemm"] * 2


@needs_gemm
@torch.no_grad()
def test_leading_dimensions_stay() -> None:
    weight, x = bf16(10, 12, seed=1), bf16(2, 50, 12, seed=2)
    assert linear(x, weight, None).shape == (2, 50, 10)
    assert linear(x[:, :0], weight, None).shape == (2, 0, 10)


@every_half
@torch.no_grad()
def test_what_a_token_gets_does_not_depend_on_the_threads(gemm_isa: str, dtype: torch.dtype, threads: None) -> None:
    weight, x = normal(700, 600, seed=1).to(dtype), normal(300, 600, seed=2).to(dtype)
    for given in (weight, turned(weight)):
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(linear(x, given, None))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@every_half
@torch.no_grad()
def test_nan_stays_with_its_token(gemm_isa: str, dtype: torch.dtype) -> None:
    weight, x = normal(70, 130, seed=1).to(dtype), normal(100, 130, seed=2).to(dtype)
    x[41, 129] = float("nan")
    for given in (weight, turned(weight)):
        spoilt = linear(x, given, None).isnan()
        assert spoilt[41].all() and spoilt.sum() == 70


@needs_gemm
def test_what_the_kernels_do_not_take_goes_to_torch(calls: list[str]) -> None:
    x, weight = bf16(80, 12, seed=1), bf16(10, 12, seed=2)
    odd, odd_weight = bf16(80, 13, seed=1), bf16(10, 13, seed=2)
    cases = (
        (x.float(), weight.float()),
        (x.double(), weight.double()),
        (odd, odd_weight),
        (x, bf16(10, 24, seed=2)[:, ::2]),  # lies neither way
        (x.requires_grad_(), weight),
    )
    for given, matrix in cases:
        assert torch.equal(linear(given, matrix, None), F.linear(given, matrix))
    assert not calls
    with torch.no_grad():
        linear(x, weight, None)
    assert calls == ["gemm"]


@needs_gemm
@pytest.mark.parametrize("make", [bf16, fp16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_operator_passes_the_checks_of_torch(transposed: bool, make: Callable[..., Tensor]) -> None:
    weight = make(12, 10, seed=2) if transposed else make(10, 12, seed=2)
    call = torch.ops.tardis.linear.default, (make(80, 12, seed=1), weight, make(10, seed=3)), {"transposed": transposed}
    torch.library.opcheck(*call, test_utils=("test_schema", "test_faketensor"))


@needs_gemm
def test_what_gemm_would_misread_is_refused() -> None:
    x, weight, linear = bf16(80, 12, seed=1), bf16(10, 12, seed=2), torch.ops.tardis.linear
    for call in (
        lambda: linear(x.float(), weight.float(), None),
        lambda: linear(x[:8].float(), weight.float().T.contiguous(), None, transposed=True),
        lambda: linear(x.half(), weight, None),
        lambda: linear(x, weight, None, transposed=True),
        lambda: linear(x, turned(weight), None),
        lambda: linear(x, weight, bf16(11, seed=3)),
        lambda: linear(bf16(80, 13, seed=1), bf16(10, 13, seed=2), None),
        lambda: linear(bf16(8, 13, seed=1), bf16(13, 10, seed=2), None, transposed=True),
    ):
        with pytest.raises(TardisError):
            call()


def test_without_avx512_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    if BUILT is None:
        pytest.skip("the CPU kernels are not built: no C++ compiler was found")
    x, weight = bf16(80, 12, seed=1), bf16(10, 12, seed=2)
    with BUILT.using("portable"):
        assert not multiplies(x, weight)
        with torch.no_grad():
            assert torch.equal(linear(x, weight, None), F.linear(x, weight))
        with pytest.raises(TardisError):
            torch.ops.tardis.linear(x, weight, None)
