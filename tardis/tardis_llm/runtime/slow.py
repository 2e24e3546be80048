"""Say once why a folded FFN runs slowly, and what to do."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from .backend import BACKENDS, REFERENCE, backend_for


def warn_of_reference(x: Tensor, weights: torch.dtype) -> None:
    """Say once that the dtypes of inputs x, on a CPU, and of weights lead to the slow reference."""
    wrong = x.dtype not in BACKENDS[0].dtypes or (x.dtype != weights and backend_for(x) is not REFERENCE)
    if x.is_cpu and wrong:
        _warn_while_traced(x.dtype, weights)


@torch.compiler.assume_constant_result
def _warn_while_traced(inputs: torch.dtype, weights: torch.dtype) -> None:
    _warn_of_dtypes(inputs, weights)


@functools.cache
def _warn_of_dtypes(inputs: torch.dtype, weights: torch.dtype) -> None:
    found = f"in {_name(inputs)}" if inputs == weights else f"in {_name(weights)} with inputs in {_name(inputs)}"
    remedy = "" if inputs == weights else ", and leave out torch.autocast"
    *others, last = map(_name, BACKENDS[0].dtypes)
    warnings.warn(
        f"folded FFNs {found} run through the reference, which is slow: the kernels take weights and inputs of one "
        f'dtype, {", ".join(others)} or {last}. Load the model with dtype="bfloat16", or convert it by '
        f"model.to(torch.bfloat16){remedy}.",
        RuntimeWarning,
        stacklevel=2,
    )


def warn_of_order() -> None:
    """Say that a compiled model reads dense weights that do not lie neuron by neuron."""
    warnings.warn(
        "a compiled model has folded FFNs whose weights do not lie as the kernels read them, which makes it slow; "
        "call tardis_llm.runtime.decoding.prepare_decoding(model) before it is compiled.",
        RuntimeWarning,
        stacklevel=2,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
