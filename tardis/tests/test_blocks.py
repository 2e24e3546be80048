"""One block at a time through the whole model's forward gives what the whole model gives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from models import FAMILY_NAMES, record, tiny_model, tokens
from models import HIDDEN as D
from torch import Tensor
from transformers import AutoModel

from tardis_llm.calibration.blocks import run_block, run_head, stream_gain
from tardis_llm.errors import InvalidInputError
from tardis_llm.families.sites import find_ffns, layer_list, only_layer

BLOCKS = 3  # one between the first and the last
model_of = partial(tiny_model, blocks=BLOCKS)
#: variants whose blocks end in a norm behind the sum of residual stream and FFN
ENDS_IN_NORM = ("bert", "roberta", "opt_post_norm")

every_family = pytest.mark.parametrize("name", FAMILY_NAMES)


def padding(ids: Tensor) -> Tensor:
    """A mask [batch, tokens] that hides the last three tokens of the first row."""
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True])
@every_family
def test_blocks_run_one_by_one_reproduce_the_whole_model(name: str, padded: bool) -> None:
    model, ids = model_of(name), tokens()
    mask = padding(ids) if padded else None
    into, out = record(model, list(layer_list(model)), input_ids=ids, attention_mask=mask)
    hidden = None
    for index in range(BLOCKS):
        hidden = run_block(model, index, ids, mask, hidden)
        torch.testing.assert_close(hidden, out[index], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(hidden, into[index], atol=0.1)
    assert hidden is not None
    logits = run_head(model, ids, hidden).logits
    torch.testing.assert_close(logits, model(ids, attention_mask=mask).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "cohere2", "smollm3", "exaone4", "olmo3", "qwen3"])
def test_a_block_gets_the_mask_and_the_rotary_embedding_of_its_own_kind_of_attention(name: str) -> None:
    model, ids = model_of(name), tokens()
    kinds = model.config.layer_types
    assert kinds == ["sliding_attention", "full_attention", "sliding_attention"]
    assert model.config.sliding_window < ids.shape[1]
    hidden = run_block(model, 0, ids)
    own = run_block(model, 1, ids, hidden=hidden)
    with only_layer(model, 1):
        assert model.config.layer_types == kinds[1:2]
    assert model.config.layer_types is kinds
    model.config.layer_types = ["sliding_attention"] * BLOCKS
    assert not torch.allclose(run_block(model, 1, ids, hidden=hidden), own, atol=1e-3)


@every_family
def test_without_hidden_states_a_block_gets_the_embeddings(name: str) -> None:
    model, ids = model_of(name), tokens()
    embeddings = record(model, [layer_list(model)[0]], input_ids=ids)[0][0]
    assert torch.equal(run_block(model, 2, ids), run_block(model, 2, ids, hidden=embeddings))


def test_blocks_run_in_the_dtype_of_the_model() -> None:
    model, ids = model_of("gpt_neox", dtype=torch.bfloat16), tokens()
    hidden = run_block(model, 0, ids)
    assert hidden.dtype == torch.bfloat16
    assert run_head(model, ids, hidden).logits.dtype == torch.bfloat16


def test_a_block_called_with_keywords_only_gets_its_hidden_states() -> None:
    model, ids = model_of("phi"), tokens()
    expected = run_block(model, 1, ids, hidden=torch.ones(2, 12, D))
    layer_list(model)[1].register_forward_pre_hook(
        lambda block, args, kwargs: ((), {"hidden_states": args[0], **kwargs}), with_kwargs=True
    )
    assert torch.equal(run_block(model, 1, ids, hidden=torch.ones(2, 12, D)), expected)


def test_hooks_inside_the_block_fire_and_those_of_other_blocks_do_not() -> None:
    model, seen = model_of("opt"), []
    for site in find_ffns(model):
        site.up.register_forward_hook(lambda module, args, output, i=site.index: seen.append(i))
    run_block(model, 1, tokens())
    assert seen == [1]


def test_a_model_without_lm_head_returns_its_last_hidden_state_from_run_head() -> None:
    model, ids = AutoModel.from_config(model_of("gpt2").config).eval(), tokens()
    hidden = torch.randn(2, 12, D)
    torch.testing.assert_close(run_head(model, ids, hidden).last_hidden_state, model.ln_f(hidden))


def test_the_model_is_as_before_after_run_block_and_run_head() -> None:
    model, ids = model_of("gpt2"), tokens()
    blocks = layer_list(model)
    names = list(model.state_dict())
    run_head(model, ids, run_block(model, 1, ids))
    assert layer_list(model) is blocks
    assert list(model.state_dict()) == names
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "bert"])
def test_hidden_states_are_still_recorded_for_every_block_after_run_block(name: str) -> None:
    model, ids = model_of(name, output_hidden_states=True), tokens()
    run_block(model, 1, ids)
    assert len(model(ids).hidden_states) == BLOCKS + 1


def test_only_layer_puts_the_blocks_back_after_an_exception() -> None:
    model = model_of("falcon")
    blocks = layer_list(model)
    with pytest.raises(KeyError), only_layer(model, 1) as block:
        assert list(layer_list(model)) == [block] == [blocks[1]]
        raise KeyError
    assert layer_list(model) is blocks
    assert len(blocks) == BLOCKS


@pytest.mark.parametrize("index", [-1, BLOCKS])
def test_a_block_that_does_not_exist_is_refused(index: int) -> None:
    with pytest.raises(InvalidInputError, match="from 0 to 2"):
        run_block(model_of("gpt2"), index, tokens())


@pytest.mark.parametrize("hidden", [torch.zeros(2, 11, D), torch.zeros(2, 12, D, dtype=torch.float16)])
def test_hidden_states_of_the_wrong_shape_or_dtype_are_refused_and_the_model_restored(hidden: Tensor) -> None:
    model = model_of("gpt2")
    for run in (
        lambda: run_block(model, 1, tokens(), hidden=hidden),
        lambda: run_head(model, tokens(), hidden),
    ):
        with pytest.raises(InvalidInputError, match=r"this block has \[2, 12, 64\] torch.float32"):
            run()
    assert len(layer_list(model)) == BLOCKS


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"model\.eval\(\)"):
        run_block(model_of("gpt2").train(), 0, tokens())


@every_family
def test_what_a_block_does_with_its_ffns_output_is_measured(name: str) -> None:
    dtype = torch.bfloat16 if name in ("llama", "gemma2", "gpt2", "granite") else torch.float32
    model = model_of(name, dtype=dtype)
    hidden = run_block(model, 0, tokens())
    gain = stream_gain(model, find_ffns(model)[1], tokens(), hidden)
    if name in ENDS_IN_NORM:
        assert gain is None
    else:
        assert gain == pytest.approx(getattr(model.config, "residual_multiplier", 1.0), rel=1e-2)
