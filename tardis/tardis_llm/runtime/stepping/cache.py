"""A cache of keys and values that grows in place, so that kernels can read and write it where it lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

_LEAST = 256  # positions that there is room for at first


class GrowingLayer(DynamicLayer):
    """Keys and values [batch, groups, length, size] of one layer, with room for more behind them.

    The room doubles when it is used up, so a token costs a copy of its own numbers alone. Layers with a sliding window
    keep what they no longer see.

    Attributes:
        rooms: where keys and values lie, [batch, groups, capacity, size] each.
        length: of what is there.
    """

    def __init__(self) -> None:
        self.rooms: list[Tensor] = []
        self.length = 0
        super().__init__()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rooms = [_room(states, _LEAST) for states in (key_states, value_states)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values [batch, groups, tokens, size] behind those that are there, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        self.make_room(tokens)
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, self.length : self.length + tokens] = states
        self.length += tokens
        return self.keys, self.values

    def make_room(self, tokens: int) -> None:
        """See that so many more fit; the rooms may then be others."""
        wanted = self.length + tokens
        if self.capacity < wanted:
            self.rooms = [self._larger(room, max(wanted, 2 * self.capacity)) for room in self.rooms]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many of the last positions, given as a negative number; a positive one is how many are left."""
        left = tokens_to_remove if tokens_to_remove > 0 else self.length + tokens_to_remove
        self.length = max(0, min(self.length, left))

    @property
    def capacity(self) -> int:
        """How many positions there is room for."""
        return int(self.rooms[0].shape[2])

    def get_seq_length(self) -> int:
        """How many positions are there."""
        return self.length

    @property
    def keys(self) -> Tensor:
        """[batch, groups, length, size]."""
        return self._there(0)

    @keys.setter
    def keys(self, new: Tensor | None) -> None:
        self._exchange(0, new)

    @property
    def values(self) -> Tensor:
        """[batch, groups, length, size]."""
        return self._there(1)

    @values.setter
    def values(self, new: Tensor | None) -> None:
        self._exchange(1, new)

    def _there(self, number: int) -> Tensor:
        return self.rooms[number][:, :, : self.length] if self.rooms else torch.empty(0)

    def _exchange(self, number: int, new: Tensor | None) -> None:
        """Take others in the place of those that are there, as repeating and reordering sequences do."""
        if new is None:
            self.rooms, self.length = [], 0
        elif self.rooms:
            room = _room(new, self.capacity)
            room[:, :, : self.length] = new
            self.rooms = [room if each == number else other for each, other in enumerate(self.rooms)]

    def _larger(self, room: Tensor, capacity: int) -> Tensor:
        larger = _room(room, capacity)
        larger[:, :, : self.length] = room[:, :, : self.length]
        return larger


class GrowingCache(Cache):
    """A `GrowingLayer` for each layer of a model.

    Args:
        layers: how many.

    Example:
        >>> cache = GrowingCache(model.config.num_hidden_layers)
        >>> cache = model(ids, past_key_values=cache).past_key_values
        >>> cache.get_seq_length() == ids.shape[1]
        True
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[GrowingLayer() for _ in range(layers)])


def _room(states: Tensor, capacity: int) -> Tensor:
    batch, groups, tokens, size = states.shape
    return states.new_zeros(batch, groups, max(capacity, tokens), size)
