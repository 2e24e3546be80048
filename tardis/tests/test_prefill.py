"""Prompts through the dense FFNs or the folds: which forward goes where, and that it computes what it should."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from folds import badly_folded, folds_at_random
from marks import in_turns
from models import tiny_model, tokens
from synthetic import everything_fixed
from torch import Tensor
from transformers import PreTrainedModel

from tardis_llm.checkpoint.folded import mark_folded
from tardis_llm.errors import InvalidInputError
from tardis_llm.families.linear import weight_of
from tardis_llm.families.sites import find_ffns
from tardis_llm.ffn.weights import Storage
from tardis_llm.pipeline.session import sound_weights
from tardis_llm.runtime.cpu.library import available, loaded
from tardis_llm.runtime.decoding import prepare_decoding
from tardis_llm.runtime.linears.dense import KernelConv1D, KernelLinear, kernel_linear
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import folded_ffns, folded_weights, install
from tardis_llm.runtime.prefill import CROSSOVER, Prefill, crossover, set_prefill

NAMES = ("gpt2", "opt", "falcon", "gpt_neox")
FAMILIES = pytest.mark.parametrize("name", NAMES)


@FAMILIES
def test_exact_prompts_are_the_dense_models_and_single_tokens_are_folded(name: str):
    model, dense = badly_folded(name)
    with torch.no_grad():
        folded = model(tokens(2, 12)).logits
        one = model(tokens(2, 12)[:, :1]).logits
        set_prefill(model, "exact")
        torch.testing.assert_close(model(tokens(2, 12)).logits, dense, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(tokens(2, 12)[:, :1]).logits, one)
        assert torch.equal(model(input_ids=tokens(2, 12)[:, :1]).logits, one)
        set_prefill(model, "folded")
        assert torch.equal(model(tokens(2, 12)).logits, folded)
    assert not torch.allclose(folded, dense, atol=1e-2)


def test_auto_folds_up_to_the_recorded_number_of_tokens():
    model, _ = badly_folded("gpt2")
    mark_folded(model, {})
    model.config.quantization_config.crossover = 4
    set_prefill(model, "auto")
    assert exact_with(model, (1, 1), (2, 2), (1, 5), (5, 1)) == [False, False, True, True]


def test_auto_goes_by_the_usual_number_where_none_is_recorded():
    model, _ = badly_folded("gpt2")
    assert crossover(model) == CROSSOVER
    set_prefill(model, "auto")
    assert exact_with(model, (1, CROSSOVER), (1, CROSSOVER + 1)) == [False, True]


@FAMILIES
@torch.no_grad()
def test_the_model_without_its_head_goes_as_the_whole_does(name: str):
    model, _ = badly_folded(name)
    set_prefill(model, "exact")
    prompt = tokens(2, 12)
    for ids in (prompt, prompt[:, :1], prompt):  # each call by itself, whatever the one before was
        whole = model(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(model.base_model(ids).last_hidden_state, whole)


@pytest.mark.parametrize(("name", "mode"), in_turns(NAMES, ["exact", "auto"], 2))
@torch.no_grad()
def test_threads_do_not_choose_for_each_other(name: str, mode: Prefill):
    model, _ = badly_folded(name)
    set_prefill(model, mode)
    prompts = [tokens(1, length) for length in (3, 40, 1, 25, 60, 2)]
    expected = [generated(model, ids) for ids in prompts]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(partial(generated, model), prompts), expected))


def generated(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Ten more tokens."""
    return model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)


