"""`tardis serve`: a folded model behind an OpenAI-compatible server, which is vLLM's own."""

from __future__ import annotations

from typing import Annotated

import typer

from . import output as show
from .options import ModelName


def serve(
    context: typer.Context,
    model: ModelName,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
) -> None:
    """Serve a folded model over the OpenAI API with vLLM. Options that are not listed here go to vLLM's server."""
    from ..integrations.vllm import server

    server.check(model)
    server.Server(model, host, port, context.args).run(
        lambda url: show.say(f"[bold green]ready:[/] {url}/v1 (stop with Ctrl-C)")
    )
    show.say("stopped.")
