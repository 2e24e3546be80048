"""Folded models in vLLM: a plugin that vLLM finds by itself where tardis-llm is installed.

`register` runs in every process of vLLM. It only tells names: classes are made, and their modules imported, when a
folded checkpoint is loaded.
"""

from __future__ import annotations

from .names import architectures

_MODELS = "tardis_llm.integrations.vllm.models"


def register() -> None:
    """Make the architectures and the quantisation method of folded checkpoints known to vLLM. Idempotent.

    In a process of `tardis serve`, also see to it that the process ends with the command.
    """
    from vllm import ModelRegistry

    from . import config, lifeline  # noqa: F401 - config registers the quantisation method

    lifeline.tie()
    for name in architectures():
        ModelRegistry.register_model(name, f"{_MODELS}:{name}")
