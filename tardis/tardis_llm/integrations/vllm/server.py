"""vLLM's own OpenAI server as a child process: started, watched until it answers, and ended with all its children."""

from __future__ import annotations

import http.client
import importlib.util
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType

from ...checkpoint.config_file import load_config, quantisation
from ...checkpoint.format import METHOD, CheckpointConfig
from ...checkpoint.loading import check_weights
from ...errors import InvalidInputError, TardisError
from ...runtime.prefill import check_prefill
from . import access, address, session
from .launch import MODULE
from .lifeline import RUN_DIRECTORY
from .names import PREFILL_OPTION, check_served
from .rundir import RunDirectory, base, clear_dead

_LAUNCH = f"{__package__}.launch"
_MIDDLEWARE = f"{access.__name__}.{access.RequireKey.__name__}"
_PLUGINS = "VLLM_PLUGINS"
_ADDITIONAL = "--additional-config"
_OURS = ("--host", "--port", "--prefill", "--shutdown-timeout", "--api-key", "--api-key-file")
_REFUSED = ("--uds", "--model")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10.0  # the longest wait for the engine's processes to end when no request is in flight


def check(model: str, prefill: str = "auto") -> None:
    """Check that vLLM is installed with our plugin, and can serve a model; of the weights only headers are read.

    Args:
        model: directory or hub name.
        prefill: the prefill mode, a `runtime.prefill.Prefill`.

    Raises:
        InvalidInputError: the model is not folded, there is no such prefill mode, or vLLM is not set up.
        UnsupportedModelError: vLLM does not serve the model's family.
        CheckpointError: a file is missing or damaged.
    """
    config = load_config(model)
    if quantisation(config) != METHOD:
        raise InvalidInputError(
            f"{model} is not folded: fold it with `tardis fold`, or serve it as it is with `python -m {MODULE}`."
        )
    check_prefill(prefill)
    CheckpointConfig.read(config.quantization_config).formats()
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
    """A running server, which the constructor starts.

    Args:
        model: directory or hub name of a folded model.
        host, port: the address to listen on.
        prefill: the prefill mode, a `runtime.prefill.Prefill`.
        options: further options of vLLM's server, as on its command line.
        shutdown_timeout: how many seconds requests in flight may take when the server is told to end.
        digests: SHA-256 of the valid API keys; without any, the server needs no key.

    Raises:
        InvalidInputError: an option is not supported here, or the port is taken.
    """

    def __init__(
        self,
        model: str,
        host: str,
        port: int,
        prefill: str = "auto",
        options: Sequence[str] = (),
        shutdown_timeout: int = 20,
        digests: Sequence[str] = (),
    ) -> None:
        names = _check_options(options)
        if prefill != "auto":
            if any(name.startswith(_ADDITIONAL) for name in names):
                raise InvalidInputError(f"give {PREFILL_OPTION} within {_ADDITIONAL}, or --prefill, and not both.")
            options = [*options, f"{_ADDITIONAL}.{PREFILL_OPTION}", prefill]
        address.check_free(host, port)
        clear_dead(base())
        self.url = address.url("https" if "--ssl-certfile" in names else "http", host, port)
        self._port, self._patience = port, shutdown_timeout + _GRACE_SECONDS
        self._signals = 0
        self._directory = RunDirectory.create(base())
        command = [sys.executable, "-m", _LAUNCH, "--model", model, "--host", host, "--port", str(port)]
        command += ["--shutdown-timeout", str(shutdown_timeout), *options, "--middleware", _MIDDLEWARE]
        # a session of its own: all its processes can be ended together, and Ctrl-C reaches it only through `run`
        self._process = subprocess.Popen(command, start_new_session=True, env=self._environment(digests))

    def _environment(self, digests: Sequence[str]) -> dict[str, str]:
        found = {name: value for name, value in os.environ.items() if name not in (access.KEYS, access.DIGESTS)}
        found.setdefault("VLLM_RPC_BASE_PATH", str(self._directory.path))  # where vLLM makes its sockets
        return {**found, RUN_DIRECTORY: str(self._directory.path), access.DIGESTS: " ".join(digests)}

    def run(self, ready: Callable[[str], None]) -> None:
        """Wait until the server ends. SIGTERM, SIGINT and SIGHUP end it; no process or memory of it stays behind.

        At the first signal the server finishes requests in flight, within `shutdown_timeout`; at a second it ends at
        once. SIGHUP is ignored if the process was started to ignore it, as by `nohup`.

        Args:
            ready: called once, with the server's URL, when the server answers.

        Raises:
            TardisError: the server ended by itself.
        """
        numbers = [number for number in _SIGNALS if not (number == signal.SIGHUP and _is_ignored(number))]
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            while self._goes_on() and not self._answers():
                time.sleep(_POLL_SECONDS)
            if self._goes_on():
                ready(self.url)
            while self._goes_on():
                time.sleep(_POLL_SECONDS)
        finally:
            code = self._process.poll()
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)
        if not self._signals:
            raise TardisError(f"vLLM's server ended by itself with exit code {code}; what it wrote above says why.")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _goes_on(self) -> bool:
        """Whether the server runs and no signal has come. Each call also lists the server's shared memory."""
        self._directory.record(self._process.pid)
        return not self._signals and self._process.poll() is None

    def _answers(self) -> bool:
        """Whether the server answers, and not another one at its address."""
        if not address.has_listener(session.members(self._process.pid), self._port):
            return False
        unverified = ssl._create_unverified_context()  # whoever configured the server answers for its certificate
        straight = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unverified)
        )
        try:
            with straight.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except http.client.HTTPException:
            return False
        except OSError as error:
            return isinstance(getattr(error, "reason", error), ssl.SSLError)  # the server wants a client certificate

    def _end(self) -> None:
        """Ask the server to end, and then kill whatever is left in its session."""
        deadline = time.monotonic() + self._patience
        if self._process.poll() is None:
            self._process.terminate()
        while self._process.poll() is None and self._signals < 2 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        self._directory.record(self._process.pid)
        session.end(self._process.pid)
        self._process.wait()
        self._directory.clear()


def _check_options(options: Sequence[str]) -> list[str]:
    """The names of options for vLLM, with hyphens as vLLM reads them.

    Raises:
        InvalidInputError: there is a second model, an option that is refused, or a shortened option of `tardis serve`.
    """
    if options and not options[0].startswith("-"):
        raise InvalidInputError(f"there is one MODEL, and {options[0]!r} belongs to no option; leave it out.")
    given = [option.partition("=")[0] for option in options if option.startswith("-")]
    names = ["--" + name[2:].replace("_", "-") if name.startswith("--") else name for name in given]
    for name, written in zip(names, given, strict=True):
        if name in _REFUSED:
            raise InvalidInputError(f"tardis serve cannot take {written}; use `python -m {MODULE}` with it.")
        meant = [ours for ours in _OURS if name.startswith("--") and ours.startswith(name)]
        if meant:
            raise InvalidInputError(f"{written} is not spelled out; write {' or '.join(meant)}.")
    return names


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN
