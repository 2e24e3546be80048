"""Folding on a GPU: whether it gives what the CPU gives, how long it takes, and how much memory; see `gpu.py`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, FalconConfig

from tardis_llm import FoldConfig, fold, load_model, load_tokenizer, read_windows, sample
from tardis_llm.report import LayerReport

MOST_APART = 0.05  #: how far error and fix rate of a layer may be from those on the CPU, relative to them


def folded_twice(device: str, tokens: int) -> dict[str, Any]:
    """The sample model folded on the CPU and on a device: seconds, and how far apart the two are at most."""
    directory = str(sample.model_dir())
    windows = read_windows([sample.calibration_text()], load_tokenizer(directory), tokens, 256, 0.125)
    seconds: dict[str, float] = {}
    layers: list[Sequence[LayerReport]] = []
    for each in ("cpu", device):
        start = time.perf_counter()
        report = fold(load_model(directory), windows, FoldConfig(fold_bits=8, fallback_bits=4, device=each))
        seconds[each] = time.perf_counter() - start
        layers.append(report.layers)
    pairs = list(zip(*layers, strict=True))
    apart = {
        "error": max(abs(there.error / here.error - 1) for here, there in pairs),
        "fix_rate": max(abs(there.fix_rate / here.fix_rate - 1) for here, there in pairs),
    }
    return {"seconds": seconds, "apart": apart, "as_on_cpu": max(apart.values()) <= MOST_APART}


def large_fold(device: str, blocks: int, tokens: int) -> dict[str, float]:
    """Random blocks of Falcon-7B's shape folded on a GPU: seconds for each, and the most memory taken there."""
    model = AutoModelForCausalLM.from_config(FalconConfig(num_hidden_layers=blocks), dtype=torch.bfloat16).eval()
    windows = torch.randint(1000, 60_000, (tokens // 1024, 1024))
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    fold(model, windows, FoldConfig(split="uniform", sequence_length=1024, fold_bits=8, fallback_bits=4, device=device))
    seconds = (time.perf_counter() - start) / blocks
    return {"seconds_a_block": seconds, "peak_bytes": torch.cuda.max_memory_allocated()}
