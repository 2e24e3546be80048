"""Modules that hold weights of a checkpoint: what they store keeps its order and its dtypes, whatever lies in memory.

While such a module computes, its weights may lie in another order than in files. Orders change under one lock, which
saving, loading, copying and moving take too, so that these never meet a weight that is half put away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError
from ..ffn.packed import PackedMatrix
from ..ffn.weights import Layout, Matrix, stored
from .backend import differentiated, lay_out

#: taken by what changes an order of memory, and by what must not see it change
LAYOUT = threading.RLock()


@contextmanager
def changing_layout() -> Iterator[None]:
    """Within the context, no other thread changes an order of memory, and tensors that are made are ordinary ones."""
    with LAYOUT, torch.inference_mode(False), torch.no_grad():
        yield


def reading_layout() -> AbstractContextManager[Any]:
    """For what reads tensors that belong together: the lock, which a graph that is being traced cannot hold."""
    return nullcontext() if torch.compiler.is_compiling() else LAYOUT


class Stored(nn.Module):
    """A module whose tensors are those of a checkpoint.

    Attributes:
        format_tensors: names of its own tensors whose dtype is the format's: the kernels read them by it. They keep it
            when the module is cast; all others follow the model's dtype.
    """

    format_tensors: ClassVar[frozenset[str]] = frozenset()

    def restore(self) -> None:
        """Put the weights into the order in which they are stored, if they are not."""

    def freeze(self) -> None:
        """Take no gradients for its own parameters."""
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with LAYOUT:
            self.restore()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with LAYOUT:
            self.restore()
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half`, `float`, `cuda` and `to_empty` go through."""
        with LAYOUT:
            self.restore()
            tensors = {**self._parameters, **self._buffers}
            kept = {id(tensor) for name, tensor in tensors.items() if name in self.format_tensors}

            def keeping_dtypes(tensor: Tensor) -> Tensor:
                moved = fn(tensor)
                return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

            super()._apply(keeping_dtypes, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        with LAYOUT:
            self.restore()
            return self.__dict__.copy()


class LaidOut(Stored):
    """A module with one matrix, which may lie in a backend's order of memory.

    Whoever reads a tensor that the matrix is stored in gets it in the stored order: it is put back.

    Attributes:
        matrix_tensors: names of the tensors that the matrix is stored in.
    """

    matrix_tensors: ClassVar[frozenset[str]]
    _layout: Layout | None = None

    def __getattr__(self, name: str) -> Any:
        """torch keeps tensors where Python does not find them, and asks here."""
        if name in self.matrix_tensors and self._layout is not None:
            self.restore()
        return super().__getattr__(name)

    @property
    def layout(self) -> Layout | None:
        """The matrix in a backend's order of memory; None where it is in the stored order."""
        return self._layout

    @property
    def current(self) -> Matrix:
        """The matrix in the order in which it is now."""
        with reading_layout():
            return self._layout or self._get()

    @property
    def matrix(self) -> Tensor | PackedMatrix:
        """The matrix in the order in which it is stored; a copy where it is laid out."""
        return stored(self.current)

    def lay_out(self, dtype: torch.dtype, by_rows: bool = False) -> None:
        """Put the matrix in the order in which products with inputs of a dtype are fastest, where there is one.

        Args:
            dtype: of the inputs.
            by_rows: whether rows here and there are read, and not all.
        """
        with changing_layout():
            if self._layout is None:
                self.exchange(lay_out(self._get(), dtype, by_rows) or self._get())

    def restore(self) -> None:
        """Put the matrix back into the order in which it is stored."""
        with changing_layout():
            if self._layout is not None:
                self.exchange(stored(self._layout))

    def exchange(self, matrix: Matrix) -> None:
        """Take another matrix of the same kind, in the order in which it is."""
        with changing_layout():
            self._layout = None
            if isinstance(matrix, Tensor | PackedMatrix):
                self._set(matrix)
            else:
                self._clear()
                self._layout = matrix

    def _get(self) -> Tensor | PackedMatrix:
        """The matrix, which is in the stored order."""
        raise NotImplementedError

    def _set(self, matrix: Any) -> None:
        """The inverse of `_get`."""
        raise NotImplementedError

    def _clear(self) -> None:
        """Let go of what `_get` returns."""
        raise NotImplementedError


def freeze(model: nn.Module) -> None:
    """Take no gradients for the parts of folded FFNs and for what is stored in few bits, as when a model is loaded.

    All other parameters, adapters among them, stay as they are.

    Args:
        model: folded, at least in parts.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> folded = AutoModelForCausalLM.from_pretrained("folded").requires_grad_(True)
        >>> freeze(folded)
        >>> [name for name, part in folded.named_parameters() if "tardis" in name and part.requires_grad]
        []
        >>> folded.transformer.wte.weight.requires_grad
        True
    """
    for module in model.modules():
        if isinstance(module, Stored):
            module.freeze()


#: why the parts of a fold cannot train, and what can
SOLVED = (
    "they were solved for or rounded together. Freeze them with tardis_llm.freeze(model) and train adapters or other "
    "layers, or train the dense model and fold it again."
)


def refuse_training(tensors: Iterable[Tensor | None], what: str, why: str = SOLVED) -> None:
    """Raise where gradients would be wanted for tensors that none reaches, or that must not change alone.

    Args:
        tensors: which must not be set to train.
        what: they are, with a verb, for the message.
        why: they cannot, and what to do.

    Raises:
        InvalidInputError: one is set to train.
    """
    if differentiated(*tensors):
        raise InvalidInputError(f"{what} set to train (requires_grad), which cannot be: {why}")
