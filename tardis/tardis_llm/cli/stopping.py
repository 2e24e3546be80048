"""Ends of a long command from outside: Ctrl-C, SIGTERM and SIGHUP clean up alike, and say how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from . import output as show

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stoppable(hint: Callable[[], str]) -> Iterator[None]:
    """Within the context, SIGTERM and SIGHUP raise SystemExit with 128 plus their number, as shells have it.

    What the process was asked to ignore, as `nohup` does, it goes on ignoring.

    Args:
        hint: makes the words that are said of how to go on, after one of them or Ctrl-C.
    """
    in_main = threading.current_thread() is threading.main_thread()  # no other may handle signals
    former = {number: signal.getsignal(number) for number in _SIGNALS if in_main}
    for number, handler in former.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    except (KeyboardInterrupt, _Stopped):
        show.fail(f"interrupted. {hint()}")
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class _Stopped(SystemExit):
    """A signal asked the process to end."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped(128 + number)
