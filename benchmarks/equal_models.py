"""A model made into what is compared at equal quality: rounded, folded, or a GGUF file; see `equal_quality.py`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import gguf
import torch
from torch import nn
from transformers import PreTrainedModel

import real_models
from equal_subjects import HEAD_BITS, OURS, PREDICTED, SUBJECTS
from llama_library import quantised
from tardis_llm import FoldConfig, fold, save_folded
from tardis_llm.baselines import apply_baseline
from tardis_llm.calibration.inputs import ids_of
from tardis_llm.calibration.text import Windows
from tardis_llm.evaluation.methods import FOLDS
from tardis_llm.pipeline.linears import Covariances, low_bit_copy, predicted_head
from tardis_llm.runtime.linears.lowbit import GROUP_SIZE
from tardis_llm.runtime.linears.placing import linear_layers, put_linears

_HEAD_TOKENS = 8_192  # calibration tokens that the head is rounded by


def rounded(model: PreTrainedModel, name: str, calibration: Windows) -> PreTrainedModel:
    """A dense model with every linear layer rounded by GPTQ, in place, as `OURS` has them; the head to 4 bits.

    Those of the blocks have zero points, which the format that decodes lacks: a little in the rival's favour.
    """
    apply_baseline(f"gptq{OURS[name]}-g{GROUP_SIZE}", model, calibration, scope="all")
    head = model.get_output_embeddings()
    place = next(place for place, module in model.named_modules() if module is head)
    ids = ids_of(calibration.fit)
    with torch.no_grad(), Covariances({place: head}) as seen:
        for window in ids[: max(1, _HEAD_TOKENS // ids.shape[1])]:
            model(input_ids=window[None], use_cache=False)
    made = (predicted_head if name == PREDICTED else low_bit_copy)(head, HEAD_BITS, GROUP_SIZE, seen.of(place))
    put_linears(model, {place: made})
    return model


@torch.no_grad()
def in_type(model: PreTrainedModel, kind: gguf.GGMLQuantizationType) -> PreTrainedModel:
    """A dense model with every linear layer rounded as GGUF files of a type have it; the embedding stays as it is."""
    for layer in linear_layers(model, ffn=True).values():
        weight = layer.get_parameter("weight").data
        rows = (weight if isinstance(layer, nn.Linear) else weight.T).float().contiguous()
        levels = torch.from_numpy(gguf.dequantize(gguf.quantize(rows.numpy(), kind), kind)).to(weight.dtype)
        layer.weight = nn.Parameter(levels if isinstance(layer, nn.Linear) else levels.T.contiguous())
    return model


def gguf_file(subject: str, name: str, cache: Path) -> Path:
    """The GGUF file of a subject that an entry of a table stands for, made unless it is there."""
    file = SUBJECTS[subject].file
    assert file is not None, "subjects without a file have no entries of files"
    kind, _, pure = name.partition("-")
    if name == "q4_k_m":
        return file()
    return quantised(file(), kind, cache / f"{subject}-{name}.gguf", cache, bool(pure))


def folded_model(subject: str, name: str, calibration: Windows, chosen: argparse.Namespace) -> Path:
    """The directory of a fold, made unless it is there; what an interrupted run has left is used."""
    directory: Path = chosen.folds / f"{subject}-{name}"
    if (directory / "config.json").exists():
        return directory
    model, tokenizer = SUBJECTS[subject].load()
    kind, _, reduction = name.partition("@")
    config = FoldConfig(
        reduction=float(reduction),
        **FOLDS[kind],
        group_size=SUBJECTS[subject].group,
        linear_bits=4,
        sequence_length=SUBJECTS[subject].length,
        tokens=chosen.calibration,
    )
    work = directory.with_name(f"{directory.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    report = fold(model, calibration, config, work, resume=True, progress=real_models.show)
    save_folded(model, report, directory, tokenizer)
    shutil.rmtree(work)
    return directory
