"""What serving engines call, for any number of tokens, with and without kernels, by the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tardis_llm.checkpoint.format import LayerFormat
from tardis_llm.ffn.activations import ACTIVATIONS
from tardis_llm.ffn.packed import PackedMatrix
from tardis_llm.ffn.weights import FFNWeights, FoldedWeights
from tardis_llm.runtime.cpu import ops
from tardis_llm.runtime.cpu.library import available
from tardis_llm.runtime.fixing import Fixing, packed_linear
from tardis_llm.runtime.reference import folded_ffn

D, H, GROUP = 72, 200, 32


def random_ffn(fallback_bits: int | None, dtype: torch.dtype, fold_bits: int | None = None) -> FoldedWeights:
    """Random weights whose ranges leave about a third of the neurons outside, and a fold of zero."""
    layer = LayerFormat("gelu_tanh", 2, GROUP, "float16", fold_bits, fallback_bits)
    ffn = layer.empty(D, H, dtype, torch.device("cpu"))
    for name, tensor in ffn.state_dict().items():
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        elif name.endswith("scale"):
            tensor.uniform_(0.05, 0.1)
        else:
            tensor.zero_()
    ffn.low.fill_(-1.0), ffn.high.fill_(0.9)
    ffn.slope.uniform_(0, 1), ffn.offset.uniform_(-0.1, 0.1)
    return ffn.weights


def fixing_of(folded: FoldedWeights, dense: FFNWeights) -> Fixing:
    ranges = folded.low, folded.high, folded.slope, folded.offset
    up, down = dense.w1, dense.w2.T.contiguous()
    if folded.fallback:
        up, down = folded.fallback.remainder, folded.fallback.down
    return Fixing("gelu_tanh", folded.predictor, ranges, dense.b1, up, down)


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("fallback_bits", [None, 4, 2])
@pytest.mark.parametrize("kernels", [True, False])
def test_fix_is_the_reference_without_a_fold(
    tokens: int, fallback_bits: int | None, kernels: bool, monkeypatch: pytest.MonkeyPatch
):
    if not kernels:
        monkeypatch.setattr(ops, "takes", lambda x: False)
    torch.manual_seed(tokens)
    folded = random_ffn(fallback_bits, torch.float32)
    dense = FFNWeights(torch.randn(H, D) / 8, torch.randn(H) / 8, torch.randn(D, H) / 8, None)
    x = torch.randn(tokens, D)
    if folded.fallback:
        w1, w2 = folded.fallback.matrices(folded.predictor, torch.float32)
        dense = dense._replace(w1=w1, w2=w2)
    y = fixing_of(folded, dense)(x)
    expected = folded_ffn(x, folded, dense, ACTIVATIONS["gelu_tanh"])
    assert y.shape == expected.shape
    # kernels round the predictor's inputs, so that a neuron on the very edge of its range may fall on the other side
    assert float((y - expected).norm()) <= (0.1 if kernels else 1e-5) * float(expected.norm())


@pytest.mark.parametrize("tokens", [0, 1, 65])
@pytest.mark.parametrize("fold_bits", [None, 8])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_fold_is_added(tokens: int, fold_bits: int | None, kernels: bool, monkeypatch: pytest.MonkeyPatch):
    if not kernels:
        monkeypatch.setattr(ops, "takes", lambda x: False)
    torch.manual_seed(tokens)
    folded = random_ffn(None, torch.float32, fold_bits)
    dense = FFNWeights(torch.randn(H, D) / 8, torch.randn(H) / 8, torch.randn(D, H) / 8, None)
    fold = folded.weight if fold_bits else torch.randn(D, D)
    weight = fold.dequantise() if isinstance(fold, PackedMatrix) else fold
    x, bias = torch.randn(tokens, D), torch.randn(D)
    fixing = fixing_of(folded, dense)
    expected = fixing(x) + x @ weight.T + bias
    y = replace(fixing, fold=fold, bias=bias)(x)
    assert y.shape == expected.shape
    assert float((y - expected).norm()) <= (0.01 if fold_bits and kernels else 1e-5) * float(expected.norm())


@pytest.mark.skipif(not available(), reason="the CPU kernels are not built, or turned off")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fallback_bits", [None, 4])
def test_a_served_ffn_in_halves_runs_by_the_kernels(
    fallback_bits: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    folded = random_ffn(fallback_bits, dtype)
    dense = FFNWeights(
        *(part.to(dtype) for part in (torch.randn(H, D) / 8, torch.randn(H) / 8, torch.randn(D, H) / 8)), None
    )
    x = torch.randn(70, D).to(dtype)
    fixing = replace(fixing_of(folded, dense), fold=torch.randn(D, D).to(dtype), bias=torch.randn(D).to(dtype))
    expected = fixing.masked(x).float()
    monkeypatch.setattr(Fixing, "masked", lambda *_: pytest.fail("not by the kernels"))
    y = fixing(x)
    assert y.dtype == dtype
    assert float((y.float() - expected).norm()) <= 0.1 * float(expected.norm())


@pytest.mark.parametrize("tokens", [1, 64, 130])
@pytest.mark.parametrize("kernels", [True, False])
def test_packed_linear_is_the_product_with_what_is_stored(tokens: int, kernels: bool, monkeypatch: pytest.MonkeyPatch):
    if not kernels:
        monkeypatch.setattr(ops, "takes", lambda x: False)
    torch.manual_seed(tokens)
    fold = random_ffn(4, torch.float32, fold_bits=8).weight
    x, bias = torch.randn(tokens, D), torch.randn(D)
    y = packed_linear(x, fold, bias)
    expected = x @ fold.dequantise().T + bias
    scale = float(expected.abs().max())
    torch.testing.assert_close(y / scale, expected / scale, rtol=0, atol=1e-2)  # the kernels get x in 8 bits
