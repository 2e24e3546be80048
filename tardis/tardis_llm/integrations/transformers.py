"""Folded models in transformers: `AutoModelForCausalLM.from_pretrained(DIR)` after `import tardis_llm`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from ..architectures import FFNSite, find_ffns
from ..checkpoint import METHOD, CheckpointConfig, LayerFormat, verify
from ..errors import CheckpointError
from ..linears import check_bits, empty_like, linear_layers, put_linears, untie_head
from ..runtime.ffn import install
from ..runtime.lowbit_linear import KINDS
from ..runtime.relaid import freeze

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
        for name, bits in self.quantization_config.linears.items():
            expected += _install_empty_linear(model, name, bits)
        untie_head(model)
        if checkpoint_files:
            verify([Path(file) for file in checkpoint_files], expected)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Freeze what was solved for: loading makes every parameter one that trains."""
        freeze(model)
        return model

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """True: `save_pretrained` writes a folded checkpoint again."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: folded FFNs trace to one graph, whose shapes depend on no values."""
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


def _install_empty_linear(model: PreTrainedModel, name: str, bits: int) -> list[str]:
    """Put an empty low-bit layer in the place of a linear layer; returns what its tensors are called in the files.

    A model without its head leaves out the layers of that.
    """
    base = model.base_model_prefix + "."
    dense = linear_layers(model)
    found = next((each for each in (name, base + name, name.removeprefix(base)) if each in dense), None)
    if found is None and model.base_model is model and not name.startswith(base):
        return []
    if found is None or bits not in KINDS:
        raise CheckpointError(
            f"config.json stores {name} in {bits} bits, and this version and this model have no such layer; copy "
            "config.json anew, update TARDIS (pip install -U tardis-llm), or fold again."
        )
    check_bits(bits)
    layer = empty_like(dense[found], bits)
    put_linears(model, {found: layer})
    named = {f"{name}.{key}": torch.empty(0) for key in layer.state_dict()}
    return list(revert_weight_conversion(model, named))  # some heads have another name in files than in memory


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
