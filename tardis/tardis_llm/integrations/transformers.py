"""Folded models in transformers: `AutoModelForCausalLM.from_pretrained(DIR)` after `import tardis_llm`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from ..architectures import FFNSite, find_ffns
from ..checkpoint import METHOD, CheckpointConfig, LayerFormat, verify
from ..errors import CheckpointError
from ..runtime.ffn import install

register_quantization_config(METHOD)(CheckpointConfig)


@register_quantizer(METHOD)
class TardisQuantizer(HfQuantizer):
    """Puts empty folded FFNs into the model's skeleton, so that loading fills them like any other weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Check the files, and replace each FFN that the checkpoint has folded.

        Raises:
            CheckpointError: a file is damaged or a tensor missing, or the layers are not those of the model.
        """
        layers = self.quantization_config.layers
        sites = {_name_in(layers, model, site): site for site in find_ffns(model)}
        unknown = sorted(set(layers) - set(sites))
        if unknown:
            raise CheckpointError(
                f"config.json folds {unknown[0]}, which this model does not have; copy config.json anew, or fold again."
            )
        expected = [key for name, values in layers.items() for key in _install_empty(model, name, sites[name], values)]
        if checkpoint_files:
            verify([Path(file) for file in checkpoint_files], expected)
        return model

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """True: `save_pretrained` writes a folded checkpoint again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: folds are solved for, not trained."""
        return False


def _name_in(layers: dict[str, Any], model: PreTrainedModel, site: FFNSite) -> str:
    """The name under which the checkpoint has the FFN; with and without LM head it differs by the base's prefix."""
    base = model.base_model_prefix + "."
    names = (site.prefix, base + site.prefix, site.prefix.removeprefix(base))
    return next((name for name in names if name in layers), site.prefix)


def _install_empty(model: PreTrainedModel, name: str, site: FFNSite, values: dict[str, Any]) -> list[str]:
    """Put an empty folded FFN at `site`; returns what its tensors, kept weights included, are called in the files."""
    layer = LayerFormat.from_config(site.prefix, values)
    weight = site.weights().w1
    ffn = layer.empty(site.hidden_size, site.intermediate_size, weight.dtype, weight.device)
    install(model, site, ffn)
    kept = (
        f"{name}{part_name.removeprefix(site.prefix)}.{key}"
        for part_name, part in ((site.up_name, site.up), (site.down_name, site.down))
        for key, _ in part.named_parameters()
    )
    return [*(f"{name}.tardis.{key}" for key in ffn.state_dict()), *kept]
