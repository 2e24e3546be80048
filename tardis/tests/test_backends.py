"""Every backend that is here computes what the reference does, for any number of tokens, with or without the fold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from marks import in_turns
from synthetic import neuron_major, normal

from tardis_llm.ffn.weights import DenseFFN, FoldedWeights, FoldFormat
from tardis_llm.runtime.backend import BACKENDS, REFERENCE, Backend, linear, prepare
from tardis_llm.runtime.cpu.library import open_library
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.reference import folded_ffn

D, H, GROUP = 72, 200, 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: the GPU's kernels, which need a GPU or Triton's interpreter, have tests of their own
HERE = [backend for backend in BACKENDS if backend.name != "triton"]
BUILT = open_library()
CHOICES = [(backend, name) for backend in HERE for name in (BUILT.isas if backend.name == "cpu" and BUILT else ("",))]


@pytest.fixture(params=CHOICES, ids=lambda choice: f"{choice[0].name} {choice[1]}".strip())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """A backend on one of its instruction sets."""
    chosen, instruction_set = request.param
    if chosen.name == "cpu" and BUILT is None:
        pytest.skip("the CPU kernels are not built: no C++ compiler was found")
    with BUILT.using(instruction_set) if BUILT and instruction_set else nullcontext():
        yield chosen


def random_fold(
    fallback_bits: int | None,
    dtype: torch.dtype,
    fold_bits: int | None = None,
    remainder_bits: int | None = None,
    gated: bool = False,
) -> tuple[FoldedWeights, DenseFFN]:
    """Random weights that fix every third neuron, whatever is predicted, and the dense FFN beside them.

    A prediction next to a bound could fall on either side of it: kernels round a predictor's inputs.
    """
    form = FoldFormat("gelu_tanh", 2, GROUP, "float16", fold_bits, fallback_bits, remainder_bits, gated)
    ffn = FoldedFFN(FoldedWeights.empty(form, D, H, dtype, torch.device("cpu")))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in ffn.state_dict().items():
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256, generator=generator)
        elif name.endswith("scale"):
            tensor.uniform_(0.05, 0.1, generator=generator)
        else:
            tensor.normal_(0, 0.1, generator=generator)
    ffn.low.fill_(-torch.inf), ffn.high.fill_(torch.inf)
    ffn.low[::3], ffn.high[::3] = torch.inf, -torch.inf
    rows = form.k * H
    dense = DenseFFN(normal(rows, D, seed=1) / 8, normal(rows, seed=2) / 8, normal(D, H, seed=3) / 8, None, "gelu_tanh")
    w1, b1, w2 = (part.to(dtype) for part in dense.tensors)
    return ffn.weights, neuron_major(replace(dense, w1=w1, b1=b1, w2=w2))


@pytest.mark.parametrize(
    ("fallback_bits", "fold_bits", "remainder_bits"),
    [(None, None, None), (4, 8, None), (2, None, None), (None, 4, None), (4, 4, 3)],
)
@pytest.mark.parametrize(("gated", "dtype"), in_turns([False, True], DTYPES, every=2))
def test_a_folded_ffn(
    backend: Backend,
    dtype: torch.dtype,
    gated: bool,
    fallback_bits: int | None,
    fold_bits: int | None,
    remainder_bits: int | None,
) -> None:
    folded, dense = random_fold(fallback_bits, dtype, fold_bits, remainder_bits, gated)
    whole = folded.beside(dense)
    for weights in (whole, replace(whole, fold=None, bias=None)):
        prepared, reference = backend.prepare(weights, dtype), REFERENCE.prepare(weights, dtype)
        assert prepared is not None and reference is not None
        for tokens in (0, 1, 64, 200):
            x = normal(tokens, D, seed=tokens).to(dtype)
            y, expected = prepared(x), folded_ffn(x, weights)
            assert y.shape == expected.shape and y.dtype == dtype
            assert torch.equal(prepared.fixed(x), reference.fixed(x))
            assert float((y - expected).float().norm()) <= 0.02 * float(expected.float().norm())


@pytest.mark.parametrize("tokens", [1, 64, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_layers(backend: Backend, dtype: torch.dtype, tokens: int) -> None:
    folded, _ = random_fold(4, dtype, 8)
    x, bias = normal(2, tokens, D, seed=1).to(dtype), normal(D, seed=2).to(dtype)
    dense = (normal(D, D, seed=3) / 8).to(dtype)
    assert folded.fold is not None
    for matrix in (dense, dense.T.contiguous().T, folded.fold, backend.lay_out(dense, dtype) or dense):
        expected = REFERENCE.linear(x, matrix, bias)
        found = backend.linear(x, matrix, bias)
        found = REFERENCE.linear(x, matrix, bias) if found is None else found
        assert found.shape == expected.shape and found.dtype == dtype
        scale = float(expected.abs().max())
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-2)  # x may be rounded to 8 bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_laid_out_is_the_same_matrix(backend: Backend, dtype: torch.dtype) -> None:
    folded, _ = random_fold(None, dtype, 4)
    for matrix in (folded.fold, folded.predictor, normal(40, 64, seed=1).to(dtype)):
        layout = backend.lay_out(matrix, dtype)  # type: ignore[arg-type]
        if layout is not None:
            back = layout.matrix()
            assert type(back) is type(matrix) and layout.nbytes >= back.nbytes
            parts = ("planes", "scale") if hasattr(back, "planes") else ("data",)
            assert all(torch.equal(getattr(back, part), getattr(matrix, part)) for part in parts)


def test_the_reference_computes_where_gradients_flow_or_no_kernel_takes_the_dtype() -> None:
    folded, dense = random_fold(None, torch.float32)
    weights, x = folded.beside(dense), normal(3, D)
    for given in (x.double(), x.clone().requires_grad_()):
        assert type(prepare(weights, given)) is type(REFERENCE.prepare(weights, x.dtype))
    given = x.clone().requires_grad_()
    linear(given, dense.w1, dense.b1).sum().backward()
    torch.testing.assert_close(given.grad, dense.w1.sum(0).expand(3, D))
