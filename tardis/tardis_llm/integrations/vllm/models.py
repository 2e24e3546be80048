"""vLLM's models with folded FFNs: `Tardis<Stock>` for every causal family, native or of the Transformers backend.

A class is made when it is asked for, by name, as an attribute of this module. What vLLM learns from inspecting it is
kept under a hash of this file; change the number below when vLLM changes what it inspects.

vLLM interface: 0.32
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import PPMissingLayer

from ...checkpoint.contents import ExpectedTensors, expected_tensors
from ...checkpoint.format import PREFIX, CheckpointConfig, stock_name
from ...errors import CheckpointError
from ...families.table import Family
from .config import TardisConfig, transformers_classes
from .ffn import ServedFFN, install_empty_fold
from .linears import install_head
from .names import architectures, block_index, check_served
from .prefill import Choice
from .weights import FoldLoader

_FALLBACK = "TransformersForCausalLM"  # stands for a class that vLLM lacks until the config refuses the model


def __getattr__(name: str) -> type[nn.Module]:
    if name not in architectures():
        raise AttributeError(name)
    return _make(name)


@functools.cache
def _make(name: str) -> type[nn.Module]:
    """`Tardis<Stock>`, from the stock class that vLLM has for the rest of the name."""
    known = ModelRegistry.models
    stock = known.get(name.removeprefix(PREFIX), known[_FALLBACK]).load_model_cls()
    return type(name, (TardisModel, stock), {"__module__": __name__})


class TardisModel(nn.Module):
    """What a model of vLLM becomes with folded FFNs: made as it is, then folded, its weights loaded beside the folds.

    Args:
        vllm_config: with a `TardisConfig`.
        prefix: of the model's own name, as vLLM has it.

    Raises:
        CheckpointError: the config has no `TardisConfig`, or folds blocks that the model does not have.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        settings, config = vllm_config.quant_config, vllm_config.model_config.hf_config
        if not isinstance(settings, TardisConfig):
            raise CheckpointError(
                f"{vllm_config.model_config.model} is folded, and its config.json does not say how; copy it anew."
            )
        stock: Any = super()  # of the class that `_make` gives it
        with _stock(config):
            stock.__init__(vllm_config=vllm_config, prefix=prefix)
        if settings.linear_bits:
            install_head(self, settings.linear_bits)
        self._model, self._config = vllm_config.model_config.model, config
        self._folded = _install_empty_folds(self, check_served(config), settings, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the folds here and everything else as the stock class does.

        Raises:
            CheckpointError: a tensor is missing, damaged, or not the one that was written.
        """
        loader = FoldLoader(self, self._folded, self._model, self._contents())
        stock: Any = super()
        loaded: set[str] = stock.load_weights(loader.others(weights))
        loader.check(loaded)
        for ffn in self._folded.values():
            if ffn is not None:
                ffn.prepare()
        return loaded

    def _contents(self) -> ExpectedTensors:
        with transformers_classes(self._config):
            return expected_tensors(self._config, CheckpointConfig.read(self._config.quantization_config))


@contextmanager
def _stock(config: PreTrainedConfig) -> Iterator[None]:
    """Within the context, the config names the stock architecture: the Transformers backend goes by that name."""
    named = config.architectures
    config.architectures = [stock_name(config)]
    try:
        yield
    finally:
        config.architectures = named


def _install_empty_folds(
    model: nn.Module, family: Family, settings: TardisConfig, config: VllmConfig
) -> dict[str, ServedFFN | None]:
    """Fold the blocks that the checkpoint has folded: by name, None where another pipeline rank has the block."""
    blocks, choice = _blocks(model, family), Choice.of(config, settings)
    folded: dict[str, ServedFFN | None] = {}
    for name, layer in settings.layers.items():
        index = block_index(name, family)
        if index >= len(blocks):
            raise CheckpointError(f"config.json folds {name}, and the model has {len(blocks)} blocks; copy it anew.")
        here = not isinstance(blocks[index], PPMissingLayer)
        folded[name] = install_empty_fold(blocks[index], family, layer, choice, config, name) if here else None
    return folded


def _blocks(model: nn.Module, family: Family) -> nn.ModuleList:
    """The list of blocks, wherever vLLM's model has it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and f".{name}".endswith(f".{family.layers}"):
            return module
    raise CheckpointError(
        f"{type(model).__name__} has no list of blocks {family.layers!r} in this version of vLLM; use vLLM 0.32."
    )
