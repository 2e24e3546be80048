"""Decoding with several vLLM engines in turns, each in a process of its own; see `vllm_decode.py`."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tardis_llm.evaluation.turns import Ratio
from vllm_checkpoints import FOLDED, LENGTH, RIVALS

_GPU_SHARE = 0.9  #: of a GPU's memory, for all engines


@dataclass(frozen=True)
class Step:
    """Seconds of prompts or of one step behind them: by the clock, and of the processor."""

    wall: float
    cpu: float

    @classmethod
    def since(cls, start: Step, steps: int = 1) -> Step:
        """Seconds per step since the clocks stood at `start`."""
        now = cls.now()
        return cls((now.wall - start.wall) / steps, (now.cpu - start.cpu) / steps)

    @classmethod
    def now(cls) -> Step:
        """Where the clocks stand."""
        return cls(time.perf_counter(), time.process_time())


def serve_steps(directory: Path, largest: int, engines: int, pipe: Connection) -> None:
    """Body of an engine's process: decode what comes through the pipe until it is closed.

    vLLM runs within this process: with processes of its own, one of them would spin for as long as another computes.
    """
    import torch
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": LENGTH, "max_num_seqs": largest}
    if torch.cuda.is_available():  # an engine alone would take the whole GPU
        settings["gpu_memory_utilization"] = _GPU_SHARE / engines
    engine = LLM(str(directory), **settings).llm_engine
    count = 0
    pipe.send(None)
    while (order := pipe.recv()) is not None:
        prompts, steps = order
        sampling = SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            count += 1
            engine.add_request(str(count), {"prompt_token_ids": prompt}, sampling)
        first: set[str] = set()
        start = Step.now()
        while len(first) < len(prompts):
            first |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
        prompt, start = Step.since(start), Step.now()
        while engine.has_unfinished_requests():
            engine.step()
        pipe.send((prompt, Step.since(start, steps)))


class Engine:
    """vLLM on a model, in a process of its own.

    Args:
        directory: of the model.
        largest: batch.
        engines: that run at once.
    """

    def __init__(self, directory: Path, largest: int, engines: int) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve_steps, args=(directory, largest, engines, other))
        self._process.start()
        other.close()
        self._pipe.recv()

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[Step, Step]:
        """Seconds of some prompts, and per step of `steps` greedy steps behind them."""
        self._pipe.send((prompts, steps))
        taken: tuple[Step, Step] = self._pipe.recv()
        return taken

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def decode(args: argparse.Namespace, directories: dict[str, Path]) -> list[dict[str, Any]]:
    """Decode with all engines in turns; a row per batch size."""
    batches = [int(batch) for batch in args.batch.split(",")]
    engines = {name: Engine(directory, max(batches), len(directories)) for name, directory in directories.items()}
    random, rows = np.random.default_rng(0), []
    for batch in batches:
        taken: dict[str, list[tuple[Step, Step]]] = {name: [] for name in engines}
        for number in range(args.rounds + 1):  # the first is not counted
            prompts = random.integers(2, 250, (batch, args.prompt)).tolist()
            for name, engine in engines.items():
                found = engine.decode(prompts, args.steps)
                if number:
                    taken[name].append(found)
        rows.append(summary(batch, taken))
        show(rows[-1])
    for engine in engines.values():
        engine.close()
    return rows


def summary(batch: int, taken: dict[str, list[tuple[Step, Step]]]) -> dict[str, Any]:
    """Medians of one batch size, and ratios of each rival to the fold."""
    row: dict[str, Any] = {"batch": batch}
    for part, prefix in enumerate(("prompt_", "")):
        for kind in ("cpu", "wall"):
            seconds = {name: [getattr(each[part], kind) for each in found] for name, found in taken.items()}
            row |= {f"{prefix}{name}_{kind}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
            for name in seconds.keys() - {FOLDED}:
                row[f"{prefix}{name}_{kind}_ratio"] = vars(Ratio.of(seconds[name], seconds[FOLDED]))
    return row


def show(row: dict[str, Any]) -> None:
    """Print a row of `decode`, a line for each rival."""
    for name in (name for name in RIVALS if f"{name}_cpu_ms" in row):
        parts = []
        for kind in ("cpu", "wall", "prompt_cpu"):
            prefix, clock = "prompt_" if "_" in kind else "", kind.removeprefix("prompt_")
            ratio = row[f"{prefix}{name}_{clock}_ratio"]
            rival, folded = (row[f"{prefix}{each}_{clock}_ms"] for each in (name, FOLDED))
            spread = f"{ratio['value']:.2f}x [{ratio['low']:.2f}-{ratio['high']:.2f}]"
            parts.append(f"{kind} {rival:7.1f} -> {folded:7.1f} ms  {spread}")
        print(f"batch {row['batch']:2d}, {name:5}  {'  '.join(parts)}", flush=True)
