"""Speculative decoding of transformers: folded models as targets and as drafts give the target's own text."""

from __future__ import annotations

import copy

import pytest
import torch
from folds import folded_tiny, folds_at_random
from models import tiny_model, tokens
from torch import Tensor
from transformers import PreTrainedModel

from tardis_llm.ffn.weights import Storage
from tardis_llm.runtime.decoding import prepare_decoding
from tardis_llm.runtime.placing import folded_ffns, install

FAMILIES = pytest.mark.parametrize("name", ["gpt2", "llama"])
STORAGES = pytest.mark.parametrize("storage", [Storage(64), Storage(64, 8, 4)], ids=["dense weights", "few bits"])


def folded(model: PreTrainedModel, storage: Storage, fix_rate: float) -> PreTrainedModel:
    """A copy of a model whose FFNs are folded at random."""
    model = copy.deepcopy(model)
    for site, ffn in folds_at_random(model, 2, storage, fix_rate):
        install(model, site, ffn)
    return model


def generated(model: PreTrainedModel, draft: PreTrainedModel | None = None) -> Tensor:
    """24 more tokens, greedily, proposed by a draft if one is given."""
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(tokens(1, 10), assistant_model=draft, **settings)


@FAMILIES
@STORAGES
def test_a_folded_target_writes_its_own_text(name: str, storage: Storage):
    dense = tiny_model(name)
    target = folded(dense, storage, 0.3)
    prepare_decoding(target)
    assert torch.equal(generated(target, dense), generated(target))


@FAMILIES
def test_a_folded_draft_leaves_the_targets_text_and_some_of_it_is_its_own(name: str):
    dense, (draft, _) = tiny_model(name), folded_tiny(name)
    calls: list[int] = []
    dense.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = generated(dense)
    alone = len(calls)
    assert torch.equal(generated(dense, draft), expected)
    assert len(calls) - alone < alone  # accepted tokens save steps of the target


@FAMILIES
def test_a_fold_is_a_draft_for_itself_with_every_neuron_computed(name: str):
    model = folded(tiny_model(name), Storage(64, 8, 4), 0.9)
    target = copy.deepcopy(model)
    for ffn in folded_ffns(target).values():
        ffn.exact = True
    assert torch.equal(generated(target, model), generated(target))
