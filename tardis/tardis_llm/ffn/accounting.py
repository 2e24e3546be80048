"""Bytes: what an FFN costs dense and folded.

`touched` is what one token reads at batch 1: the fold, the predictor with its scales, the ranges and lines, the up bias
(the range test needs all of it), and the W1 row and W2 column of each fixed neuron; where these are stored in few bits,
what the predictor has of the row is read already. `resident` is what stays in memory, fallback weights included.
Everything is counted as stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Storage

_SCALE_BYTES = 2
RANGE_BYTES = 2  # per number; four numbers a neuron


@dataclass(frozen=True)
class FFNShape:
    """The sizes of one FFN that its bytes depend on.

    Attributes:
        d: width of input and output.
        h: neurons.
        weight_bytes: bytes per dense weight.
        biases: whether up and down have biases.
    """

    d: int
    h: int
    weight_bytes: int
    biases: bool

    @property
    def dense(self) -> int:
        """Bytes of the dense FFN."""
        return self.weight_bytes * (2 * self.d * self.h + (self.d + self.h if self.biases else 0))

    def fold(self, storage: Storage) -> int:
        """Bytes of the fold and its bias."""
        weight = self._rows(self.d, storage.fold_bits, storage.group_size)
        return weight + self.weight_bytes * self.d

    def per_neuron(self, bits: int, storage: Storage) -> int:
        """Bytes that fixing one neuron reads: W1 row, without the predictor's bits if it shares them, and W2 column.

        Args:
            bits: of the predictor.
        """
        column = self._rows(1, storage.fallback_bits, storage.group_size)
        if storage.fallback_bits is None:
            return 2 * column
        return column + self._rows(1, storage.fallback_bits - bits, storage.group_size)

    def always(self, bits: int, storage: Storage, range_bytes: int = RANGE_BYTES) -> int:
        """Bytes that every token reads: fold, predictor, ranges and lines, up bias."""
        predictor = self._rows(self.h, bits, storage.group_size)
        bias = self.weight_bytes * self.h if self.biases else 0
        return self.fold(storage) + predictor + 4 * range_bytes * self.h + bias

    def touched(self, bits: int, storage: Storage, fix_rate: float) -> float:
        """Bytes that a token reads on average."""
        return self.always(bits, storage) + fix_rate * self.h * self.per_neuron(bits, storage)

    def affordable_fix_rate(self, bits: int, storage: Storage, reduction: float) -> float:
        """The fix rate at which this FFN reads `1 - reduction` of its dense bytes; negative if there is none."""
        left = (1 - reduction) * self.dense - self.always(bits, storage)
        return min(1.0, left / (self.h * self.per_neuron(bits, storage)))

    def _rows(self, count: int, bits: int | None, group_size: int) -> int:
        """Bytes of rows of d weights: dense for no bits given, nothing for zero bits."""
        if bits is None:
            return count * self.d * self.weight_bytes
        if not bits:
            return 0
        return count * (bits * math.ceil(self.d / 8) + math.ceil(self.d / min(group_size, self.d)) * _SCALE_BYTES)
