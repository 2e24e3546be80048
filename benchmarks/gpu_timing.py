"""Time on a GPU, eager and in CUDA graphs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_RUNS = 5  # of which the median counts


def milliseconds(run: Callable[[], object], calls: int = 1) -> float:
    """Median milliseconds of one of the calls that `run` makes."""
    run()
    torch.cuda.synchronize()
    found = []
    for _ in range(_RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / calls)
    return statistics.median(found)


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """What runs, captured in a CUDA graph: replaying it launches all kernels at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth() -> float:
    """GB/s of a copy within the GPU's memory, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def timed(steps: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> dict[str, float]:
    """Microseconds of one of some steps, eager and in a graph."""

    def run() -> None:
        y = x
        for step in steps:
            y = step(y)

    return {"eager_us": 1e3 * milliseconds(run, len(steps)), "graph_us": 1e3 * milliseconds(graphed(run), len(steps))}
