"""The activations that can be folded, and how to tell which of them a module computes.

transformers has a dozen spellings of GELU (`gelu_new`, `gelu_fast`, `BloomGelu`, `nn.GELU`, ...). A name says
little: what counts is the function, so `identify` evaluates the module and compares.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedModelError


def gelu(z: Tensor) -> Tensor:
    """Exact GELU, `z * Phi(z)` with the normal distribution function `Phi` (erf)."""
    return F.gelu(z)


def gelu_tanh(z: Tensor) -> Tensor:
    """GELU with `Phi` approximated through tanh, as in GPT-2. At most 5e-4 from `gelu`."""
    return F.gelu(z, approximate="tanh")


def quick_gelu(z: Tensor) -> Tensor:
    """GELU with `Phi(z)` approximated by `sigmoid(1.702 z)`."""
    return z * torch.sigmoid(1.702 * z)


def silu(z: Tensor) -> Tensor:
    """SiLU (swish), `z * sigmoid(z)`."""
    return F.silu(z)


def relu(z: Tensor) -> Tensor:
    """`max(z, 0)`."""
    return F.relu(z)


def relu2(z: Tensor) -> Tensor:
    """Squared ReLU, `max(z, 0)^2`."""
    return F.relu(z).square()


#: Canonical name -> elementwise function: any shape and floating dtype in, the same out.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": silu,
    "relu": relu,
    "relu2": relu2,
}

# gelu and gelu_tanh, the nearest two, are 4.7e-4 apart; fp32 spellings of one function differ by 1e-6.
_TOLERANCE = 2e-5


def identify(module: Callable[[Tensor], Tensor]) -> str:
    """Name the canonical activation that `module` computes, by evaluating it in fp32 on the CPU.

    Args:
        module: an elementwise activation, usually an `nn.Module` of transformers. The model around it may be
            in any dtype and on any device, meta too: it is evaluated only if it has no tensors of its own.

    Returns:
        A key of `ACTIVATIONS`.

    Raises:
        UnsupportedModelError: the function has parameters or buffers, or is none of the canonical ones.
    """
    if not _has_state(module):
        grid = _grid()
        values = module(grid.clone())  # a copy, because the module may work in place
        for name, function in ACTIVATIONS.items():
            if _same(values, function(grid)):
                return name
    raise UnsupportedModelError(
        f"the activation {module!r} is none of those that TARDIS folds: {', '.join(ACTIVATIONS)}. Fold a "
        "model with one of these, or add the function to ACTIVATIONS in tardis_llm/ffn/activations.py."
    )


def _has_state(module: Callable[[Tensor], Tensor]) -> bool:
    """Whether the module keeps tensors (PReLU, xIELU): a learned activation is not a fixed function."""
    return isinstance(module, nn.Module) and bool([*module.parameters(), *module.buffers()])


def _grid() -> Tensor:
    """Points [n] fp32: dense where activations bend, and some far out, where `gelu_10` is clipped."""
    dense = torch.linspace(-12, 12, 4801, dtype=torch.float32, device="cpu")
    far = 2.0 ** torch.arange(4, 11, dtype=torch.float32, device="cpu")
    return torch.cat([-far, dense, far])


def _same(values: Tensor, reference: Tensor) -> bool:
    """Whether two results on the grid agree: absolutely near zero, relatively where the function grows."""
    if values.shape != reference.shape:
        return False
    return torch.allclose(values, reference, rtol=_TOLERANCE, atol=_TOLERANCE)
