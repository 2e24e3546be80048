"""An index as a JSON header and arrays, and back: what files and pickles hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adaptation import Models
from .delta import Delta
from .engine import choose
from .heat import Heat
from .keys import KeyType
from .model import LeafPool, Model
from .state import Run, State
from .storage import Arrays, Header


def pack(state: State, memory: Models) -> tuple[Header, Arrays]:
    """Everything of a state and the model memory; values only where there are any."""
    run, delta, model = state.run, state.delta, state.run.model
    header = {"dtype": state.key_type.dtype.str.replace(">", "<"), "memory": memory.capacity}
    arrays = {
        "run.codes": run.codes,
        "run.trained": run.trained,
        "run.heat": run.heat.counts(),
        "model.buckets": model.buckets,
        "model.bits": model.bits,
        "model.rows": model.pool.rows[: model.pool.used],
        "model.where": model.pool.where,
        "delta.codes": delta.codes,
        "delta.net": delta.net,
        "delta.present": delta.present,
        "delta.stamps": delta.stamps,
        "memory.signatures": _stacked([known for known, _ in memory], len(model.bits), np.dtype(np.float64)),
        "memory.bits": _stacked([bits for _, bits in memory], len(model.bits), np.dtype(np.uint8)),
    }
    if run.values is not None and delta.values is not None:
        arrays |= {"run.values": run.values, "delta.values": delta.values}
    return header, arrays


def unpack(header: Header, arrays: Arrays, engine: str | None = None) -> tuple[State, Models]:
    """What `pack` was given. Raises ValueError if the parts do not fit together."""
    codes, chosen = arrays["run.codes"], choose(engine)
    pool = LeafPool(arrays["model.rows"], len(arrays["model.rows"]), arrays["model.where"].copy())
    buckets = arrays["model.buckets"].copy()
    model = Model(buckets["low"][:-1].copy(), buckets, arrays["model.bits"].copy(), pool)
    model.check(codes)
    heat = Heat(len(model.bits), arrays["run.heat"].copy())
    run = Run(codes, arrays.get("run.values"), model, heat, arrays["run.trained"])
    parts = [arrays[f"delta.{name}"] for name in ("codes", "net", "present")]
    delta = Delta(parts[0], parts[1], parts[2], arrays.get("delta.values"), arrays["delta.stamps"], chosen)
    memory = Models(header["memory"])
    for known, bits in zip(arrays["memory.signatures"], arrays["memory.bits"], strict=True):
        memory.remember(known, bits, merge_within=0.0)
    return State.of(KeyType.of(header["dtype"]), chosen, run, delta), memory


def _stacked(rows: list[NDArray[Any]], width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.stack(rows) if rows else np.zeros((0, width), dtype=dtype)
