"""`tardis serve`: a folded model behind an OpenAI-compatible server, which is vLLM's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import output as show
from .options import ModelName, PromptsThrough


def serve(
    context: typer.Context,
    model: ModelName,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    prefill: PromptsThrough = "auto",
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key that clients must send; better given in a file. Repeatable.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with keys, one a line; default: the key in VLLM_API_KEY, if there is one.")
    ] = None,
    shutdown_timeout: Annotated[
        int, typer.Option(help="Seconds that requests under way may still take when the server is told to stop.", min=0)
    ] = 20,
) -> None:
    """Serve a folded model over the OpenAI API with vLLM. Options that are not listed here go to vLLM's server."""
    from ..integrations.vllm import access

    digests = access.gather_digests(api_key or [], api_key_file, os.environ)
    if api_key:
        _hide_keys(digests)
    from ..integrations.vllm import server

    server.check(model, prefill)
    server.Server(model, host, port, prefill, context.args, shutdown_timeout, digests).run(
        lambda url: show.say(f"[bold green]ready:[/] {url}/v1 (stop with Ctrl-C)")
    )
    show.say("stopped.")


def _hide_keys(digests: list[str]) -> None:
    """Start the command anew, as the same process, without the keys that its command line shows to all users."""
    from ..integrations.vllm import access

    command = access.without_keys(sys.orig_argv)
    if command == sys.orig_argv:  # called from Python, with no command line of its own
        return
    show.warn(
        "keys on the command line can be seen by others until the command has hidden them, and stay in the shell's "
        f"history; use --api-key-file or {access.KEYS}."
    )
    os.environ[access.DIGESTS] = " ".join(digests)
    os.execv(sys.executable, command)
