"""How fast what was judged decodes, in turns; see `equal_quality.py`."""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import real_models
from equal_models import gguf_file
from equal_subjects import DENSE, HEAD_BITS, KINDS, OURS, PREDICTED, SUBJECTS, Subject
from llama_cpp import bytes_of, file_of_shape, measured_on, model_of_shape, taken_in_turns
from llama_library import Llama
from tardis_llm.checkpoint.loading import load_model
from tardis_llm.evaluation.shapes import RandomFold, random_head, random_linears
from tardis_llm.evaluation.variants import Variant, loaded_variants, random_rival, random_variant, rival, swapped
from tardis_llm.files import read_json, write_json
from tardis_llm.pipeline.linears import low_bit_copies, predicted_head
from tardis_llm.runtime.linears.lowbit import GROUP_SIZE
from tardis_llm.runtime.linears.placing import linear_layers

SHAPE = "falcon-7b"  #: what stands in for the sample where speed is measured


def speed(chosen: argparse.Namespace) -> None:
    """Time what was judged, in turns."""
    torch.set_num_threads(chosen.threads)
    entries = read_json(chosen.results / f"equal_quality_{chosen.subject}.json")["entries"]
    names = [name for name in chosen.only or entries if name != DENSE]
    ours = variants(chosen.subject, {name: entries[name] for name in names if is_ours(name)}, chosen)
    files = {name: _timed_file(name, chosen) for name in names if not is_ours(name)}
    llamas = {name: Llama(file, chosen.threads, chosen.batch, chosen.cache) for name, file in files.items()}
    try:
        decoded, prompted = taken_in_turns(ours, llamas, chosen)
    finally:
        for llama in llamas.values():
            llama.close()
    sizes = {name: bytes_of(variant) for name, variant in ours.items()}
    sizes |= {name: llama.about["bytes"] for name, llama in llamas.items()}
    for name, seconds in decoded.items():
        tokens = chosen.batch / statistics.median(seconds)
        print(f"{name:20} {tokens:7.2f} tokens/s  first token {statistics.median(prompted[name]):6.3f} s")
    layers = chosen.layers if SUBJECTS[chosen.subject].file is None else None
    name = f"equal_speed_{chosen.subject}{f'_{layers}' if layers else ''}_{chosen.threads}_{chosen.batch}.json"
    found = {"seconds": decoded, "first_seconds": prompted, "bytes": sizes}
    write_json(chosen.results / name, {"subject": chosen.subject, "layers": layers, **measured_on(chosen), **found})


def is_ours(name: str) -> bool:
    """Whether our kernels decode it."""
    return name in OURS or name.startswith(tuple(KINDS))


def variants(subject: str, entries: dict[str, Any], chosen: argparse.Namespace) -> dict[str, Variant]:
    """What our kernels decode, by name: real folds, or random ones of `SHAPE` with the sample's fix rates."""
    own, ids = SUBJECTS[subject], None
    real = own.file is not None
    if real:
        model, tokenizer = own.load()
        ids = _judged_text(own, tokenizer, chosen)
    else:
        model = model_of_shape(SHAPE, chosen.layers)
    made = {}
    for name, found in entries.items():
        if name in OURS:
            made[name] = _dense(name, model, real)
        elif real:
            made[name] = loaded_variants(load_model(str(chosen.folds / f"{subject}-{name}")))[0]
        else:
            bits = math.ceil(statistics.mean(found["bits"]))
            select = KINDS[name.partition("@")[0]]
            made[name] = random_variant(model, RandomFold(bits, 4, 4, 4, found["fix_rate"], select, found["kept"]))
    return {name: replace(variant, ids=ids) for name, variant in made.items()}


def _judged_text(own: Subject, tokenizer: PreTrainedTokenizerBase, chosen: argparse.Namespace) -> torch.Tensor:
    """[n] the token ids of the first text that a subject is judged on: what is fixed depends on the text."""
    windows = real_models.texts(tokenizer, chosen.data, chosen.tokens or own.tokens, own.length)
    return windows[own.texts[0]].flatten()


def _dense(name: str, model: PreTrainedModel, real: bool) -> Variant:
    """A dense model in few bits, which are random where rounding takes long, or is not for so few; it decodes alike."""
    if name == "int4":  # a real model with random weights may be too wild for its steps to be run whole
        return (rival if real else random_rival)(name, model)
    if name == PREDICTED and real:
        layers: dict[str, nn.Module] = {**low_bit_copies(model, HEAD_BITS, ffn=True)}
        head = next(key for key, layer in linear_layers(model).items() if layer is model.get_output_embeddings())
        layers[head] = predicted_head(model.get_output_embeddings(), HEAD_BITS, GROUP_SIZE)
        return Variant(name, model, lambda: swapped(model, layers))
    head = model.get_output_embeddings()
    outside = {key: layer for key, layer in linear_layers(model).items() if layer is head}
    others: dict[str, nn.Module] = {**random_linears(model, OURS[name], ffn=True)}
    if name == PREDICTED:
        others |= random_head(model, HEAD_BITS)
    else:
        others |= {key: layer for key, layer in random_linears(model, HEAD_BITS).items() if key in outside}
    return Variant(name, model, lambda: swapped(model, others))


def _timed_file(name: str, chosen: argparse.Namespace) -> Path:
    if SUBJECTS[chosen.subject].file is None:
        return file_of_shape(SHAPE, chosen.layers, chosen.cache)
    return gguf_file(chosen.subject, name, chosen.cache)
