"""The checkpoints that vLLM serves: dense models of a shape in bf16 and int4, and random folds of them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gptq import save_gptq
from tardis_llm.checkpoint.folded import save_folded
from tardis_llm.evaluation.shapes import RandomFold, random_folds, shaped_model
from tardis_llm.families.sites import FFNSite
from tardis_llm.ffn.accounting import cost
from tardis_llm.pipeline.linears import quantise_linears
from tardis_llm.report import FoldReport, LayerReport
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import install

FOLDED, RIVALS = "folded", ("dense", "int4")
LENGTH = 512  #: tokens of a request at most, its prompt included


def make(args: argparse.Namespace, root: Path) -> dict[str, Path]:
    """The rivals and the fold as checkpoints below `root`, by name; those that are there are used again."""
    given = (args.predictor_bits, args.fold_bits, args.fallback_bits, args.linear_bits, args.fix_rate)
    shape, kind = f"{args.shape}-{args.layers or 'all'}", "-".join(map(str, given))
    directories = {name: root / f"{shape}-{name}" for name in args.against.split(",")}
    directories[FOLDED] = root / f"{shape}-{FOLDED}-{kind}"
    if all((directory / "config.json").exists() for directory in directories.values()):
        return directories
    model, tokenizer = shaped_model(args.shape, args.layers), byte_tokenizer()
    for name, directory in directories.items():
        if name == "dense":
            model.save_pretrained(directory)
        elif name == "int4":
            save_gptq(model, directory)
        else:  # comes last, as it changes the model
            save_random_fold(model, directory, RandomFold(*given))
        tokenizer.save_pretrained(directory)
    return directories


@torch.no_grad()
def save_random_fold(
    model: PreTrainedModel,
    directory: Path,
    fold: RandomFold | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Fold a model at random, in place, and save it as a checkpoint; its report's errors are not numbers.

    Args:
        model: dense.
        directory: made if missing.
        fold: what the fold is made with; None for the defaults.
        tokenizer: saved beside the model.
    """
    fold, layers = fold or RandomFold(), []
    for site, ffn in list(random_folds(model, fold)):
        layers.append(_random_report(site, ffn, fold))
        install(model, site, ffn)
    linears = quantise_linears(model, fold.linear_bits) if fold.linear_bits else None
    save_folded(model, FoldReport(layers, {"random": True}, linears=linears), directory, tokenizer)


def _random_report(site: FFNSite, ffn: FoldedFFN, fold: RandomFold) -> LayerReport:
    """What is known of a random fold: its bytes, and the share of the neurons that it is made to fix."""
    bytes_ = cost(site.weights(), ffn.weights)
    sizes = bytes_.dense, bytes_.touched(fold.fix_rate), bytes_.resident
    return LayerReport(site.prefix, fold.predictor_bits, fold.fix_rate, math.nan, math.nan, None, None, *sizes)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: text of any kind has as many tokens as bytes, in every vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
