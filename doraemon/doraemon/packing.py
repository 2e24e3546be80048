"""An index as a JSON header and arrays, and back: what files and pickles hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Arrays
from .checking import check, check_keys, check_values
from .delta import Delta, is_compact
from .engine import choose
from .errors import damaged
from .heat import Heat
from .model import LeafPool, Model
from .run import Models, Run
from .state import State
from .storage import Header


def pack(state: State) -> tuple[Header, Arrays]:
    """Everything of a state; values only where there are any."""
    if not is_compact(state.delta.net, len(state.run)):
        state = state.merged()
    state = state.fitted()
    run, delta, model, memory = state.run, state.delta, state.run.model, state.run.memory
    header = {"dtype": state.key_type.description, "memory": memory.capacity}
    arrays = {
        "run.codes": run.codes,
        "run.trained": run.trained,
        "run.heat": run.heat.counts(run.hot),
        "model.buckets": model.buckets,
        "model.bits": model.bits,
        "model.rows": model.pool.rows[: model.pool.used],
        "model.where": model.pool.first_rows,
        "delta.codes": delta.codes,
        "delta.net": np.ascontiguousarray(delta.net),
        "delta.present": np.ascontiguousarray(delta.present),
        "delta.stamps": np.ascontiguousarray(delta.stamps),
        "memory.signatures": _stacked([known for known, _ in memory], len(model.bits), np.dtype(np.float64)),
        "memory.bits": _stacked([bits for _, bits in memory], len(model.bits), np.dtype(np.uint8)),
    }
    arrays |= state.key_type.arrays(run.codes, delta.codes)
    if run.values is not None and delta.values is not None:
        arrays |= {"run.values": run.values, "delta.values": delta.values}
    return header, arrays


def unpack(header: Header, arrays: Arrays, engine: str | None = None, verify: bool = False) -> State:
    """The state that `pack` was given.

    Args:
        verify: check also what only the keys can tell, in O(n).

    Raises:
        CorruptFileError: header and arrays are not those of an index.
    """
    chosen = choose(engine)
    key_type, codes = check(header, arrays, chosen), arrays["run.codes"]
    key_type = key_type.opened(arrays, verify)
    pool = LeafPool(arrays["model.rows"], len(arrays["model.rows"]), arrays["model.where"].copy())
    buckets = arrays["model.buckets"].copy()
    model = Model(buckets["low"][:-1].copy(), buckets, arrays["model.bits"].copy(), pool)
    heat = Heat(model.bounds, chosen, arrays["run.heat"].copy())
    memory = Models.of(zip(arrays["memory.signatures"], arrays["memory.bits"], strict=True), header["memory"])
    run = Run(codes, arrays.get("run.values"), model, heat, arrays["run.trained"], memory)
    net, present, stamps = (arrays[f"delta.{name}"] for name in ("net", "present", "stamps"))
    unchanged = State.of(key_type, chosen, run)
    left, counts = unchanged.counted(arrays["delta.codes"])
    if verify:
        _verify(unchanged)
        if not np.array_equal(counts, present):
            raise damaged("delta.present has other counts than the keys")
    parts = (arrays["delta.codes"], left, net, present, arrays.get("delta.values"), stamps)
    delta = Delta(*parts, chosen)
    if verify and delta.values is not None:
        check_values("delta.values", delta.values)
    return State.of(key_type, chosen, run, delta, writes=int(stamps.max(initial=0)))


def _verify(state: State) -> None:
    """Raise CorruptFileError unless everything that answers of a run rest on is true."""
    run = state.run
    check_keys(run.codes, run.values is not None, state.key_type)
    if run.values is not None:
        check_values("run.values", run.values)
    if not state.view.within_error_bounds():
        raise damaged("model.rows has lines that do not lead to the keys")


def _stacked(rows: list[NDArray[Any]], width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.stack(rows) if rows else np.zeros((0, width), dtype=dtype)
