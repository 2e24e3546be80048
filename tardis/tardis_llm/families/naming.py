"""Families that a user has named: given to a model, and tried out on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InvalidInputError
from .sites import FFNSite
from .table import NAMED, Family


@contextmanager
def named(model: PreTrainedModel, family: Family | None) -> Iterator[None]:
    """In the context and afterwards, a model is of the family that a user has named. An error in it undoes that.

    Args:
        model: its config keeps the family, and so does every checkpoint that is saved of it.
        family: None leaves the model as it is.
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
    """Where a user has named a model's family, see that its FFNs are `down(activation(up(x)))`, by running two tokens.

    Args:
        model: in eval mode, dense.
        sites: FFNs of the model.

    Raises:
        InvalidInputError: a part is not called, or does not get what the part before it returns.
    """
    if not getattr(model.config, NAMED, None) or model.training:  # which calibration refuses in clearer words
        return
    parts = {part: name for site in sites for name, part in site.replaced.items()}
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        for part in parts:  # copies, because an activation may work in place; NaN is another matter, refused later
            enter = part.register_forward_pre_hook(lambda part, args: inputs.update({part: args[0].nan_to_num()}))
            leave = part.register_forward_hook(lambda part, args, output: outputs.update({part: output.nan_to_num()}))
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        model(input_ids=torch.tensor([[0, 1]], device=model.device))
    for first, second in (pair for site in sites for pair in pairwise(site.replaced.values())):
        if first not in outputs or second not in inputs or not torch.equal(outputs[first], inputs[second]):
            raise InvalidInputError(
                f"{parts[second]} does not get what {parts[first]} returns, so these FFNs are not "
                "down(activation(up(x))), or the Family names other modules than their parts. Correct the Family; FFNs "
                "with a gate cannot be folded yet."
            )
