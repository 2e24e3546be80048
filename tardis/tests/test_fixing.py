"""The operators that serving engines call, for any number of tokens, with and without kernels, by the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tardis_llm.activations import ACTIVATIONS
from tardis_llm.architectures import FFNWeights
from tardis_llm.checkpoint import LayerFormat
from tardis_llm.folding.fold import FoldedWeights
from tardis_llm.runtime import fixing, ops
from tardis_llm.runtime.ffn import folded_ffn

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


def arguments(x: Tensor, folded: FoldedWeights, dense: FFNWeights) -> tuple:
    """As `tardis::fix` takes them."""
    fallback = folded.fallback
    up, down = [dense.w1], [dense.w2.T.contiguous()]
    if fallback:
        up = [fallback.remainder.planes, fallback.remainder.scale] if fallback.remainder else []
        down = [fallback.down.planes, fallback.down.scale]
    predictor = [folded.predictor.planes, folded.predictor.scale]
    ranges = [folded.low, folded.high, folded.slope, folded.offset]
    return x, "gelu_tanh", predictor, ranges, dense.b1, up, down, [GROUP] * 3


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
    y = torch.ops.tardis.fix(*arguments(x, folded, dense))
    expected = folded_ffn(x, folded, dense, ACTIVATIONS["gelu_tanh"])
    assert y.shape == expected.shape
    # kernels round the predictor's inputs, so that a neuron on the very edge of its range may fall on the other side
    assert float((y - expected).norm()) <= (0.1 if kernels else 1e-5) * float(expected.norm())


@pytest.mark.parametrize("tokens", [1, 64, 130])
@pytest.mark.parametrize("kernels", [True, False])
def test_packed_linear_is_the_product_with_what_is_stored(tokens: int, kernels: bool, monkeypatch: pytest.MonkeyPatch):
    if not kernels:
        monkeypatch.setattr(ops, "takes", lambda x: False)
    torch.manual_seed(tokens)
    fold = random_ffn(4, torch.float32, fold_bits=8).weight
    x, bias = torch.randn(tokens, D), torch.randn(D)
    y = torch.ops.tardis.packed_linear(x, fold.planes, fold.scale, GROUP, bias)
    expected = x @ fold.dequantise().T + bias
    scale = float(expected.abs().max())
    torch.testing.assert_close(y / scale, expected / scale, rtol=0, atol=1e-2)  # the kernels get x in 8 bits


@pytest.mark.parametrize("tokens", [3, 65])
def test_a_tracer_sees_one_operator_for_every_number_of_tokens(tokens: int):
    torch.manual_seed(0)
    folded = random_ffn(4, torch.float32)
    dense = FFNWeights(torch.empty(0), torch.randn(H) / 8, torch.empty(0), None)
    given = arguments(torch.randn(tokens, D), folded, dense)
    torch.library.opcheck(torch.ops.tardis.fix.default, given)

    def doubled(x: Tensor) -> Tensor:
        return 2 * torch.ops.tardis.fix(x, *given[1:])

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(given[0]), doubled(given[0]))
    assert fixing.MAX_TOKENS == 64
