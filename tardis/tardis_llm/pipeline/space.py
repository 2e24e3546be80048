"""How much of a disk a fold takes while it is made."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ..calibration.text import Windows
from ..config import PREDICTOR_BITS, FoldConfig
from ..families.sites import find_ffns
from .session import ffn_shape, hidden_bytes_on_disk
from .workspace import FOLDER


def bytes_on_disk(directory: Path, model: PreTrainedModel, windows: Windows, config: FoldConfig) -> int:
    """Bytes that folding `model` into `directory` will take there at most, beside what is there already."""
    sites = find_ffns(model)
    chosen = [ffn_shape(site) for site in sites if config.layers is None or site.index in config.layers]
    outside = sum(weight.nbytes for weight in model.parameters()) - sum(shape.dense for shape in chosen)
    bits = config.predictor_bits or (config.fallback_bits or max(PREDICTOR_BITS[:-1]))
    stored = sum(shape.touched(bits, config.storage, 1.0) for shape in chosen)
    dense = 0 if config.fallback_bits else sum(shape.dense for shape in chosen)
    kept = directory / FOLDER
    finished = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) if kept.is_dir() else 0
    # for a moment the layers are there twice: in the work folder, without dense weights, and in the checkpoint
    twice = max(0, stored - dense - finished)
    return round(outside + stored + twice + hidden_bytes_on_disk(model, windows, config))
