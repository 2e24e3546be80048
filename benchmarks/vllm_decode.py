"""A model in vLLM, dense against folded: decoding offline, and a server under load.

    python benchmarks/vllm_decode.py decode --shape gpt2-16x2048 [--batch 1,4,8,16] [--prompt 32] [--output FILE]
    python benchmarks/vllm_decode.py decode --shape falcon-7b --layers 6
    python benchmarks/vllm_decode.py decode --fold-bits 4 --fallback-bits 4 --linear-bits 4 --against dense,int4
    python benchmarks/vllm_decode.py server --shape gpt2-16x2048 [--rates 0.5,1,2] [--output FILE]

Run it in the environment that `make venv-vllm` makes; on a machine with a GPU, with `pip install vllm` instead, vLLM
and so this script use the GPU. The fold is compared with the dense model in bf16, with the same
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
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from tardis_llm.evaluation.machine import cpu_name
from tardis_llm.evaluation.shapes import SHAPES
from vllm_checkpoints import RIVALS, make
from vllm_engines import decode
from vllm_server import PROMPT, server


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
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded per request")
    parser.add_argument("--rates", default="0.25,0.5,1,2", help="requests per second")
    parser.add_argument("--requests", type=int, default=32, help="at each rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", type=Path, help="keep the checkpoints here, for other runs")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    chosen = parser.parse_args()
    if not chosen.against or set(chosen.against.split(",")) - set(RIVALS):
        parser.error(f"--against takes {' and '.join(RIVALS)}")
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
        if torch.cuda.is_available():
            figures["gpu"] = torch.cuda.get_device_name()
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
