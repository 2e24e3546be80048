"""How much of a disk a fold takes while it is made."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ..calibration.text import Windows
from ..config import PREDICTOR_BITS, FoldConfig
from ..families.sites import find_ffns
from ..ffn.accounting import planned
from .session import hidden_bytes_on_disk
from .workspace import FOLDER


def bytes_on_disk(directory: Path, model: PreTrainedModel, windows: Windows, config: FoldConfig) -> int:
    """Bytes that folding `model` into `directory` will take there at most, beside what is there already."""
    sites = [site for site in find_ffns(model) if config.layers is None or site.index in config.layers]
    bits = config.predictor_bits or (config.fallback_bits or max(PREDICTOR_BITS[:-1]))
    costs = [planned(site.outline(), config.storage, bits) for site in sites]
    all_dense, stored = (sum(sizes) for sizes in zip(*((cost.dense, cost.touched(1.0)) for cost in costs), strict=True))
    outside = sum(weight.nbytes for weight in model.parameters()) - all_dense
    dense = 0 if config.fallback_bits else all_dense
    kept = directory / FOLDER
    finished = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) if kept.is_dir() else 0
    # for a moment the layers are there twice: in the work folder, without dense weights, and in the checkpoint
    twice = max(0, stored - dense - finished)
    return round(outside + stored + twice + hidden_bytes_on_disk(model, windows, config))
