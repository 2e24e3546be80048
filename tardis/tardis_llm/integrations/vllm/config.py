"""`quantization_config` of a folded checkpoint for vLLM, which reads it before it makes the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
from .linears import LaidOutMethod, LowBitMethod, head_method
from .names import LinearForm, Projections, block_index, check_served, linear_form


@register_quantization_config(METHOD)
class TardisConfig(QuantizationConfig):
    """The quantisation config of folded checkpoints in vLLM: which FFNs are folded, and how linear layers are stored.

    Linear layers stay those of vLLM. Their weights get no memory where low-bit weights replace them, and products are
    computed by our kernels. `models` puts the folded FFNs into the model.

    Args:
        layers: the format of each folded FFN, by its name in the checkpoint.
        crossover: up to how many tokens at once folds are faster than dense FFNs.
        linears: names in the checkpoint of the linear layers that are stored in few bits.
        form: of these layers.
    """

    _projections: Projections  # set by `maybe_update_config`

    def __init__(
        self,
        layers: dict[str, FoldFormat],
        crossover: int = CROSSOVER,
        linears: Collection[str] = (),
        form: LinearForm | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.crossover = layers, crossover
        self._linears, self.linear_form = linears, form

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TardisConfig:
        """Read `quantization_config` of config.json.

        Raises:
            CheckpointError: its format version is newer, or a field has a type or value that it cannot have.
        """
        checkpoint = CheckpointConfig.read(config)
        crossover = CROSSOVER if checkpoint.crossover is None else checkpoint.crossover
        return cls(checkpoint.formats(), crossover, list(checkpoint.linears), linear_form(checkpoint))

    def maybe_update_config(
        self, model_name: str, hf_config: PreTrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Check that the model can be served; vLLM calls it before any weight is read.

        Raises:
            UnsupportedModelError: its family is unknown, or not served by vLLM.
            CheckpointError: config.json contradicts itself, or does not fit the weight files beside it.
        """
        if hf_config is None:
            raise CheckpointError(
                f"{model_name}: this version of vLLM gave no config to check; install vLLM 0.32, or update tardis-llm."
            )
        family = check_served(hf_config)
        if Path(model_name).is_dir():
            with transformers_classes(hf_config):
                check_directory(Path(model_name), hf_config)
        stacked = [block_index(name, family) for name, layer in self.layers.items() if layer.fallback_bits]
        self._projections = Projections(family, stacked, self._linears)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method that stores and multiplies a linear layer or the head; None leaves a layer as it is."""
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        if self._projections.empty(prefix):
            return NoWeightMethod()
        if self.linear_form and isinstance(layer, ParallelLMHead):
            return head_method(self.linear_form, prefix)
        if self.linear_form and self._projections.in_few_bits(prefix):
            return LowBitMethod(self.linear_form, prefix)
        return LaidOutMethod() if isinstance(layer, LinearBase) else None

    def get_name(self) -> str:
        """The value of `quant_method` in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes in which folded models can be served."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The least compute capability of a GPU: folded models need none."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """An empty list: there is no file with settings beside config.json."""
        return []


@contextmanager
def transformers_classes(hf_config: PreTrainedConfig) -> Iterator[None]:
    """Within the context, the transformers model of a config can be made, even if vLLM has wrapped its class.

    vLLM's Transformers backend wraps model classes, and a wrapped class asks for the config of a running engine.
    """
    plain = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    plain.model_config = SimpleNamespace(hf_config=hf_config)
    with set_current_vllm_config(plain):
        yield


class NoWeightMethod(UnquantizedLinearMethod):
    """A linear layer whose weight has a shape but no memory, because low-bit weights replace it."""

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """Create the weights as vLLM does, but on the meta device."""
        with torch.device("meta"):
            super().create_weights(*args, **kwargs)
