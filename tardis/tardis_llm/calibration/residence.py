"""Compute with a model on a device that it may not fit into: its blocks go there one at a time.

All else, embeddings and head above all, is there as long as the model computes. What a block gives does not depend on
where it is, but for the rounding of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import DeviceMemoryError
from ..families.sites import named_blocks, running, without_blocks


@contextmanager
def computing_on(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Within the context, a model computes on a device, where one of its blocks is at a time: the last one called.

    In the end all of it is back where it was.

    Args:
        model: on one device.
        device: to compute on; nothing moves where the model is there.

    Raises:
        DeviceMemoryError: the memory of the device is full.
    """
    home = model.device
    with _explaining(device):
        if home == device:
            yield
            return
        turns = _Turns(device, home)
        with ExitStack() as moved:
            for block in named_blocks(model).values():
                moved.enter_context(running(block, partial(turns.run, block, block.forward)))
            moved.callback(_move_apart, model, home)
            moved.callback(turns.end)
            _move_apart(model, device)
            yield


class _Turns:
    """Who of a model's blocks is on a device.

    Args:
        device: has room for one of them.
        home: where the others are.
    """

    def __init__(self, device: torch.device, home: torch.device) -> None:
        self._device, self._home = device, home
        self._there: nn.Module | None = None

    def run(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `forward` of a block returns, which is on the device from then on."""
        if block is not self._there:
            self.end()
            self._there = block
            block.to(self._device)
        return forward(*args, **kwargs)

    def end(self) -> None:
        """Move the block that is on the device back."""
        if self._there is not None:
            self._there.to(self._home)
            self._there = None


def _move_apart(model: PreTrainedModel, device: torch.device) -> None:
    """Move all of a model but its blocks."""
    with without_blocks(model):
        model.to(device)


@contextmanager
def _explaining(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the memory of {device} is full. Run again with fewer --batch-tokens (batch_tokens), end other programs "
            "that use it, or compute on the CPU with --device cpu. Finished layers are kept: --resume goes on behind "
            "them, with these options, too."
        ) from error
