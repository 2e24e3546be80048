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
    """Name of the processor; on Linux with its family and model, for one name is given to several generations."""
    info = Path("/proc/cpuinfo")
    first = info.read_text().partition("\n\n")[0] if info.exists() else ""
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    if "model name" not in about:
        return platform.processor() or platform.machine()
    return f"{about['model name']} (family {about.get('cpu family', '?')}, model {about.get('model', '?')})"


def read_bandwidth() -> float:
    """Bytes per second at which this machine reads memory, with torch's threads: the best of a few sums."""
    data = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32)
    best = 0.0
    for _ in range(_BANDWIDTH_RUNS):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best
