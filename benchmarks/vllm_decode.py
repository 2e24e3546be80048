"""A model in vLLM, dense against folded: decoding offline, and a server under load.

    python benchmarks/vllm_decode.py decode --shape gpt2-16x2048 [--batch 1,4,8,16] [--prompt 32] [--output FILE]
    python benchmarks/vllm_decode.py decode --shape falcon-7b --layers 6
    python benchmarks/vllm_decode.py decode --fold-bits 4 --fallback-bits 4 --linear-bits 4 --against dense,int4
    python benchmarks/vllm_decode.py server --shape gpt2-16x2048 [--rates 0.5,1,2] [--output FILE]

Run it in the environment that `make venv-vllm` makes. The fold is compared with the dense model in bf16, with the same
in int4 as GPTQ stores it, by vLLM's own kernels, or with both; of those kernels vLLM has one for processors with AMX
and one for all others. Weights and fold are random, with ranges that fix a stated share of the neurons; all engines run
at once, each in processes of its own, and take turns round by round, so that whatever else the machine does falls on
both. Ratios are those of neighbouring rounds: their median and quartiles. CPU time is that of an engine's process;
prompts are timed apart from the steps behind them. A vocabulary is as small as its shape says, because the head's share
of the bytes, the same in both, would hide that of the FFNs. The load comes from vLLM's own `bench serve` client.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gptq import save_gptq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tardis_llm.checkpoint.folded import save_folded
from tardis_llm.evaluation.machine import cpu_name
from tardis_llm.evaluation.shapes import SHAPES, RandomFold, random_folds, shaped_model
from tardis_llm.evaluation.turns import Ratio
from tardis_llm.families.sites import FFNSite
from tardis_llm.ffn.accounting import cost
from tardis_llm.pipeline.linears import quantise_linears
from tardis_llm.report import FoldReport, LayerReport
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import install

_FOLDED, _RIVALS = "folded", ("dense", "int4")
_PROMPT, _LENGTH = 32, 512  # tokens of a prompt if nothing else is said, and the most of a request
_CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
_START_SECONDS = 600
#: what is reported of a server at one request rate; times in milliseconds
_FIGURES = (
    "completed",
    "output_throughput",
    *(f"{kind}_{name}" for name in ("ttft_ms", "tpot_ms") for kind in ("median", "p99")),
)


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


def serve_steps(directory: Path, largest: int, pipe: Connection) -> None:
    """Body of an engine's process: decode what comes through the pipe until it is closed.

    vLLM runs within this process: with processes of its own, one of them would spin for as long as another computes.
    """
    from vllm import LLM, SamplingParams

    engine = LLM(str(directory), dtype="bfloat16", max_model_len=_LENGTH, max_num_seqs=largest).llm_engine
    count = 0
    pipe.send(None)
    while (order := pipe.recv()) is not None:
        prompts, steps = order
        settings = SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            count += 1
            engine.add_request(str(count), {"prompt_token_ids": prompt}, settings)
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
    """

    def __init__(self, directory: Path, largest: int) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve_steps, args=(directory, largest, other))
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
    engines = {name: Engine(directory, max(batches)) for name, directory in directories.items()}
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
            for name in seconds.keys() - {_FOLDED}:
                row[f"{prefix}{name}_{kind}_ratio"] = vars(Ratio.of(seconds[name], seconds[_FOLDED]))
    return row


def show(row: dict[str, Any]) -> None:
    """Print a row of `decode`, a line for each rival."""
    for name in (name for name in _RIVALS if f"{name}_cpu_ms" in row):
        parts = []
        for kind in ("cpu", "wall", "prompt_cpu"):
            prefix, clock = "prompt_" if "_" in kind else "", kind.removeprefix("prompt_")
            ratio = row[f"{prefix}{name}_{clock}_ratio"]
            rival, folded = (row[f"{prefix}{each}_{clock}_ms"] for each in (name, _FOLDED))
            spread = f"{ratio['value']:.2f}x [{ratio['low']:.2f}-{ratio['high']:.2f}]"
            parts.append(f"{kind} {rival:7.1f} -> {folded:7.1f} ms  {spread}")
        print(f"batch {row['batch']:2d}, {name:5}  {'  '.join(parts)}", flush=True)


