"""What a head in few bits costs a real model, and what it saves: whole, and with a predictor.

    python benchmarks/heads.py qwen2.5-coder-0.5b [--tokens 4096] [--threads 2]

All else stays dense, in fp32. Every head is rounded by GPTQ on calibration text, a quarter of it code, and judged by
its kernel on the hidden states of the texts. A token's product is timed in turns, behind a read of more memory than
caches have.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import real_models
from tardis_llm.calibration.inputs import ids_of
from tardis_llm.evaluation.machine import cpu_name
from tardis_llm.files import write_json
from tardis_llm.pipeline.linears import Covariances, low_bit_copy, predicted_head
from tardis_llm.runtime.linears.lowbit import GROUP_SIZE, LowBitLinear

RESULTS = Path(__file__).parent / "results"
_CALIBRATION, _CODE = 8_192, 0.25  # tokens, and the share of them that is code
_FLUSHED = 40_000_000  # numbers that push everything else out of the caches
_ROUNDS = 15


@torch.no_grad()
def heads_of(model: PreTrainedModel, calibration: Tensor) -> dict[str, nn.Module]:
    """The dense head of a model, and others in few bits, by their names in the table."""
    head = model.get_output_embeddings()
    with Covariances({"head": head}) as seen:
        for window in calibration:
            model(input_ids=window[None], use_cache=False)
    moments = seen.of("head")
    assert moments is not None, "the head was run"
    made: dict[str, nn.Module] = {"dense": head}
    for bits in (8, 4):
        made[f"int{bits}"] = low_bit_copy(head, bits, GROUP_SIZE, moments)
        made[f"int{bits}, predicted"] = predicted_head(head, bits, GROUP_SIZE, moments)
    made["int4, predicted, groups of 128"] = predicted_head(head, 4, 128, moments)
    return made


@torch.no_grad()
def losses(model: PreTrainedModel, heads: Mapping[str, nn.Module], windows: Tensor) -> dict[str, Tensor]:
    """[tokens] the loss of every token but the first of each window, by head."""
    found: dict[str, list[Tensor]] = {name: [] for name in heads}
    for window in windows:
        hidden = model.base_model(input_ids=window[None], use_cache=False).last_hidden_state[0, :-1]
        for name, head in heads.items():
            found[name].append(F.cross_entropy(head(hidden).float(), window[1:], reduction="none"))
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def seconds(heads: Mapping[str, nn.Module], width: int) -> dict[str, list[float]]:
    """Of one token's product, every round, by the heads in few bits."""
    x, flushed = torch.randn(1, width), torch.zeros(_FLUSHED)
    taken: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(_ROUNDS):
        for name, times in taken.items():
            flushed.add_(1)
            start = time.perf_counter()
            heads[name](x)
            times.append(time.perf_counter() - start)
    return taken


def main() -> None:
    """Round, judge, time, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=real_models.MODELS)
    parser.add_argument("--tokens", type=int, default=4_096, help="of each text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, default=real_models.DATA, help="(default: %(default)s)")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    model, tokenizer = real_models.load(chosen.model)
    model.float()  # as AVX2 has no products in bf16
    length = real_models.LENGTH
    calibration = real_models.calibration(tokenizer, chosen.data, 4 * _CALIBRATION, length, _CODE)
    heads = heads_of(model, ids_of(calibration.fit)[::4][: _CALIBRATION // length])
    found: dict[str, dict[str, Any]] = {name: {"increase": {}} for name in heads}
    for text, windows in real_models.texts(tokenizer, chosen.data, chosen.tokens, length).items():
        by_head = losses(model, heads, windows)
        for name, own in by_head.items():
            more = own - by_head["dense"]
            found[name]["increase"][text] = [float(more.mean()), float(more.std() / len(more) ** 0.5)]
            print(f"{text:10} {name:16} {more.mean():+.4f} +- {more.std() / len(more) ** 0.5:.4f}", flush=True)
    few = {name: head for name, head in heads.items() if name != "dense"}
    for name, taken in seconds(few, model.config.hidden_size).items():
        found[name]["seconds"] = taken
        found[name]["bytes"] = _bytes(heads[name])
        print(
            f"{name:16} {1e3 * statistics.median(taken):6.2f} ms  {found[name]['bytes'] / 2**20:5.0f} MiB", flush=True
        )
    machine = {"cpu": cpu_name(), "threads": chosen.threads}
    settings = {"model": chosen.model, "tokens": chosen.tokens, "calibration": _CALIBRATION, "code": _CODE}
    write_json(RESULTS / f"heads_{chosen.model}.json", {**settings, "machine": machine, "heads": found})


def _bytes(head: Any) -> float:
    """Bytes that a token reads of a head in few bits."""
    return float(head.nbytes if isinstance(head, LowBitLinear) else head.touched)


if __name__ == "__main__":
    main()
