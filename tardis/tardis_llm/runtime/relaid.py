"""Modules whose weights lie in another order while they compute than when they are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..folding.lowbit import PackedMatrix
from . import ops
from .panels import Panels


class Relaid(nn.Module):
    """Puts its weights back into the order in which they are stored when it is saved, loaded, copied or moved.

    So there is one copy of them at any time, and files know one order only.
    """

    def unpack(self) -> None:
        """Put the weights back, if they are not."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.unpack()
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        return self.__dict__.copy()


class InPanels(Relaid):
    """A module with one matrix, which may be in panels."""

    def __init__(self) -> None:
        super().__init__()
        self._panels: Panels | None = None

    @property
    def in_panels(self) -> bool:
        """Whether it is."""
        return self._panels is not None

    @property
    def laid(self) -> Tensor | PackedMatrix | Panels:
        """The matrix as it lies."""
        return self._panels or self._get()

    @property
    def stored(self) -> Tensor | PackedMatrix:
        """The matrix as it is stored; where it is in panels, a copy."""
        return self._panels.matrix() if self._panels else self._get()

    def pack(self, dtype: torch.dtype) -> None:
        """Put the matrix in panels, where the kernels take it so for inputs of this dtype."""
        with torch.inference_mode(False), torch.no_grad():
            if self._panels is None:
                self._panels = ops.panels_of(self._get(), dtype)
                if self._panels:
                    self._clear()

    def unpack(self) -> None:
        """Put the matrix back."""
        with torch.inference_mode(False), torch.no_grad():
            if self._panels:
                self._set(self._panels.matrix())
                self._panels = None

    def _get(self) -> Tensor | PackedMatrix:
        """The matrix, which is not in panels."""
        raise NotImplementedError

    def _set(self, matrix: Any) -> None:
        """The inverse of `_get`."""
        raise NotImplementedError

    def _clear(self) -> None:
        """Let go of what `_get` returns."""
        raise NotImplementedError
