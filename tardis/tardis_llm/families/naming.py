"""A family that the user names: it is attached to a model, and checked by running the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InvalidInputError
from .sites import FFNSite
from .table import NAMED, Family, family_of


@contextmanager
def named(model: PreTrainedModel, family: Family | None) -> Iterator[None]:
    """Attach the family that a user names to a model, for good; an error within the context detaches it again.

    Args:
        model: the family is written into its config, and so into every checkpoint that is saved from it.
        family: None changes nothing.
    """
    if family is None:
        yield
        return
    before = getattr(model.config, NAMED, None)
    setattr(model.config, NAMED, family.as_config())
    try:
        yield
    except BaseException:
        delattr(model.config, NAMED)
        if before is not None:
            setattr(model.config, NAMED, before)
        raise


def check_wiring(model: PreTrainedModel, sites: list[FFNSite]) -> None:
    """Check, by running two tokens, that FFNs whose parts a user has named compute what the family says.

    That is `down(activation(up(x)))` or, with a gate, `down(activation(gate(x)) * up(x))` and nothing else in the
    module around. Models of a family in the table are not checked.

    Args:
        model: dense, in eval mode.
        sites: FFNs of the model.

    Raises:
        InvalidInputError: a part is not called, or its input is not the output of the parts before it; or the family
            has an encoder of speech, which no other model than those of the table is known to have in the same way.
    """
    if getattr(model.config, NAMED, None) and family_of(model.config).speech:
        raise InvalidInputError("a Family with an encoder of speech cannot be named; of these TARDIS folds Whisper.")
    if not getattr(model.config, NAMED, None) or model.training:  # calibration refuses training mode in clearer words
        return
    inputs, outputs = _seen(model, sites)
    for site in sites:
        flow = _gated_flow if site.gated else _plain_flow
        for broken, one, other in flow(site, inputs, outputs):
            if one is None or other is None or not torch.equal(one, other):
                formula = "down(activation(gate(x)) * up(x))" if site.gated else "down(activation(up(x)))"
                raise InvalidInputError(
                    f"{broken}, so these FFNs are not {formula}, or the Family names other modules than their parts. "
                    "Correct the Family; for FFNs with a gate, give its `gate` or `merged=True`."
                )


#: what modules got or returned; those that were not called, or not with a tensor, are missing
_Tensors = dict[nn.Module, Tensor]
#: what is wrong unless two tensors are equal, and the two
_Flow = Iterator[tuple[str, Tensor | None, Tensor | None]]


@torch.no_grad()
def _seen(model: PreTrainedModel, sites: list[FFNSite]) -> tuple[_Tensors, _Tensors]:
    """The first argument and the result of every part of the FFNs, in a forward of two tokens."""
    inputs: _Tensors = {}
    outputs: _Tensors = {}

    def keep(where: _Tensors, part: nn.Module, value: Any) -> None:
        if isinstance(value, Tensor):
            where[part] = value.nan_to_num()  # copied, as others may work in place; and NaN is not equal to itself

    with ExitStack() as hooks:
        for part in {part for site in sites for part in (site.parent, site.activation, *site.linears.values())}:
            enter = part.register_forward_pre_hook(lambda part, args: keep(inputs, part, args[0] if args else None))
            leave = part.register_forward_hook(lambda part, args, output: keep(outputs, part, output))
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        model(input_ids=torch.tensor([[0, 1]], device=model.device))
    return inputs, outputs


def _plain_flow(site: FFNSite, inputs: _Tensors, outputs: _Tensors) -> _Flow:
    """What must be equal in `down(activation(up(x)))`."""
    for (first, before), (second, after) in pairwise(site.replaced.items()):
        yield f"{second} does not get what {first} returns", inputs.get(after), outputs.get(before)


def _gated_flow(site: FFNSite, inputs: _Tensors, outputs: _Tensors) -> _Flow:
    """What must be equal in `down(activation(gate(x)) * up(x))`; the module around must pass on x and the result."""
    for name, part in site.projections.items():
        yield f"{name} does not get what {site.prefix} gets", inputs.get(part), inputs.get(site.parent)
    (gate_name, gate), (up_name, up) = _gate_and_up(site, outputs)
    yield f"{site.activation_name} does not get {gate_name}", inputs.get(site.activation), gate
    activated = outputs.get(site.activation)
    product = None if activated is None or up is None else activated * up
    broken = f"{site.down_name} does not get what {site.activation_name} returns, times {up_name}"
    yield broken, inputs.get(site.down), product
    broken = f"{site.prefix} does not return what {site.down_name} does"
    yield broken, outputs.get(site.parent), outputs.get(site.down)


def _gate_and_up(site: FFNSite, outputs: _Tensors) -> list[tuple[str, Tensor | None]]:
    """The outputs of gate and up projection, each behind what an error calls it."""
    found = [(f"what {name} returns", outputs.get(part)) for name, part in site.projections.items()]
    if len(found) == 2:
        return found
    name, merged = found[0]
    halves = (None, None) if merged is None else merged.chunk(2, -1)
    return [(f"the {which} half of {name}", half) for which, half in zip(("first", "second"), halves, strict=True)]
