"""A device that is not there: tensors on it hold numbers of the CPU, and no operator mixes them with the CPU's own.

torch lets Python stand for a backend under a device type that it leaves free. Here that device computes everything with
the CPU's own operators, so that results are equal to the bit, and refuses what a GPU refuses: an operator with tensors
of two devices, but for copies and for numbers without a dimension. It stays in the process, and is torch's accelerator
from then on; run this file in one of its own.

    python on_device.py MODEL ...    folds each model on both devices, and prints `found` as a JSON object
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

os.environ["TARDIS_KERNELS"] = "off"  # kernels round in another way than the operators of torch

import torch
from folds import SETTINGS, text
from models import tiny_model
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._pytree import tree_map_only

from tardis_llm import FoldConfig, fold
from tardis_llm.calibration import residence
from tardis_llm.calibration.text import split_windows
from tardis_llm.calibration.tokens import Tokens
from tardis_llm.evaluation.self_check import SelfCheck
from tardis_llm.folding import ranges

NAME = "pretended"
HERE = torch.device("cpu")
#: operators that may read from one device and write to the other
_COPIES = {"aten::copy_", "aten::_to_copy"}
#: fields of the configs of tiny models that make them tinier
SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"blocks": 2, "n_embd": 32, "n_inner": 64},
    "llama": {"blocks": 2, "hidden_size": 32, "intermediate_size": 52},
    "gemma3_text": {"blocks": 2, "hidden_size": 32, "intermediate_size": 52, "head_dim": 8},
}
#: plain, and with everything in few bits and nothing to choose
CONFIGS = {
    "plain": SETTINGS,
    "stacked": replace(
        SETTINGS,
        predictor_bits=2,
        fold_bits=8,
        fallback_bits=4,
        linear_bits=8,
        group_size=16,
        damping=0.01,
        split="uniform",
    ),
}
WINDOWS = 12  # of 32 tokens, to calibrate on


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

    def tolist(self) -> Any:
        """The numbers, which torch gives of no subclass."""
        return self.numbers.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # else modules take it for a class of a user's own


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an operator of which some arguments, or the result, are on the device."""
    given: list[Tensor] = []
    positional, named = _plain(args, given), {key: _plain(value, given) for key, value in kwargs.items()}
    there = [each for each in given if isinstance(each, There)]
    others = [list(each.shape) for each in given if not isinstance(each, There) and each.dim()]
    if there and others and op._schema.name not in _COPIES:
        raise RuntimeError(f"{op} got tensors of two devices: those of shapes {others} are on the CPU")
    found = op(*positional, **named)
    if kwargs.get("device") is not None and torch.device(kwargs["device"]) == HERE:
        return found
    changed = {id(each.numbers): each for each in there}  # what is changed in place is returned as it was given
    return tree_map_only(Tensor, lambda each: changed[id(each)] if id(each) in changed else There(each), found)


def _plain(value: Any, given: list[Tensor]) -> Any:
    """An argument as the CPU gets it; its tensors are added to those given."""
    if isinstance(value, list | tuple):
        return [_plain(each, given) for each in value]
    if isinstance(value, Tensor):
        given.append(value)
    return value.numbers if isinstance(value, There) else HERE if isinstance(value, torch.device) else value


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc, name-defined]
    """What torch asks of a device beside operators."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing of its own to seed: what is drawn on it is drawn by the CPU."""

    def get_rng_state(self, device: torch.device) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        torch.set_rng_state(state)


def register() -> None:
    """Let torch have the device."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    every, one = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(compute, "PrivateUse1")
    one.impl("copy_", partial(compute, torch.ops.aten.copy_.default), "PrivateUse1")  # torch.tensor finds no other
    register.kept = every, one  # type: ignore[attr-defined]  # what is registered ends with them


def folded(name: str, config: FoldConfig) -> dict[str, Tensor]:
    """All that a checkpoint of a folded tiny model has, and what its self-check found."""
    model, windows = tiny_model(name, **SMALL.get(name, {})), split_windows(text(WINDOWS), 32, 0.125)
    model.set_attn_implementation("eager")  # torch has other kernels for attention on a CPU than elsewhere
    check = SelfCheck(model, windows.heldout, device=config.torch_device)
    fold(model, windows, config)
    found = {key: value.detach() for key, value in model.state_dict().items()}
    return {**found, "growth": torch.tensor(check.verdict().growth)}


def differing(name: str, config: FoldConfig) -> list[str]:
    """The tensors of a fold that are not the same and on the CPU, on both devices; none if all are.

    Codes are the same to the bit; sums need not be, as torch may add up a linear layer's otherwise elsewhere.
    """
    one, other = (folded(name, replace(config, device=device)) for device in ("cpu", NAME))
    assert one.keys() == other.keys()
    return [key for key, value in one.items() if type(other[key]) is There or not alike(value, other[key])]


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether codes are equal, and other numbers but for rounding."""
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=0, atol=1e-4 * float(one.abs().max()))


@contextmanager
def counting(counts: list[int]) -> Iterator[None]:
    """Within the context, list how many blocks of a model are on the device when one runs."""
    run, seen = residence._Turns.run, dict[int, set[nn.Module]]()

    def counted(turns: Any, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result, known = run(turns, block, *args, **kwargs), seen.setdefault(id(turns), set())
        known.add(block)
        counts.append(sum(any(isinstance(part, There) for part in each.parameters()) for each in known))
        return result

    with patch.object(residence._Turns, "run", counted):
        yield


def refused(owner: object, attribute: str, wrong: Callable[..., Any]) -> str:
    """What is said of a fold on the device in which a function is replaced by a wrong one; empty if it ends well."""
    try:
        with patch.object(owner, attribute, wrong):
            fold(tiny_model("gpt2", **SMALL["gpt2"]), text(WINDOWS), replace(SETTINGS, device=NAME))
    except RuntimeError as error:
        return str(error)
    return ""


def mistakes() -> dict[str, str]:
    """What is said of two mistakes that are made on purpose."""
    return {
        "tokens stay on the CPU": refused(Tokens, "_moved", lambda tokens: tokens),
        "numbers of bins are on the CPU": refused(
            ranges, "_bins_between", lambda start, stop: torch.arange(ranges.BINS) < stop[:, None]
        ),
    }


def found(names: list[str]) -> dict[str, Any]:
    """What differs between folds of models on both devices, the most blocks on one at a time, and what mistakes do."""
    counts: list[int] = []
    with counting(counts):
        differs = {name: {kind: differing(name, config) for kind, config in CONFIGS.items()} for name in names}
    return {"differing": differs, "crowd": max(counts), "mistakes": mistakes()}


def main() -> None:
    """Print what is found."""
    register()
    sys.stdout.write(json.dumps(found(sys.argv[1:])))


if __name__ == "__main__":
    main()
