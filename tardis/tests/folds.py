"""Folded tiny models, each made once: tests that share one must not change it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from models import tiny_model, tokens
from safetensors.torch import load_file
from synthetic import folded_with
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tardis_llm import FoldConfig, FoldReport, fold, save_folded
from tardis_llm.config import Select
from tardis_llm.evaluation.shapes import RandomFold, random_folds
from tardis_llm.families.sites import FFNSite, find_ffns
from tardis_llm.ffn.weights import Storage
from tardis_llm.pipeline.session import sound_weights
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import install

#: quick, with room for about a third of the neurons
SETTINGS = FoldConfig(reduction=0.5, predictor_bits=1, probe_tokens=64, sequence_length=32)


def text(windows: int = 40) -> Tensor:
    """Calibration windows [windows, 32] of random bytes."""
    return tokens(windows, 32)


@cache
def folded_tiny(name: str, settings: FoldConfig = SETTINGS) -> tuple[PreTrainedModel, FoldReport]:
    """`tiny_model(name)`, folded on `text()`."""
    model = tiny_model(name)
    return model, fold(model, text(), settings)


def folds_at_random(
    model: PreTrainedModel, bits: int, storage: Storage, fix_rate: float, select: Select = "dynamic"
) -> list[tuple[FFNSite, FoldedFFN]]:
    """A random fold for every FFN, predicted in so many bits and stored so; see `random_folds`."""
    parts = storage.fold_bits, storage.fallback_bits, None
    return list(random_folds(model, RandomFold(bits, *parts, fix_rate, select, group_size=storage.group_size)))


def names_as_saved(model: PreTrainedModel, report: FoldReport, directory: Path) -> set[str]:
    """Save a folded model, check that what is loaded is the same, and give the names of all tensors that are stored."""
    save_folded(model, report, directory)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory)), logits(model))
    return {name for file in directory.glob("*.safetensors") for name in load_file(file)}


def assert_resumes(family: str, settings: FoldConfig, directory: Path) -> None:
    """Check that a fold that is interrupted behind its first layer goes on to the bytes of one that was not."""
    (whole, _), resumed = folded_tiny(family, settings), tiny_model(family)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "folding layers" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold(tiny_model(family), text(), settings, directory, progress=stop)
    fold(resumed, text(), settings, directory, resume=True)
    for (key, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Logits [2, 16, vocabulary] on tokens that are the same on every call."""
    return model(tokens(2, 16)).logits


def badly_folded(name: str) -> tuple[PreTrainedModel, Tensor]:
    """A model whose folds fix nothing, so that they differ from its dense FFNs; and its dense logits."""
    model = tiny_model(name)
    with torch.no_grad():
        dense = model(tokens(2, 12)).logits
    for site in find_ffns(model):
        ffn = sound_weights(site).in_fp32()
        everywhere = torch.full((site.intermediate_size,), torch.inf)
        install(model, site, FoldedFFN(folded_with(ffn, -everywhere, everywhere)))
    return model, dense
