"""Folded models in transformers: `AutoModelForCausalLM.from_pretrained(DIR)` after `import tardis_llm`."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from ..checkpoint.contents import check_headers
from ..checkpoint.folded import save_marked, transformers_save
from ..checkpoint.format import METHOD, CheckpointConfig
from ..checkpoint.manifest import check_bytes
from ..checkpoint.saving import CONFIG
from ..checkpoint.skeleton import check_blocks, install_empty_layers
from ..checkpoint.weight_files import headers, weight_files
from ..errors import CheckpointError
from ..runtime.stored import freeze

register_quantization_config(METHOD)(CheckpointConfig)


@register_quantizer(METHOD)
class TardisQuantizer(HfQuantizer):
    """Puts empty folded FFNs into the model's skeleton, so that loading fills them like any other weights."""

    requires_calibration = True

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config as it is; transformers shows it here before it makes the model.

        Raises:
            CheckpointError: it describes a model of more blocks than there can be.
        """
        directory = Path(config.name_or_path or "")
        known = bool(config.name_or_path) and directory.is_dir()
        check_blocks(config, len(headers(weight_files(directory))) if known else None)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Replace each FFN that the checkpoint has folded, and check the files before any of their weights is read.

        Raises:
            CheckpointError: the files are damaged, or not those of config.json, or not as they were written.
        """
        install_empty_layers(model, self.quantization_config)
        if checkpoint_files:
            files = [Path(file) for file in checkpoint_files]
            _check_place(files, model.config.name_or_path)
            check_bytes(check_headers(files, model.config, self.quantization_config, model))
        # of what is quantised already, transformers leaves renamed tensors in the dtype of the file
        self.pre_quantized = False
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.pre_quantized = True
        freeze(model)  # loading makes every parameter one that trains
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


@functools.wraps(transformers_save)
def _save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """transformers' own, but for folded models: it has no place where a quantiser could see the config written."""
    folded = isinstance(getattr(self, "hf_quantizer", None), TardisQuantizer)
    (save_marked if folded else transformers_save)(self, *args, **kwargs)


PreTrainedModel.save_pretrained = _save_pretrained


def _check_place(files: Sequence[Path], model: str | None) -> None:
    """Refuse files that lie elsewhere than their config.json; what they link to, as in the hub's cache, may.

    Args:
        files: as transformers found them.
        model: the directory that was asked for, or a name on the hub.
    """
    places = {Path(os.path.abspath(file)).parent for file in files}
    root = Path(os.path.abspath(model)) if model and Path(model).is_dir() else None
    if root is not None:
        weight_files(root)  # an index there that leads elsewhere is refused
    outside = sorted(place for place in places if root is not None and not _belongs(place, root))
    if len(places) > 1 or outside:
        raise CheckpointError(
            f"weight files of {model} lie in {(outside or sorted(places))[0]}, and every file of a checkpoint lies in "
            "the directory of its config.json; copy the checkpoint anew."
        )


def _belongs(place: Path, root: Path) -> bool:
    """Whether a checkpoint that was asked for in `root` may lie in `place`: there, or in a folder with its config."""
    return place == root or (root in place.parents and (place / CONFIG).is_file())
