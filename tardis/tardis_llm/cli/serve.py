"""`tardis serve`: a folded model behind an OpenAI-compatible server, which is vLLM's own."""

from __future__ import annotations

from typing import Annotated

import typer

from ..runtime.prefill import Prefill
from . import output as show
from .options import ModelName


def serve(
    context: typer.Context,
    model: ModelName,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    prefill: Annotated[
        Prefill, typer.Option(help="Calls with prompts through the folds, the dense FFNs, or what is faster.")
    ] = "auto",
) -> None:
    """Serve a folded model over the OpenAI API with vLLM. Options that are not listed here go to vLLM's server."""
    from ..integrations.vllm import server

    server.check(model, prefill)
    server.Server(model, host, port, prefill, context.args).run(
        lambda url: show.say(f"[bold green]ready:[/] {url}/v1 (stop with Ctrl-C)")
    )
    show.say("stopped.")
