"""Triton's interpreter, made quick enough for tests of many cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest


def quick_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Have the kernels run in few programs of many rows, of which each still takes turns, without needless work.

    The interpreter puts its own functions into Triton's language when a kernel starts, and again, in milliseconds, for
    each device function that it calls.
    """
    from triton.runtime.interpreter import InterpretedFunction

    from tardis_llm.runtime.triton import launch

    def enlarged(tile_of: Callable[..., Any], rows: int) -> Callable[..., Any]:
        return lambda *args: replace(tile_of(*args), rows=rows)

    stock = InterpretedFunction.__call__

    def call(function: Any, *args: Any, **options: Any) -> Any:
        own = function.fn.__module__.startswith("tardis_llm")
        return function.rewrite()(*args, **options) if own else stock(function, *args, **options)

    patch.setattr(InterpretedFunction, "__call__", call)
    patch.setattr(launch, "streamed", enlarged(launch.streamed, 128))
    patch.setattr(launch, "scattered", enlarged(launch.scattered, 32))
    patch.setattr(launch, "_PROGRAMS", 2)
    patch.setattr(launch, "_GATHERED", 128)
    patch.setattr(launch.Fixing, "parts", lambda fixing, tokens: 2)
