"""Steps that the kernels run whole give what the modules of transformers give, whatever calls them."""

from __future__ import annotations

import pytest
import torch
from folds import folds_at_random
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tardis_llm.config import Select
from tardis_llm.families.steps import STEPS
from tardis_llm.families.table import FAMILIES
from tardis_llm.ffn.weights import Storage
from tardis_llm.pipeline.linears import quantise_linears
from tardis_llm.runtime.cpu.library import open_library
from tardis_llm.runtime.decoding import prepare_decoding
from tardis_llm.runtime.placing import folded_ffns, install
from tardis_llm.runtime.stepping.cache import GrowingCache
from tardis_llm.runtime.stepping.forward import cache_for, stepping

pytestmark = pytest.mark.skipif(open_library() is None, reason="the CPU kernels are not built")

_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}
_SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
_GROUPS = {"num_key_value_heads": 2, "intermediate_size": 96}
_CONFIGS = {
    "falcon": {"bias": False},
    "gemma3_text": {**_GROUPS, **_SLIDING, "head_dim": 32},
    "ministral": {**_GROUPS, "head_dim": 16, "layer_types": ["full_attention"] * 3},
    "mistral": {**_GROUPS, "sliding_window": 5},
    "phi": {"intermediate_size": 96, "partial_rotary_factor": 0.5},
    "phi3": {**_GROUPS, "pad_token_id": 0},
    "qwen3": {**_GROUPS, "head_dim": 32},
    "starcoder2": {**_GROUPS, "sliding_window": None},
}


def _model(kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **{**_SIZES, **_CONFIGS.get(kind, _GROUPS), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for part in model.parameters():
        part.data.normal_(0, 0.15)
    return model.to(dtype)


def _ids(*shape: int) -> Tensor:
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor, cache: GrowingCache | None, first: int = 5) -> Tensor:
    """[batch, steps, vocabulary] of tokens that follow the first ones one by one."""
    output = model(input_ids=ids[:, :first], past_key_values=cache, use_cache=True)
    cache, found = output.past_key_values, []
    for at in range(first, ids.shape[1]):
        found.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1).float()


def _both(model: PreTrainedModel, ids: Tensor, first: int = 5) -> tuple[Tensor, Tensor]:
    """Logits by the modules and by the kernels, all steps of which ran whole."""
    wanted = _logits(model, ids, None, first)
    with stepping(model) as steps:
        found = _logits(model, ids, cache_for(model), first)
    assert steps.why_not == ""
    assert steps.count == ids.shape[1] - first
    return wanted, found


def _apart(found: Tensor, wanted: Tensor) -> float:
    """By how much logits differ, of their spread."""
    return float((found - wanted).square().mean().sqrt() / wanted.std())


@pytest.mark.parametrize("kind", sorted(STEPS))
def test_each_family_in_fp32(kind: str) -> None:
    model = _model(kind)
    prepare_decoding(model)
    wanted, found = _both(model, _ids(1, 14))
    assert torch.allclose(found, wanted, atol=2e-4 * float(wanted.std()), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_instruction_set_in_16_bits(isa: str, dtype: torch.dtype) -> None:
    model = _model("qwen2", dtype)
    prepare_decoding(model)
    wanted, found = _both(model, _ids(2, 12))
    assert _apart(found, wanted) < 0.02


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_several_sequences_and_layers_in_few_bits(batch: int) -> None:
    model = _model("llama", torch.bfloat16)
    quantise_linears(model, 4, 32)
    prepare_decoding(model)
    wanted, found = _both(model, _ids(batch, 10))
    assert _apart(found, wanted) < 0.02


@pytest.mark.parametrize("kind", ["falcon", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("storage", [Storage(64), Storage(64, 8, 4)], ids=["dense weights", "few bits"])
def test_folded_ffns(kind: str, storage: Storage) -> None:
    model, ids = _model(kind), _ids(2, 10)
    for site, ffn in folds_at_random(model, 2, storage, 0.3):
        install(model, site, ffn)
    prepare_decoding(model)
    wanted, found = _both(model, ids)
    assert _apart(found, wanted) < 0.05  # a neuron next to a bound goes either way
    for ffn in folded_ffns(model).values():
        ffn.exact = True
    with stepping(model) as steps:
        exact = _logits(model, ids, cache_for(model))
    assert "every neuron" in steps.why_not
    assert _apart(exact, wanted) > 0.05


@pytest.mark.parametrize("kind", ["falcon", "qwen2"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("select", ["static", "mixed"])
def test_folds_that_keep_neurons(kind: str, batch: int, select: Select) -> None:
    model, ids = _model(kind, torch.bfloat16), _ids(batch, 10)
    for site, ffn in folds_at_random(model, 2, Storage(32, 4, 4), 0.2, select):
        install(model, site, ffn)
    prepare_decoding(model)
    wanted, found = _both(model, ids)
    assert _apart(found, wanted) < 0.03


@pytest.mark.parametrize("select", ["dynamic", "static", "mixed"])
def test_threads_that_stay_together_give_what_one_does(select: Select) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 3072, "vocab_size": 2048}
    model = _model("llama", torch.bfloat16, **sizes)
    for site, ffn in folds_at_random(model, 2, Storage(64, 4, 4), 0.2, select):
        install(model, site, ffn)
    quantise_linears(model, 4, 64)
    prepare_decoding(model)
    before, ids = torch.get_num_threads(), _ids(1, 20)
    try:
        torch.set_num_threads(1)
        wanted, _ = _both(model, ids)
        for threads in (2, 5):  # more than there are cores, too
            torch.set_num_threads(threads)
            with stepping(model) as steps:
                found = [_logits(model, ids, cache_for(model)) for _ in range(2)]
            assert steps.count == 2 * (ids.shape[1] - 5)
            assert all(torch.equal(one, found[0]) for one in found)
            assert _apart(found[0], wanted) < 0.05
    finally:
        torch.set_num_threads(before)


def test_a_long_text_outgrows_the_room_for_it() -> None:
    model = _model("llama")
    prepare_decoding(model)
    wanted, found = _both(model, _ids(1, 266), first=250)
    assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.std()), rtol=1e-3)


def test_heads_that_share_one_key_are_more_than_a_block() -> None:
    model = _model("falcon", hidden_size=70 * 8, num_attention_heads=70)
    prepare_decoding(model)
    wanted, found = _both(model, _ids(2, 9))
    assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.std()), rtol=1e-3)


