"""Faster memory: freed blocks are kept for the next temporary tensor, and weights lie in huge pages."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt
_MIB = 2**20
_PAGE, _HUGE_PAGE = 4096, 2 * _MIB
_LEAST, _LARGE = 16 * _PAGE, 2 * _HUGE_PAGE  # from when on huge pages matter, and from when on a tensor has its own
_SHARED = 32 * _MIB


def keep_freed_memory() -> bool:
    """Let glibc reuse freed blocks of up to 32 MiB, and keep up to 256 MiB of them. Call it when a process starts.

    By default each large temporary is mapped, faulted in page by page and unmapped again. On virtual machines, where a
    page fault is slow, that can be most of the time of calibration.

    Returns:
        Whether the C library took the settings; only glibc knows them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 * _MIB)) and bool(mallopt(_TRIM_THRESHOLD, 256 * _MIB))


def use_huge_pages(modules: Iterable[nn.Module]) -> int:
    """Move those weights of modules that are not small and on the CPU into huge pages; values and strides stay.

    Weights that were memory-mapped from files are copied, too, so the files are no longer needed. Parameters are
    replaced, and not written over: a call that another thread runs meanwhile keeps those that it began with.

    Args:
        modules: the own parameters and buffers of each are moved; what modules share, they share afterwards.

    Returns:
        How many bytes were moved.
    """
    moved = 0
    for places in _places(modules):
        tensors, name = places[0]
        there = tensors[name]
        if not _gains(there) or _ARENAS.hold(there):
            continue
        copy = _in_huge_pages(there)
        for tensors, name in places:
            tensors[name] = copy
        moved += copy.nbytes
    return moved


def _places(modules: Iterable[nn.Module]) -> list[list[tuple[dict[str, Any], str]]]:
    """Where modules keep each of their parameters and buffers: names in dictionaries of theirs, several if shared."""
    found: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((tensors, name))
    return list(found.values())


def _in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy in huge pages with the strides of the tensor; of a parameter a parameter."""
    transposed = tensor.dim() == 2 and not tensor.is_contiguous()  # W2 where it is laid out neuron by neuron
    data = tensor.detach()
    copy = contiguous_in_huge_pages(data.mT).mT if transposed else contiguous_in_huge_pages(data)
    return replaced(tensor, copy) if isinstance(tensor, nn.Parameter) else copy


def replaced(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    """A parameter with other data, and all else that one has that it takes the place of."""
    new: nn.Parameter = torch.Tensor._make_subclass(type(parameter), data.detach(), parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    return new


def contiguous_in_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor, in huge pages if it is not small, is on the CPU, and the system has such pages.

    With pages of 2 MiB the page tables stay in the processor's caches, which matters most to folded FFNs, whose fixing
    reads scattered rows. The copy begins at the start of a page: processors fetch cache lines in pairs, and parts of
    rows that share no pair with their neighbours are read up to 1.3 times as fast.
    """
    if not _gains(tensor) or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)
    return _ARENAS.room(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


class _Arena:
    """Huge pages that tensors share. They are given back when none of the tensors is left that lie in them."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # the kernel has no huge pages; small ones do
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()
        self._begin = -self.address % _HUGE_PAGE
        self._end = self._begin + size

    @property
    def left(self) -> int:
        """Bytes that there is room for."""
        return self._end - self._begin

    def room(self, size: int) -> Tensor:
        """[size] uint8 that begins at the start of a page, in a storage of its own; there must be so many left."""
        begin = self._begin
        self._begin += -(-size // _PAGE) * _PAGE
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=size, offset=begin)


class _Arenas:
    """Where tensors get room in huge pages: small ones together, large ones by themselves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: _Arena | None = None
        self._memory: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address

    def room(self, size: int) -> Tensor:
        """[size] uint8 in memory that nothing else uses."""
        with self._lock:
            if size >= _LARGE:
                return self._new(size).room(size)
            if self._last is None or self._last.left < size:
                self._last = self._new(_SHARED)
            return self._last.room(size)

    def hold(self, tensor: Tensor) -> bool:
        """Whether a tensor on the CPU lies in huge pages that were made here."""
        at = tensor.data_ptr()
        with self._lock:
            return any(begin <= at < begin + len(memory) for begin, memory in self._memory.items())

    def _new(self, size: int) -> _Arena:
        arena = _Arena(size)
        self._memory[arena.address] = arena.memory
        return arena


_ARENAS = _Arenas()


def _gains(tensor: Tensor) -> bool:
    """Whether a tensor is large enough for huge pages to matter, and on the CPU."""
    return tensor.device.type == "cpu" and tensor.nbytes >= _LEAST
