"""The activations that can be folded, and how to tell which of them a module computes.

A name stands for one function of numbers: that of a kind, such as `gelu`, or of a kind with the parameters that a layer
has learned, such as `xielu(0.8,0.8,0.5,-1e-06)`.

transformers has a dozen spellings of GELU (`gelu_new`, `gelu_fast`, `BloomGelu`, `nn.GELU`, ...). A name says
little: what counts is the function, so `identify` evaluates the module and compares.
"""

from __future__ import annotations

import copy
import math
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


def xielu(z: Tensor, alpha_p: float, alpha_n: float, beta: float, eps: float) -> Tensor:
    """xIELU, arXiv 2411.13010: `alpha_p z^2 + beta z` above 0, `alpha_n (expm1(min(z, eps)) - z) + beta z` below."""
    below = alpha_n * (torch.expm1(z.clamp(max=eps)) - z)
    return torch.where(z > 0, alpha_p * z * z, below) + beta * z


#: Canonical name -> elementwise function: any shape and floating dtype in, the same out.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": silu,
    "relu": relu,
    "relu2": relu2,
}

#: those with parameters: kind -> function of z and so many numbers
_WITH_PARAMETERS: dict[str, tuple[Callable[..., Tensor], int]] = {"xielu": (xielu, 4)}
#: all kinds, in the order of `TardisActivationKind` of runtime/cpu/interface.h
KINDS = (*ACTIVATIONS, *_WITH_PARAMETERS)


def kind(name: str) -> str:
    """The kind of an activation: its name without parameters."""
    return name.partition("(")[0]


def parameters(name: str) -> tuple[float, ...]:
    """The parameters of an activation, () of one that has none.

    Raises:
        UnsupportedModelError: no activation has this name, or it does not say the parameters as `named` does.
    """
    if name in ACTIVATIONS:
        return ()
    if kind(name) not in _WITH_PARAMETERS:
        raise UnsupportedModelError(f"the activation {name!r} is none of {', '.join(KINDS)}.")
    _, count = _WITH_PARAMETERS[kind(name)]
    found = tuple(map(_number, name[len(kind(name)) + 1 : -1].split(",")))
    if len(found) != count or not all(map(math.isfinite, found)) or name != named(kind(name), *found):
        raise UnsupportedModelError(f"the activation {name!r} does not say the {count} finite numbers that it has.")
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def named(kind: str, *parameters: float) -> str:
    """The name of an activation of a kind with these parameters, which it keeps exactly."""
    return f"{kind}({','.join(map(repr, parameters))})"


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of a name: any shape and floating dtype in, the same out.

    Raises:
        UnsupportedModelError: no activation has this name, or it has parameters that the name does not say.

    Example:
        >>> activation("xielu(0.8,0.8,0.5,-1e-06)")(torch.tensor([1.0]))
        tensor([1.3000])
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    own = parameters(name)
    function, _ = _WITH_PARAMETERS[kind(name)]
    return lambda z: function(z, *own)


# gelu and gelu_tanh, the nearest two, are 4.7e-4 apart; fp32 spellings of one function differ by 1e-6.
_TOLERANCE = 2e-5


def identify(module: Callable[[Tensor], Tensor]) -> str:
    """Name the canonical activation that `module` computes, by evaluating it in fp32 on the CPU.

    Args:
        module: an elementwise activation, usually an `nn.Module` of transformers. The model around it may be
            in any dtype and on any device, meta too: only a copy of it is evaluated where it has tensors of its own.

    Returns:
        A name that `activation` takes; a bare kind of `KINDS` where the module's parameters are on the meta device.

    Raises:
        UnsupportedModelError: the function is none of the canonical ones, or has other parameters or buffers.
    """
    if isinstance(module, nn.Module) and _state(module):
        return _identify_xielu(module)
    for name, function in ACTIVATIONS.items():
        if _computes(module, function):
            return name
    raise _unknown(module)


def _identify_xielu(module: nn.Module) -> str:
    """The name of a module with tensors of its own, all others than xIELU's being refused."""
    state = _state(module)
    if state.keys() != {"alpha_p", "alpha_n", "beta", "eps"}:
        raise _unknown(module)
    if any(tensor.is_meta for tensor in state.values()):
        return "xielu"
    with torch.device("cpu"), torch.no_grad():
        alpha_p, alpha_n, beta, eps = (state[name].double().cpu() for name in ("alpha_p", "alpha_n", "beta", "eps"))
        learned = F.softplus(alpha_p), beta + F.softplus(alpha_n), beta, eps
        name = named("xielu", *(value.item() for value in learned))
        if not _computes(copy.deepcopy(module).float().cpu(), activation(name)):
            raise _unknown(module)
    return name


def _unknown(module: Callable[[Tensor], Tensor]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the activation {module!r} is none of those that TARDIS folds: {', '.join(KINDS)}. Fold a "
        "model with one of these, or add the function to ACTIVATIONS in tardis_llm/ffn/activations.py."
    )


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module (PReLU, xIELU) by name: what it computes depends on them."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _computes(module: Callable[[Tensor], Tensor], function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a module computes a function, on the grid in fp32."""
    grid = _grid()
    return _same(module(grid.clone()), function(grid))  # a copy, because the module may work in place


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
