"""Up to how many tokens at once a folded FFN is faster than the dense one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..families.table import position_limit
from ..ffn.weights import DenseFFN
from ..report import Progress
from ..runtime.backend import dense_ffn
from ..runtime.modules import FoldedFFN
from ..runtime.placing import folded_ffns
from .shapes import arguments_of, random_ids
from .turns import Ratio, take_turns

#: tokens at once for which a fold is compared with the dense FFN
TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ROUNDS = 9
_LOST = 0.7  # the ratio below which more tokens are not tried


def ffn_speed_ups(model: PreTrainedModel, progress: Progress) -> dict[int, Ratio]:
    """How many times faster than dense a model's middle folded FFN is, by the number of tokens at once.

    Args:
        model: folded, its dense FFN weights resident; the FFN gets the inputs that random tokens give.
        progress: told of the rounds done.
    """
    ffn = list(folded_ffns(model).values())[len(folded_ffns(model)) // 2]
    x, weights = _call_of(model, ffn, TOKEN_COUNTS[-1])
    dense = replace(weights, w1=weights.w1.contiguous(), w2=weights.w2.contiguous())
    by_neuron = replace(dense, w2=weights.w2.T.contiguous().T)
    found: dict[int, Ratio] = {}
    with torch.inference_mode():
        for count in TOKEN_COUNTS:
            some = x[:count].contiguous()
            calls = {"dense": partial(dense_ffn, some, dense), "folded": partial(ffn, some, by_neuron)}
            timed = {name: partial(_seconds, call) for name, call in calls.items()}
            taken = take_turns(timed, _ROUNDS, progress, f"crossover, {count} tokens")
            found[count] = Ratio.of(taken["dense"], taken["folded"])
            if found[count].value < _LOST:
                break
    return found


def pays_up_to(speed_ups: Mapping[int, Ratio]) -> int:
    """The most tokens up to which folding was faster throughout; 0 if it never was.

    Example:
        >>> pays_up_to({1: Ratio(3.0, 2.9, 3.1), 2: Ratio(1.2, 1.1, 1.3), 4: Ratio(0.9, 0.8, 1.0)})
        2
    """
    most = 0
    for count, ratio in sorted(speed_ups.items()):
        if ratio.value <= 1:
            break
        most = count
    return most


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _call_of(model: PreTrainedModel, ffn: FoldedFFN, tokens: int) -> tuple[Tensor, DenseFFN]:
    """What a folded FFN gets when the model sees so many random tokens: x [tokens, d], and the dense weights."""
    length = min(tokens, position_limit(model.config) or tokens)
    ((x, dense),) = arguments_of(model, [ffn], random_ids(model, -(-tokens // length), length, seed=4))
    return x.reshape(-1, x.shape[-1])[:tokens], dense
