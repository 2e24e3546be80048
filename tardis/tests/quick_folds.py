"""Folded tiny models in every storage form, of random lines and ranges: made in no time, for tests of files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from models import LAYERS, tiny_model
from synthetic import as_stored, half_fixed
from torch import Tensor
from transformers import PreTrainedModel

from tardis_llm import FoldReport, save_folded
from tardis_llm.families.sites import find_ffns
from tardis_llm.ffn.weights import Storage
from tardis_llm.pipeline.linears import quantise_linears
from tardis_llm.pipeline.session import sound_weights
from tardis_llm.report import LayerReport
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import folded_ffns, install

#: storage of the folds, and bits of the linear layers outside them
FORMS: dict[str, tuple[Storage, int | None]] = {
    "plain": (Storage(), None),
    "stacked": (Storage(32, 8, 4), None),
    "fold in few bits": (Storage(64, 4), None),
    "low-bit linears": (Storage(), 8),
    "all in few bits": (Storage(32, 8, 4), 8),
}


def quick_fold(name: str, form: str = "plain", blocks: int = LAYERS) -> PreTrainedModel:
    """A tiny model of a family in one of `FORMS`."""
    storage, bits = FORMS[form]
    model = tiny_model(name, blocks=blocks)
    for site in find_ffns(model):
        ffn = sound_weights(site).in_fp32()
        made = half_fixed(ffn)
        made = replace(made, neurons=made.neurons.map(Tensor.half))
        install(model, site, FoldedFFN(as_stored(made, ffn, storage, torch.float32)))
    if bits:
        quantise_linears(model, bits)
    return model


def save_quick(directory: Path, name: str, form: str = "plain", shard: str = "5GB") -> PreTrainedModel:
    """Such a model, saved as a checkpoint."""
    model = quick_fold(name, form)
    layers = [LayerReport(name, 2, 0.5, 0.1, 0.1, None, None, 4, 2.0, 6) for name in folded_ffns(model)]
    save_folded(model, FoldReport(layers), directory, max_shard_size=shard)
    return model
