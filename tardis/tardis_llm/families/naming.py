"""A family that the user names: it is attached to a model, and checked by running the model."""

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
    """Check, by running two tokens, that FFNs whose parts a user has named compute `down(activation(up(x)))`.

    Models of a family in the table are not checked.

    Args:
        model: dense, in eval mode.
        sites: FFNs of the model.

    Raises:
        InvalidInputError: a part is not called, or its input is not the output of the part before it.
    """
    if not getattr(model.config, NAMED, None) or model.training:  # calibration refuses training mode in clearer words
        return
    parts = {part: name for site in sites for name, part in site.replaced.items()}
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        for part in parts:  # nan_to_num copies, as an activation may work in place, and makes NaN equal to itself
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
