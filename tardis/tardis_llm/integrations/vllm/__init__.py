"""Folded models in vLLM: a plugin, which vLLM finds by itself if tardis-llm is installed.

`register` runs in every process of vLLM. It registers names only: classes are made, and their modules imported, when a
folded checkpoint is loaded.
"""

from __future__ import annotations

from .names import architectures

_MODELS = "tardis_llm.integrations.vllm.models"


def register() -> None:
    """Register the architectures and the quantisation method of folded checkpoints with vLLM. Idempotent.

    A process of `tardis serve` is also tied to that command, so that it ends when the command does.
    """
    from vllm import ModelRegistry

    from . import config, lifeline  # noqa: F401 - config registers the quantisation method

    lifeline.tie()
    for name in architectures():
        ModelRegistry.register_model(name, f"{_MODELS}:{name}")
