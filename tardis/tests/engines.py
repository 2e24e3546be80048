"""Folded models in vLLM, with its engine in this process."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from folds import SETTINGS, text
from models import tiny_config, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from tardis_llm import FoldConfig, fold, save_folded
from tardis_llm.integrations.vllm.names import PREFILL_OPTION
from tardis_llm.runtime.prefill import Prefill, set_prefill

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed here; `make test-vllm` installs it and runs this",
)
#: causal families of the table that vLLM 0.32 does not have
NOT_SERVED = ["biogpt", "codegen", "mpt", "persimmon", "xglm", "ministral", "helium"]
STACKED = replace(SETTINGS, select="dynamic", predictor_bits=2, fold_bits=8, fallback_bits=4, reduction=0.6)
BLOCKS = 3  # one between the first and the last
MIXED = replace(STACKED, select="mixed", keep_above=0.1)
STATIC = replace(STACKED, select="static", predictor_bits=None, reduction=0.6)


def environment(**changes: str) -> dict[str, str]:
    """For processes that use vLLM."""
    return {**os.environ, **_ENVIRONMENT, **changes}


def heads(name: str) -> dict[str, Any]:
    """Arguments that give a tiny model three blocks, and attention that vLLM has: two heads of 32, the least it takes.

    It has no Qwen whose attention has a window in some blocks only.
    """
    fields: dict[str, Any] = {"num_attention_heads": 2}
    if name in ("gpt2", "gpt_bigcode", "gptj", "bloom"):
        fields = {"n_head": 2}
    if "head_dim" in tiny_config(name).to_dict():
        fields["head_dim"] = 32
    if name in ("qwen2", "qwen3"):
        fields |= {"use_sliding_window": False, "layer_types": BLOCKS * ["full_attention"]}
    return {**fields, "blocks": BLOCKS}


def save_tiny(
    name: str, directory: Path, settings: FoldConfig = SETTINGS, linear_bits: int | None = None
) -> PreTrainedModel:
    """Fold a tiny model into a directory; returns it as transformers has it."""
    model = tiny_model(name, **(heads(name) if name not in NOT_SERVED else {}))
    save_folded(model, fold(model, text(), replace(settings, linear_bits=linear_bits)), directory, tiny_tokenizer())
    return model


@contextmanager
def engine(directory: Path, **options: Any) -> Iterator[Any]:
    """vLLM's engine in this process, and nothing left of it afterwards.

    In float32 and with prompts folded, as evaluation has them, unless told otherwise.
    """
    os.environ.update(_ENVIRONMENT)
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 96, "max_num_seqs": 16, "seed": 0}
    settings["num_gpu_blocks_override"] = 64  # writing zeros to a gigabyte takes longer than all else here
    settings["additional_config"] = {PREFILL_OPTION: options.pop("prefill", "folded")}
    made = LLM(str(directory), **{**settings, **options})
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


class Text(NamedTuple):
    """What transformers generates: tokens [batch, count], and the logits [batch, count, vocabulary] of each step."""

    tokens: list[list[int]]
    logits: torch.Tensor


def generated(model: PreTrainedModel, ids: torch.Tensor, count: int, prefill: Prefill = "folded") -> Text:
    """The `count` likeliest tokens behind ids [batch, tokens], as transformers finds them."""
    set_prefill(model, prefill)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=count, **settings, output_logits=True, return_dict_in_generate=True)
    return Text(out.sequences[:, ids.shape[1] :].tolist(), torch.stack(out.logits, 1))


def greedy(model: PreTrainedModel, ids: torch.Tensor, count: int, prefill: Prefill = "folded") -> list[list[int]]:
    """The tokens of `generated`."""
    return generated(model, ids, count, prefill).tokens


def assert_same_text(found: list[list[int]], wanted: Text, apart: float) -> None:
    """The rows are the text up to where two tokens were equally good: their logits less than `apart` apart.

    What is behind such a token is another text, so rows are compared that far, and most tokens must have been.
    """
    compared = 0
    for row, tokens, logits in zip(found, wanted.tokens, wanted.logits, strict=True):
        differ = [at for at, (mine, theirs) in enumerate(zip(row, tokens, strict=True)) if mine != theirs]
        for at in differ[:1]:
            lost = float(logits[at].max() - logits[at, row[at]])
            assert lost < apart, f"token {at} of {row} is {lost:.3f} worse than that of {tokens}"
        compared += differ[0] if differ else len(row)
    assert compared > wanted.logits[..., 0].numel() / 2


def complete(llm: Any, ids: torch.Tensor, count: int, **sampling: Any) -> list[list[int]]:
    """The same from vLLM, or sampled as the settings say."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=count, ignore_eos=True, **{"temperature": 0.0, **sampling})
    outputs = llm.generate([{"prompt_token_ids": row.tolist()} for row in ids], settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
