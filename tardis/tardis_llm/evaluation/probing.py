"""Random tokens for a model, and what its modules get when it sees them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families.table import vocabulary


def random_ids(model: PreTrainedModel, batch: int, tokens: int, seed: int) -> Tensor:
    """Token ids [batch, tokens] that the model knows, the same for the same seed."""
    return torch.randint(vocabulary(model), (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def arguments_of(model: PreTrainedModel, modules: Sequence[nn.Module], ids: Tensor) -> list[tuple[Any, ...]]:
    """The positional arguments of each of the modules, in the order of their calls, when the model sees ids."""
    calls: list[tuple[Any, ...]] = []
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(lambda _, args: calls.append(args)).remove)
        model(input_ids=ids, use_cache=False)
    return calls
