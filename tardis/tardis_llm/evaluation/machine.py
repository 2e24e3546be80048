"""The machine that figures were measured on: its processor, its threads, and how fast it reads memory."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_BANDWIDTH_BYTES = 2**29  # far more than any cache
_BANDWIDTH_RUNS = 5


@dataclass(frozen=True)
class Machine:
    """A machine as its figures need it.

    Attributes:
        cpu: name of the processor.
        threads: threads that torch computes with.
        read_bandwidth: bytes per second that these threads read from memory.
    """

    cpu: str
    threads: int
    read_bandwidth: float

    @classmethod
    def measured(cls) -> Machine:
        """This machine as it is now; takes about a second."""
        return cls(cpu_name(), torch.get_num_threads(), read_bandwidth())

    def sentence(self) -> str:
        """The figures for people."""
        return f"{self.cpu}, {self.threads} threads, reads memory at {self.read_bandwidth / 1e9:.1f} GB/s"


def cpu_name() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read_bandwidth() -> float:
    """Bytes per second at which this machine reads memory, with torch's threads: the best of a few sums."""
    data = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32)
    best = 0.0
    for _ in range(_BANDWIDTH_RUNS):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best
