"""What an index is made of at the moment, for people who ask why it is as fast or as large as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .heat import SAMPLING
from .state import State
from .workload import drift


@dataclass(frozen=True)
class Explanation:
    """The parts of an index and what its model costs; `str()` of it is for reading.

    >>> from doraemon import Index
    >>> print(str(Index([1, 2], engine="numpy").explain()).splitlines()[0])
    2 keys of int64, searched by the numpy engine

    Attributes:
        engine: "native", or "numpy" where the C extension was not built or not wanted.
        dtype: of the keys.
        keys: in the index.
        run_keys: of them, those that the model covers.
        delta_entries: codes changed since the run was made; each query searches these changes as well.
        buckets: of the model.
        leaves: of the model, over all buckets.
        window: modelled number of keys between which a leaf leaves the choice, mean over the accesses counted.
        window_max: the same, of the worst leaf.
        accesses: counted so far, older ones weighing less; scaled up from the sample. Without those that the hot table
            answered, which need no leaves.
        drift: modelled extra search steps per access since the model's leaves were given.
        remembered: past workloads whose leaf numbers are known.
        hot_keys: in the hot table, which is asked before the model.
        hot_bytes: of the hot table.
        remembered_bytes: of hot tables of past workloads that are kept.
        key_bytes: of the run's codes, and of texts and what finds them.
        model_bytes: of the model, with the fits that only past workloads use.
    """

    engine: str
    dtype: str
    keys: int
    run_keys: int
    delta_entries: int
    buckets: int
    leaves: int
    window: float
    window_max: float
    accesses: float
    drift: float
    remembered: int
    hot_keys: int
    hot_bytes: int
    remembered_bytes: int
    key_bytes: int
    model_bytes: int

    def __str__(self) -> str:
        share = self.model_bytes / max(self.key_bytes, 1)
        return "\n".join(
            [
                f"{self.keys:,} keys of {self.dtype}, searched by the {self.engine} engine",
                f"run:   {self.run_keys:,} keys, {self.key_bytes:,} bytes; delta: {self.delta_entries:,} entries",
                f"model: {self.buckets:,} buckets, {self.leaves:,} leaves, {self.model_bytes:,} bytes "
                f"({share:.1%} of the keys)",
                f"       leaves the choice between {self.window:.1f} keys on average, {self.window_max:.0f} at worst",
                f"hot:   {self.hot_keys:,} keys in a table of {self.hot_bytes:,} bytes; "
                f"{self.remembered_bytes:,} bytes of others remembered",
                f"heat:  about {self.accesses:,.0f} accesses; drift {self.drift:.2f} steps per access; "
                f"{self.remembered} workloads remembered",
            ]
        )


def explain(state: State) -> Explanation:
    """Describe a state."""
    run, model = state.run, state.run.model
    counts = run.heat.counts(run.hot)
    shares = run.heat.signature(model.depths, run.hot)
    radius, bucket = model.radii()
    leaves_of = np.exp2(model.bits.astype(np.float64))
    windows = 2 * radius + 1
    return Explanation(
        engine=state.engine,
        dtype=str(state.key_type.dtype),
        keys=state.length,
        run_keys=len(run),
        delta_entries=len(state.delta),
        buckets=len(model.bounds),
        leaves=model.leaves,
        window=float((windows * (shares / leaves_of)[bucket]).sum()),
        window_max=float(windows.max(initial=0.0)),
        accesses=float(counts.sum()) * SAMPLING,
        drift=drift(shares, run.trained),
        remembered=len(run.memory),
        hot_keys=0 if run.hot is None else run.hot.held,
        hot_bytes=0 if run.hot is None else run.hot.nbytes,
        remembered_bytes=run.remembered_bytes,
        key_bytes=run.codes.nbytes + state.key_type.nbytes,
        model_bytes=model.nbytes,
    )
