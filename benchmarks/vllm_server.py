"""vLLM's servers under the load of its own client; see `vllm_decode.py`."""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vllm_checkpoints import LENGTH

PROMPT = 32  #: tokens of a prompt if nothing else is said
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
    command += ["--max-model-len", LENGTH, "--max-num-seqs", 16, "--dtype", "bfloat16"]
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
            "random-input-len": PROMPT,
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
