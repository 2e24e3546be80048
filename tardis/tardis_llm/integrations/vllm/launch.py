"""`python -m tardis_llm.integrations.vllm.launch`: vLLM's server, tied to the command that started it."""

from __future__ import annotations

import runpy

from .lifeline import tie

#: the module of vLLM that is its server
MODULE = "vllm.entrypoints.openai.api_server"

if __name__ == "__main__":
    tie()
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
