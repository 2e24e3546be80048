"""A device that is not there: tensors on it hold numbers of the CPU, and no operator mixes them with tensors of the CPU.

torch lets Python stand for a backend under a device type that it leaves free. Here that device computes everything with
the CPU's own operators, so that results are equal to the bit, and refuses what a GPU refuses: an operator with tensors
of two devices, but for copies and for numbers without a dimension. It stays in the process, and is torch's accelerator
from then on; run this file in one of its own.

    python on_device.py MODEL ...    folds each model on both devices, and prints one JSON object
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ["TARDIS_KERNELS"] = "off"  # kernels round in another way than the operators of torch

import torch
from folds import SETTINGS, text
from models import tiny_model
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from tardis_llm import FoldConfig, fold
from tardis_llm.errors import DeviceMemoryError, InvalidInputError

NAME = "pretended"
HERE = torch.device("cpu")
#: operators that may read from one device and write to the other
_COPIES = {"aten::copy_", "aten::_to_copy"}
#: plain, and with everything in few bits
CONFIGS = {
    "plain": SETTINGS,
    "stacked": replace(SETTINGS, predictor_bits=2, fold_bits=8, fallback_bits=4, linear_bits=8, group_size=32),
}


class There(Tensor):
    """A tensor on the device.

    Attributes:
        numbers: a tensor of the CPU with the same shape and strides.
    """

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> There:
        sizes = numbers.shape, numbers.stride(), numbers.storage_offset()
        made: There = Tensor._make_wrapper_subclass(cls, *sizes, dtype=numbers.dtype, device=torch.device(NAME, 0))
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(op, *args, **(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl  # else modules take it for a class of a user's own


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an operator of which some arguments, or the result, are on the device."""
    flat, form = tree_flatten((args, kwargs))
    tensors = [each for each in flat if isinstance(each, Tensor)]
    there = [each for each in tensors if isinstance(each, There)]
    others = [each for each in tensors if not isinstance(each, There) and each.dim()]
    if there and others and op._schema.name not in _COPIES:
        raise RuntimeError(f"{op} got tensors of two devices: {[list(each.shape) for each in others]} is on the CPU")
    asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    plain = [HERE if isinstance(each, torch.device) else each for each in flat]
    plain = [each.numbers if isinstance(each, There) else each for each in plain]
    positional, named = tree_unflatten(plain, form)
    found = op(*positional, **named)
    if asked == HERE:
        return found
    known = {id(numbers): given for numbers, given in zip(plain, flat, strict=True)}  # what is changed in place
    return tree_map_only(Tensor, lambda each: known.get(id(each)) if id(each) in known else There(each), found)


def register() -> None:
    """Let torch have the device."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(compute, "PrivateUse1")
    register.library = library  # type: ignore[attr-defined]  # it ends with what registered it


def folded(name: str, config: FoldConfig) -> dict[str, Tensor]:
    """All that a checkpoint of a folded tiny model has."""
    model = tiny_model(name, blocks=2)
    fold(model, text(), config)
    return {key: value.detach() for key, value in model.state_dict().items()}


def differing(name: str, config: FoldConfig) -> list[str]:
    """The tensors of a fold that are not the same, to the bit and on the CPU, on both devices; none if all are."""
    one, other = (folded(name, replace(config, device=device)) for device in ("cpu", NAME))
    assert one.keys() == other.keys()
    return [key for key, value in one.items() if type(other[key]) is not Tensor or not torch.equal(value, other[key])]


def refused(act: Callable[[], object]) -> str:
    """What is said of an error; empty without one."""
    try:
        act()
    except (RuntimeError, InvalidInputError, DeviceMemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    """Print what differs for each model and configuration."""
    register()
    names = sys.argv[1:]
    found = {name: {kind: differing(name, config) for kind, config in CONFIGS.items()} for name in names}
    sys.stdout.write(json.dumps({"differing": found}))


if __name__ == "__main__":
    main()
