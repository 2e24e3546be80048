"""What vLLM knows of a folded checkpoint before it makes the model: its `quantization_config`, read and checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from ...checkpoint.contents import check_directory
from ...checkpoint.format import METHOD, CheckpointConfig
from ...errors import CheckpointError
from ...ffn.weights import FoldFormat
from ...runtime.prefill import CROSSOVER
from .linears import LaidOutMethod, LowBitMethod
from .names import Projections, block_index, check_served, linear_bits


@register_quantization_config(METHOD)
class TardisConfig(QuantizationConfig):
    """The folded layers of a checkpoint, for vLLM.

    Every linear layer stays vLLM's own; `models` then pairs those of each FFN. Only the dense weights that low-bit ones
    stand for get no memory, and the other layers our products.

    Args:
        layers: the format of each folded FFN by its name in the checkpoint.
        crossover: tokens at once up to which folding is faster.
        linears: bits of each linear layer that is stored in few, by its name in the checkpoint.
    """

    _projections: Projections  # from `maybe_update_config` on

    def __init__(
        self, layers: dict[str, FoldFormat], crossover: int = CROSSOVER, linears: dict[str, int] | None = None
    ) -> None:
        super().__init__()
        self.layers, self.crossover = layers, crossover
        self._linears, self.linear_bits = linears or {}, linear_bits(linears or {})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TardisConfig:
        """From `quantization_config` in config.json.

        Raises:
            CheckpointError: it is of a newer version, or names no layers.
        """
        checkpoint = CheckpointConfig.read(config)
        crossover = CROSSOVER if checkpoint.crossover is None else checkpoint.crossover
        return cls(checkpoint.formats(), crossover, checkpoint.linears)

    def maybe_update_config(
        self, model_name: str, hf_config: PreTrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Check that the model can be served; vLLM calls it before any weight is read.

        Raises:
            UnsupportedModelError: its family is gated, unknown, or not served.
            CheckpointError: config.json contradicts itself, or the files in its directory are not those of it.
        """
        if hf_config is None:
            raise CheckpointError(f"{model_name}: vLLM gave no config to check; update tardis-llm to one made for it.")
        family = check_served(hf_config)
        if Path(model_name).is_dir():
            with transformers_classes(hf_config):
                check_directory(Path(model_name), hf_config)
        stacked = [block_index(name, family) for name, layer in self.layers.items() if layer.fallback_bits]
        self._projections = Projections(family, stacked, self._linears)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a linear layer or the head is stored and multiplied with; None for what is neither."""
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        if self._projections.empty(prefix):
            return NoWeightMethod()
        if self.linear_bits and self._projections.in_few_bits(prefix):
            return LowBitMethod(self.linear_bits, prefix)
        return LaidOutMethod() if isinstance(layer, LinearBase) else None

    def get_name(self) -> str:
        """As `quant_method` in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that models are served in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU: any."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []


@contextmanager
def transformers_classes(hf_config: PreTrainedConfig) -> Iterator[None]:
    """Within the context, transformers' model of a config can be made, though vLLM may have wrapped its class.

    vLLM's backend for such models wraps classes for its engine, and what it wraps asks for an engine's config.
    """
    plain = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    plain.model_config = SimpleNamespace(hf_config=hf_config)
    with set_current_vllm_config(plain):
        yield


class NoWeightMethod(UnquantizedLinearMethod):
    """A linear layer whose weight has a shape and no memory, because low-bit weights stand for it."""

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's own, without memory."""
        with torch.device("meta"):
            super().create_weights(*args, **kwargs)