@torch.no_grad()
def test_auto_folds_everything_where_nothing_multiplies_with_the_low_bit_weights_as_they_lie():
    model = stacked_model("gpt2", torch.float32)
    prepare_decoding(model)
    ids = tokens(1, CROSSOVER + 1)
    before = model(ids).logits
    set_prefill(model, "auto")
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_exact_prompts_of_a_stacked_fold_are_those_of_its_low_bit_weights(name: str):
    model, rounded = stacked_model(name, torch.float32), tiny_model(name)
    for site, weights in zip(find_ffns(rounded), folded_weights(model).values(), strict=True):
        w1, w2 = weights.fallback(torch.float32)
        for layer, rows in zip(site.projections.values(), w1.chunk(len(site.projections)), strict=True):
            weight_of(layer).copy_(rows)
        weight_of(site.down).copy_(w2)
    ids, one = tokens(2, 12), tokens(2, 12)[:, :1]
    folded, single = model(ids).logits, model(one).logits
    set_prefill(model, "exact")
    torch.testing.assert_close(model(ids).logits, rounded(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(one).logits, single)
    assert not torch.allclose(folded, rounded(ids).logits, atol=1e-3)


@pytest.mark.parametrize(("name", "sizes"), [("gpt2", {}), ("llama", {"intermediate_size": 192})])
@torch.no_grad()
def test_auto_takes_the_kernel_for_many_tokens_in_bf16(name: str, sizes: dict[str, int]):
    if "amx" not in (loaded().isas if available() else ()):
        pytest.skip("this processor or build has no AMX")
    model = stacked_model(name, torch.bfloat16, **sizes)
    prepare_decoding(model)
    ids, few = tokens(1, CROSSOVER + 1), tokens(1, CROSSOVER)
    folded, of_few = model(ids).logits, model(few).logits
    set_prefill(model, "exact")
    exact = model(ids).logits
    set_prefill(model, "auto")
    assert torch.equal(model(ids).logits, exact)
    assert torch.equal(model(few).logits, of_few)
    assert not torch.equal(exact, folded)


def stacked_model(name: str, dtype: torch.dtype, **sizes: int) -> PreTrainedModel:
    """A model whose FFNs are folded at random, with the fallback in 4 bits."""
    model = tiny_model(name, dtype=dtype, **sizes)
    for site, ffn in folds_at_random(model, 2, Storage(64, 8, 4), 0.1):
        install(model, site, ffn)
    return model


@torch.no_grad()
def exact_with(model: PreTrainedModel, *shapes: tuple[int, int]) -> list[bool]:
    """Whether forwards with so many sequences and tokens of each are those of the dense FFNs."""
    ffns = folded_ffns(model).values()
    seen = []
    for batch, length in shapes:
        ids = tokens(batch, length)
        found = model(ids).logits
        for ffn in ffns:
            ffn.exact = True
        seen.append(torch.equal(found, model(ids).logits))
        for ffn in ffns:
            ffn.exact = False
    return seen


def test_modes_that_cannot_be_are_refused():
    model, _ = badly_folded("gpt2")
    with pytest.raises(InvalidInputError, match="give one of folded, exact, auto"):
        set_prefill(model, "dense")  # type: ignore[arg-type]


def test_an_exact_ffn_computes_the_dense_output_whatever_its_fold_is():
    model = tiny_model("gpt2")
    site = find_ffns(model)[0]
    ffn = sound_weights(site).in_fp32()
    weights = site.weights()
    folded = FoldedFFN(everything_fixed(ffn))
    x = torch.randn(3, site.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = folded(x, weights)
    folded.fold.weight.data.zero_()
    folded.exact = True
    torch.testing.assert_close(folded(x, weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_a_kernel_linear_is_its_layer_and_shares_its_weight(name: str, dtype: torch.dtype):
    model = tiny_model(name, dtype=dtype)
    block = model.get_submodule("transformer.h.0")
    layer = block.attn.c_attn if name == "gpt2" else block.self_attention.query_key_value
    mine = kernel_linear(layer)
    assert isinstance(mine, KernelConv1D if name == "gpt2" else KernelLinear)
    assert torch.equal(mine.weight, layer.weight)
    assert name == "gpt2" or mine.weight is layer.weight
    for shape in ((1, 1, 64), (2, 3, 64), (1, 100, 64)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(mine(x), layer(x), rtol=2e-2, atol=2e-2)
            assert mine(x).shape == layer(x).shape
    x.requires_grad_()
    assert mine(x).requires_grad