@pytest.mark.parametrize("choice", [{"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generate_of_transformers_gives_the_same_text(choice: dict[str, object]) -> None:
    model, ids = _model("llama"), _ids(2, 6)
    prepare_decoding(model)
    torch.manual_seed(0)
    wanted = model.generate(ids, max_new_tokens=12, pad_token_id=0, **choice)
    torch.manual_seed(0)
    with stepping(model) as steps:
        found = model.generate(ids, max_new_tokens=12, pad_token_id=0, past_key_values=cache_for(model), **choice)
    assert torch.equal(found, wanted)
    assert steps.count > 0


def test_padding_goes_through_the_modules() -> None:
    model, ids = _model("llama"), _ids(2, 6)
    prepare_decoding(model)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, do_sample=False)
    with stepping(model) as steps:
        cache = cache_for(model)
        found = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, do_sample=False, past_key_values=cache
        )
    assert torch.equal(found, wanted)
    assert steps.count == 0


@pytest.mark.parametrize("other", [{"return_dict": False}, {"position_ids": torch.tensor([[2]])}])
def test_other_wishes_go_through_the_modules(other: dict[str, object]) -> None:
    model, ids = _model("llama"), _ids(1, 7)
    prepare_decoding(model)
    found = []
    for whole in (False, True):
        with torch.no_grad(), stepping(model) as steps:
            cache = cache_for(model)
            model(input_ids=ids[:, :6], past_key_values=cache)
            forward = model if whole else type(model).forward.__get__(model)
            found.append(forward(input_ids=ids[:, 6:], past_key_values=cache, **other)[0])
        assert steps.count == 0
    assert torch.equal(*found)


def test_a_model_that_is_built_otherwise_is_found_out() -> None:
    model, ids = _model("llama"), _ids(1, 9)
    prepare_decoding(model)
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, dense=layer.mlp.forward: 5 * dense(x)
    wanted = _logits(model, ids, None)
    with stepping(model) as steps:
        found = _logits(model, ids, cache_for(model))
    assert torch.allclose(found, wanted, atol=1e-5)
    assert "logits would differ" in steps.why_not


def test_another_layout_of_a_family_keeps_its_modules() -> None:
    model, ids = _model("falcon", new_decoder_architecture=True, num_kv_heads=2), _ids(1, 8)
    prepare_decoding(model)
    with stepping(model) as steps:
        found = _logits(model, ids, cache_for(model))
    assert torch.allclose(found, _logits(model, ids, None), atol=1e-5)
    assert "has no input_layernorm" in steps.why_not


def test_hooks_are_heeded() -> None:
    model, ids = _model("llama"), _ids(1, 8)
    prepare_decoding(model)
    seen: list[torch.Size] = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    with stepping(model) as steps:
        _logits(model, ids, cache_for(model))
    assert len(seen) == 4
    assert "hook" in steps.why_not


def test_a_model_that_is_not_prepared_keeps_its_modules() -> None:
    model, ids = _model("llama"), _ids(1, 8)
    wanted = _logits(model, ids, None)
    with stepping(model) as steps:
        assert torch.equal(_logits(model, ids, cache_for(model)), wanted)
    assert "prepare_decoding" in steps.why_not
    assert "forward" not in vars(model)


def test_weights_that_change_are_read_anew() -> None:
    model, ids = _model("llama"), _ids(1, 8)
    prepare_decoding(model)
    with stepping(model):
        _logits(model, ids, cache_for(model))
        twin = _model("llama")
        twin.load_state_dict({name: 0.9 * part for name, part in twin.state_dict().items()})
        model.load_state_dict(twin.state_dict())
        found = _logits(model, ids, cache_for(model))
    assert torch.allclose(found, _logits(twin, ids, None), atol=1e-4)


def test_the_cache_is_cut_repeated_and_picked_from() -> None:
    cache = GrowingCache(1)
    keys = torch.arange(2 * 3 * 4 * 2.0).view(2, 3, 4, 2)
    cache.update(keys, -keys, 0)
    cache.crop(-1)
    assert torch.equal(cache.layers[0].keys, keys[:, :, :3])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(cache.layers[0].values, -keys[:, :, :3])
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys, keys.flip(0)[:, :, :3])
    cache.reset()
    assert cache.get_seq_length() == 0


def test_every_family_of_the_table_can_be_folded() -> None:
    assert STEPS.keys() <= FAMILIES.keys()
