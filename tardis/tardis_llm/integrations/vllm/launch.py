"""Run vLLM's server so that it ends with `tardis serve`, which starts it as `python -m` with this module's name."""

from __future__ import annotations

import runpy

from .lifeline import tie

#: the module that runs vLLM's OpenAI server
MODULE = "vllm.entrypoints.openai.api_server"

if __name__ == "__main__":
    tie()
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
