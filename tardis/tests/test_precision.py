"""Products in dtypes that the CPU has no arithmetic for are computed in fp32, and differ by rounding only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tardis_llm import precision
from tardis_llm.precision import quick_products

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype that the CPU is said to have no arithmetic for."""
    monkeypatch.setattr(precision, "slow_dtypes", lambda: frozenset([request.param]))
    dtype: torch.dtype = request.param
    return dtype


def products(x: Tensor, w: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Every product of a model's kind, of x [32, 8], w [4, 8] and b [4]."""
    heads = x.view(1, 2, 16, 8)
    return {
        "linear": F.linear(x, w, b),
        "at": x @ w.T,
        "addmm": torch.addmm(b, x, w.T),
        "bmm": torch.bmm(x[None], w.T[None]),
        "attention": F.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
    }


def test_results_are_those_of_fp32_rounded_once(slow: torch.dtype):
    torch.manual_seed(0)
    x, w, b = (torch.randn(*shape).to(slow) for shape in ((32, 8), (4, 8), (4,)))
    expected = products(x.float(), w.float(), b.float())
    with quick_products():
        found = products(x, w, b)
    for name, value in found.items():
        assert value.dtype == slow, name
        assert torch.equal(value, expected[name].to(slow)), name


def test_gradients_go_through_it(slow: torch.dtype):
    x = torch.randn(32, 8).to(slow).requires_grad_()
    w = torch.randn(4, 8).to(slow)
    with quick_products():
        F.linear(x, w).float().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.float(), w.float().sum(0).expand(32, 8), atol=0.05, rtol=0.01)


def test_few_rows_and_other_dtypes_are_left_alone(slow: torch.dtype):
    seen: list[torch.dtype] = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func in (F.linear, torch.addmm):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    w = torch.randn(4, 8)
    with Counting(), quick_products():
        F.linear(torch.randn(16, 8).to(slow), w.to(slow))
        F.linear(torch.randn(17, 8).to(slow), w.to(slow))
        F.linear(torch.randn(17, 8), w)
        torch.addmm(torch.randn(4).to(slow), torch.randn(17, 8).to(slow), w.T.to(slow))
        torch.addmm(torch.randn(4).to(slow), torch.randn(16, 8).to(slow), w.T.to(slow))
    assert seen == [slow, torch.float32, torch.float32, torch.float32, slow]


def test_without_onednn_nothing_is_known_to_be_slow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert precision.slow_dtypes() == frozenset()


def test_a_cpu_with_the_arithmetic_computes_as_it_would(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "slow_dtypes", frozenset)
    x, w = torch.randn(32, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    expected = F.linear(x, w)
    with quick_products():
        assert torch.equal(F.linear(x, w), expected)
