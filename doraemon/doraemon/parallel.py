"""Work on long arrays by several threads at once, each on parts of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

PART = 1 << 16  #: items that are worth a thread: about a millisecond of look-ups, and a tenth of that for the thread


def in_parts(work: Callable[[slice], object], count: int, threads: int) -> None:
    """Call `work` for slices that make up `count` items, by so many threads if there is enough for them.

    The threads are started anew each time, so that nothing has to outlive a fork or end with an index. What `work`
    raises is raised.
    """
    if threads == 1 or count <= PART:
        work(slice(0, count))
        return
    threads = min(threads, -(-count // PART))
    pieces = threads * -(-count // (threads * PART))
    ends = [count * piece // pieces for piece in range(pieces + 1)]
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, slice(*part)) for part in pairwise(ends)]
    for future in futures:
        future.result()
