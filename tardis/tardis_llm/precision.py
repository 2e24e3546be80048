"""Products of matrices in bf16 and fp16 on processors that have no arithmetic for them.

There torch takes 6 to 7 times as long as in fp32 (a Zen 3 with AVX2, 512 tokens in bf16). In fp32 results are rounded
once, at the end, as processors that have the arithmetic round them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset(
    {
        *(F.linear, F.conv1d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.addmm, torch.baddbmm),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
    }
)
#: those whose first argument is added to the product of the next two
_ADDED = frozenset({torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm})
_FEW = 16  # rows up to which reading a matrix takes longer than its products


@contextmanager
def quick_products() -> Iterator[None]:
    """Within the context, compute products in fp32 whose dtype the CPU has no arithmetic for; those on GPUs stay as is.

    Examples:
        >>> with quick_products():
        ...     y = torch.nn.functional.linear(x, weight)
        >>> y.dtype == x.dtype
        True
    """
    slow = slow_dtypes()
    if not slow:
        yield
        return
    with _InFp32(slow):
        yield


def slow_dtypes() -> frozenset[torch.dtype]:
    """Those of 16 bits that the CPU has no arithmetic for, as oneDNN tells; none where torch is built without it."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    known = torch.ops.mkldnn
    return frozenset(
        dtype
        for dtype, has in (
            (torch.bfloat16, known._is_mkldnn_bf16_supported),
            (torch.float16, known._is_mkldnn_fp16_supported),
        )
        if not has()
    )


class _InFp32(TorchFunctionMode):
    def __init__(self, slow: frozenset[torch.dtype]) -> None:
        super().__init__()
        self._slow = slow

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = 1 if func in _ADDED else 0
        if func not in _PRODUCTS or len(args) <= first or not self._pays(args[first]):
            return func(*args, **kwargs)
        wide = [self._wide(value) for value in args]
        return func(*wide, **{name: self._wide(value) for name, value in kwargs.items()}).to(args[0].dtype)

    def _pays(self, factor: Any) -> bool:
        return self._is_slow(factor) and bool(factor.numel() > _FEW * factor.shape[-1])

    def _wide(self, value: Any) -> Any:
        return value.float() if self._is_slow(value) else value

    def _is_slow(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.is_cpu and value.dtype in self._slow
