"""Models of vLLM with folded FFNs: a class `Tardis<Stock>` for every causal family.

The stock class is vLLM's own model, or that of its Transformers backend. A class is made when it is looked up, by name,
as an attribute of this module. vLLM inspects classes and caches the results under a hash of this file: change the
number below when a new vLLM inspects something else.

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

_FALLBACK = "TransformersForCausalLM"  # used for a class that vLLM lacks, until `check_served` refuses the model


def __getattr__(name: str) -> type[nn.Module]:
    if name not in architectures():
        raise AttributeError(name)
    return _make(name)


@functools.cache
def _make(name: str) -> type[nn.Module]:
    """The class `Tardis<Stock>`: a `TardisModel` over the class that vLLM has for the stock name."""
    known = ModelRegistry.models
    stock = known.get(name.removeprefix(PREFIX), known[_FALLBACK]).load_model_cls()
    return type(name, (TardisModel, stock), {"__module__": __name__})


class TardisModel(nn.Module):
    """The part of a `Tardis<Stock>` class that folds: it makes the stock model, folds it, and loads both.

    Args:
        vllm_config: of the engine, with a `TardisConfig`.
        prefix: what vLLM puts before the names of the model's modules.

    Raises:
        CheckpointError: the config has no `TardisConfig`, or folds blocks that the model does not have.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        settings, config = vllm_config.quant_config, vllm_config.model_config.hf_config
        if not isinstance(settings, TardisConfig):
            raise CheckpointError(
                f"{vllm_config.model_config.model} is folded, and its config.json does not say how; copy it anew."
            )
        stock: Any = super()  # the stock class, which `_make` gives as second base
        with _stock(config):
            stock.__init__(vllm_config=vllm_config, prefix=prefix)
        if settings.linear_form:
            install_head(self, settings.linear_form)
        self._model, self._config = vllm_config.model_config.model, config
        self._folded = _install_empty_folds(self, check_served(config), settings, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the tensors of folded FFNs, and all others as the stock class does.

        Args:
            weights: names and tensors of the checkpoint.

        Returns:
            The names that the stock class loaded.

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
    """Within the context, the config names the stock architecture: the Transformers backend picks its class by it."""
    named = config.architectures
    config.architectures = [stock_name(config)]
    try:
        yield
    finally:
        config.architectures = named


def _install_empty_folds(
    model: nn.Module, family: Family, settings: TardisConfig, config: VllmConfig
) -> dict[str, ServedFFN | None]:
    """Put an empty folded FFN into every block that the checkpoint has folded.

    Returns:
        The FFNs by their names in the checkpoint; None where another pipeline rank has the block.

    Raises:
        CheckpointError: the checkpoint folds a block that the model does not have.
    """
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
    """The list of blocks of a vLLM model, found by the end of its name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and f".{name}".endswith(f".{family.layers}"):
            return module
    raise CheckpointError(
        f"{type(model).__name__} has no list of blocks {family.layers!r} in this version of vLLM; use vLLM 0.32."
    )
