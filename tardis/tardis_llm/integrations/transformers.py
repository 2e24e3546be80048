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
from ..checkpoint.folded import mark_folded, save_marked, transformers_save
from ..checkpoint.format import METHOD, CheckpointConfig
from ..checkpoint.manifest import check_bytes
from ..checkpoint.old_linears import store_anew
from ..checkpoint.saving import CONFIG
from ..checkpoint.skeleton import check_blocks, install_empty_layers
from ..checkpoint.weight_files import headers, weight_files
from ..errors import CheckpointError
from ..runtime.stored import freeze

register_quantization_config(METHOD)(CheckpointConfig)


@register_quantizer(METHOD)
class TardisQuantizer(HfQuantizer):
    """Puts empty folded FFNs into a model before its weights are loaded, so that loading fills them like any others."""

    requires_calibration = True

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Check the number of blocks, as transformers calls this before it makes the model; the config is not changed.

        Raises:
            CheckpointError: config.json describes more blocks than the weight files have tensors.
        """
        directory = Path(config.name_or_path or "")
        known = bool(config.name_or_path) and directory.is_dir()
        check_blocks(config, len(headers(weight_files(directory))) if known else None)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Replace each FFN that the checkpoint has folded, and check the files before transformers reads their weights.

        Raises:
            CheckpointError: the files are damaged, do not fit config.json, or are not those that were written.
        """
        install_empty_layers(model, self.quantization_config)
        if checkpoint_files:
            files = [Path(file) for file in checkpoint_files]
            _check_place(files, model.config.name_or_path)
            check_bytes(check_headers(files, model.config, self.quantization_config, model))
        # while this is True, transformers leaves renamed tensors in the dtype of the file
        self.pre_quantized = False
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.pre_quantized = True
        if store_anew(model):
            mark_folded(model, self.quantization_config.calibration)
        freeze(model)  # loading sets requires_grad of every parameter
        return model

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """True, because `save_pretrained` writes a folded model as a folded checkpoint."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True, because folded FFNs compile to one graph, in which no shape depends on values."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False, because folds are solved for and not trained."""
        return False


@functools.wraps(transformers_save)
def _save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` of transformers, or `save_marked` for a folded model.

    A quantiser of transformers cannot change the config.json that is written, so the method itself is replaced.
    """
    folded = isinstance(getattr(self, "hf_quantizer", None), TardisQuantizer)
    (save_marked if folded else transformers_save)(self, *args, **kwargs)


PreTrainedModel.save_pretrained = _save_pretrained


def _check_place(files: Sequence[Path], model: str | None) -> None:
    """Refuse weight files outside the directory of their config.json, but not links in it, as the cache of the hub has.

    Args:
        files: weight files that transformers found.
        model: the directory or hub name that was asked for.

    Raises:
        CheckpointError: a file lies elsewhere, or the files lie in several directories.
    """
    places = {Path(os.path.abspath(file)).parent for file in files}
    root = Path(os.path.abspath(model)) if model and Path(model).is_dir() else None
    if root is not None:
        weight_files(root)  # raises for an index that names files elsewhere
    outside = sorted(place for place in places if root is not None and not _belongs(place, root))
    if len(places) > 1 or outside:
        raise CheckpointError(
            f"weight files of {model} lie in {(outside or sorted(places))[0]}, and every file of a checkpoint lies in "
            "the directory of its config.json; copy the checkpoint anew."
        )


def _belongs(place: Path, root: Path) -> bool:
    """Whether `place` is the directory `root`, or a subfolder of it with a config.json of its own."""
    return place == root or (root in place.parents and (place / CONFIG).is_file())
