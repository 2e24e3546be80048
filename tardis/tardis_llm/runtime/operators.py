"""Our operators for `torch.compile`, and modules that are one operator each, found by number when a graph runs.

Operators get tensors and numbers, no modules. What a module does with weights in an order of their own, or by another
library's kernel, cannot be traced, and what it keeps from call to call cannot be an argument. Numbers mean something in
one process only: vLLM, which keeps graphs for the next, knows its layers by name.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

#: where the operators are defined
library = torch.library.Library("tardis", "DEF")


class Numbered(nn.Module):
    """A module with a number of its own in this process, which a copy does not share.

    Attributes:
        number: constant, so that a graph can have it.
    """

    number: int

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._enrol()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._enrol()

    def _enrol(self) -> None:
        self.number = next(_NUMBERS)
        _MODULES[self.number] = self


_NUMBERS = itertools.count()
_MODULES: WeakValueDictionary[int, Numbered] = WeakValueDictionary()


def numbered(number: int) -> Any:
    """The module of a number; a graph that has it lives no longer than its model."""
    return _MODULES[number]
