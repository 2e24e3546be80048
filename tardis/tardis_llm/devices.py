"""The devices that are computed on, by the names that users give them."""

from __future__ import annotations

import torch

from .errors import InvalidInputError

#: stands for the accelerator that torch finds, or the CPU without one
AUTO = "auto"
_WITHOUT_FP64 = frozenset({"mps"})


def device_named(name: str) -> torch.device:
    """The device of a name, on which numbers in fp64 can be computed.

    Args:
        name: such as cpu, cuda or cuda:1; auto for the accelerator that torch finds, if it has fp64, and else the CPU.

    Raises:
        InvalidInputError: there is no such device here, or it has no fp64.

    Examples:
        >>> device_named("cpu")
        device(type='cpu')
        >>> device_named("gpu")
        Traceback (most recent call last):
            ...
        tardis_llm.errors.InvalidInputError: device is 'gpu', which is none of torch's; give cpu, cuda, cuda:1 or auto.
    """
    if name == AUTO:
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None or found.type in _WITHOUT_FP64 else device_named(found.type)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidInputError(
            f"device is {name!r}, which is none of torch's; give cpu, cuda, cuda:1 or auto."
        ) from error
    try:
        number = torch.zeros((), dtype=torch.float64, device=device)
        float(number)
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # each backend has its own
        reason = str(error).strip().partition("\n")[0]
        raise InvalidInputError(
            f"device is {name!r}, and torch cannot compute on it here ({reason}). Install the build of torch for your "
            "GPU and its driver, or give cpu, or auto for what is there."
        ) from error
    return number.device  # with its index