def server(args: argparse.Namespace, directories: dict[str, Path]) -> list[dict[str, Any]]:
    """Load all servers in turns; a row per request rate and variant."""
    rows = []
    with ExitStack() as stack:
        urls = {name: stack.enter_context(running(directory)) for name, directory in directories.items()}
        for rate in map(float, args.rates.split(",")):
            for name in directories:
                found = load(urls[name], directories[name], rate, args)
                rows.append({"rate": rate, "variant": name, **{key: found[key] for key in _FIGURES}})
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


@contextmanager
def running(directory: Path) -> Iterator[str]:
    """vLLM's OpenAI server on a model; yields its URL when it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory, "--port", port]
    command += ["--max-model-len", _LENGTH, "--max-num-seqs", 16, "--dtype", "bfloat16"]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Return when a server answers.

    Raises:
        SystemExit: it ended, or does not answer.
    """
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit("the server did not start; what it wrote above says why.")


def load(url: str, directory: Path, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """What vLLM's client measures of a server at a rate of requests per second."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "backend": "openai",
            "base-url": url,
            "endpoint": "/v1/completions",
            "model": directory,
            "dataset-name": "random",
            "random-input-len": _PROMPT,
            "random-output-len": args.steps,
            "num-prompts": args.requests,
            "request-rate": rate,
            "percentile-metrics": "ttft,tpot,itl,e2el",
            "metric-percentiles": "50,90,99",
            "result-dir": folder,
            "result-filename": "result.json",
            "seed": 0,
        }
        options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        options += ["--ignore-eos", "--save-result", "--disable-tqdm"]
        done = subprocess.run([sys.executable, "-c", _CLIENT, *options], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"vLLM's client failed:\n{done.stderr}")
        found: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    return found


def make(args: argparse.Namespace, root: Path) -> dict[str, Path]:
    """The rivals and the fold as checkpoints below `root`, by name; those that are there are used again."""
    given = (args.predictor_bits, args.fold_bits, args.fallback_bits, args.linear_bits, args.fix_rate)
    shape, kind = f"{args.shape}-{args.layers or 'all'}", "-".join(map(str, given))
    directories = {name: root / f"{shape}-{name}" for name in args.against.split(",")}
    directories[_FOLDED] = root / f"{shape}-{_FOLDED}-{kind}"
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
    for site, ffn in list(random_folds(model, fold.predictor_bits, fold.storage, fold.fix_rate)):
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


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "server"))
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-16x2048")
    parser.add_argument("--layers", type=int, help="so many instead of all")
    parser.add_argument("--fix-rate", type=float, default=0.05)
    parser.add_argument("--predictor-bits", type=int, default=2)
    parser.add_argument("--fold-bits", type=int, help="of the fold, 4 or 8; bf16 without")
    parser.add_argument("--fallback-bits", type=int, help="of the weights that fixing reads, 4 or 8; bf16 without")
    parser.add_argument("--linear-bits", type=int, help="of linear layers outside the FFNs, 4 or 8; bf16 without")
    parser.add_argument("--against", default="dense", help="dense, int4, or both with a comma (default: %(default)s)")
    parser.add_argument("--batch", default="1,4,8,16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=_PROMPT, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded per request")
    parser.add_argument("--rates", default="0.25,0.5,1,2", help="requests per second")
    parser.add_argument("--requests", type=int, default=32, help="at each rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", type=Path, help="keep the checkpoints here, for other runs")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    chosen = parser.parse_args()
    if not chosen.against or set(chosen.against.split(",")) - set(_RIVALS):
        parser.error(f"--against takes {' and '.join(_RIVALS)}")
    return chosen


def main() -> None:
    """Measure and print."""
    args = arguments()
    os.environ.update(
        OMP_NUM_THREADS=str(args.threads),
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # the scheduler moves engines off cores that others use
        VLLM_LOGGING_LEVEL="ERROR",
    )
    if args.what == "decode":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with ExitStack() as stack:
        root = args.models or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directories = make(args, root)
        rows = decode(args, directories) if args.what == "decode" else server(args, directories)
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "models")}
        figures = {"cpu": cpu_name(), "settings": settings, "rows": rows}
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
