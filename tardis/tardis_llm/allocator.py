"""Keep freed memory for the next temporary instead of giving it back to the system."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt
_MIB = 2**20


def keep_freed_memory() -> bool:
    """Let glibc reuse blocks of up to 32 MiB, and keep up to 256 MiB of them; for a whole process, at its start.

    By default each large temporary is mapped, faulted in page by page and unmapped again. On virtual machines, where a
    fault is dear, that can be most of the time of calibration.

    Returns:
        Whether the C library took the settings; other libraries than glibc have their own ways, and need none.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 * _MIB)) and bool(mallopt(_TRIM_THRESHOLD, 256 * _MIB))
