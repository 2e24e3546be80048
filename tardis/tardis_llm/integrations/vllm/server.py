"""vLLM's own OpenAI server as a child process: started, watched until it answers, and ended with all its children."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType

from ...errors import InvalidInputError, TardisError
from ...format import METHOD, CheckpointConfig
from ...loading import check_weights, load_config, quantisation
from ...runtime.prefill import check_prefill
from .names import PREFILL_OPTION, check_served

_MODULE = "vllm.entrypoints.openai.api_server"
_PLUGINS = "VLLM_PLUGINS"
_ADDITIONAL = "--additional-config"
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 30.0  # for requests in flight, and for the engine's processes to end


def check(model: str, prefill: str = "auto") -> None:
    """See that vLLM is here, finds the plugin, and can serve a model; nothing but headers of weights is read.

    Args:
        model: directory or hub name.
        prefill: a `Prefill`.

    Raises:
        InvalidInputError: the model is not folded or cannot be served in this mode, or vLLM is not set up.
        UnsupportedModelError: vLLM does not serve its family.
        CheckpointError: a file is missing or damaged.
    """
    config = load_config(model)
    if quantisation(config) != METHOD:
        raise InvalidInputError(
            f"{model} is not folded: fold it with `tardis fold`, or serve it as it is with `python -m {_MODULE}`."
        )
    formats = CheckpointConfig.read(config.quantization_config).formats().values()
    check_prefill(prefill, stacked=any(layer.fallback_bits for layer in formats))
    if Path(model).is_dir():
        check_weights(Path(model))
    if importlib.util.find_spec("vllm") is None:
        raise InvalidInputError(
            "vLLM is not installed in this environment. On a CPU: `make venv-vllm`, then .venv-vllm/bin/tardis; on "
            "a GPU: `pip install vllm tardis-llm`."
        )
    found = [point.name for point in entry_points(group="vllm.general_plugins")]
    if METHOD not in found:
        raise InvalidInputError(
            "vLLM does not find the plugin of tardis-llm; reinstall it (`pip install --force-reinstall tardis-llm`)."
        )
    allowed = os.environ.get(_PLUGINS)
    if allowed is not None and METHOD not in allowed.split(","):
        raise InvalidInputError(f"{_PLUGINS}={allowed} keeps vLLM from loading the plugin; add {METHOD!r} to it.")
    check_served(config)


class Server:
    """A running server; made by starting it.

    Args:
        model: directory or hub name of a folded model.
        host, port: where to listen.
        prefill: a `Prefill`.
        options: further options of vLLM's server, as on its command line.

    Raises:
        InvalidInputError: an option that would keep the server from being watched.
    """

    def __init__(self, model: str, host: str, port: int, prefill: str = "auto", options: Sequence[str] = ()) -> None:
        names = [option.partition("=")[0] for option in options if option.startswith("-")]
        for name in ("--uds", "--model"):
            if name in names:
                raise InvalidInputError(f"tardis serve cannot take {name}; use `python -m {_MODULE}` with it.")
        if prefill != "auto":
            if any(name.startswith(_ADDITIONAL) for name in names):
                raise InvalidInputError(f"give {PREFILL_OPTION} within {_ADDITIONAL}, or --prefill, and not both.")
            options = [*options, f"{_ADDITIONAL}.{PREFILL_OPTION}", prefill]
        scheme = "https" if "--ssl-certfile" in names else "http"
        self.url = f"{scheme}://{_EVERYWHERE.get(host, host)}:{port}"
        self._stopping = False
        command = [sys.executable, "-m", _MODULE, "--model", model, "--host", host, "--port", str(port), *options]
        # a session of its own: all its processes can be ended together, and Ctrl-C reaches it only through `stop`
        self._process = subprocess.Popen(command, start_new_session=True)

    def run(self, ready: Callable[[str], None]) -> None:
        """Wait until the server ends; SIGTERM and SIGINT end it, and nothing of it stays behind.

        Args:
            ready: called once, with the server's URL, when it answers.

        Raises:
            TardisError: the server ended by itself.
        """
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._process.poll() is None and not self._stopping and not self._healthy():
                time.sleep(_POLL_SECONDS)
            if self._process.poll() is None and not self._stopping:
                ready(self.url)
            while self._process.poll() is None and not self._stopping:
                time.sleep(_POLL_SECONDS)
        finally:
            code = self._process.poll()
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)
        if not self._stopping:
            raise TardisError(f"vLLM's server ended by itself with exit code {code}; what it wrote above says why.")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _healthy(self) -> bool:
        unverified = ssl._create_unverified_context()  # the certificate is the server's own business
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5, context=unverified) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _end(self) -> None:
        """Ask the server to end, and then end whatever is left in its session."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # nothing was left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
