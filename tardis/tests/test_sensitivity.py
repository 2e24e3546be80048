"""How much the first token of a text counts is what the loss says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from folds import text
from marks import mostly_long
from models import tiny_model
from torch import Tensor

from tardis_llm.calibration.sensitivity import first_token_importance
from tardis_llm.calibration.stream import Stream
from tardis_llm.calibration.text import split_windows
from tardis_llm.families.sites import find_ffns

LENGTH = 6


@torch.no_grad()
@pytest.mark.parametrize("name", mostly_long(["gpt2", "gemma2"], ["gpt2"]))
def test_importance_is_that_of_small_changes_of_the_output(name: str) -> None:
    model = tiny_model(name).double()
    sites, ids = find_ffns(model), torch.randint(2, 256, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    site, step, squares, seen = sites[1], 2e-3, torch.zeros(LENGTH), {}

    def loss(change: Tensor) -> float:
        hook = site.down.register_forward_hook(lambda module, args, output: output + change)
        logits = model(ids).logits[0]
        hook.remove()
        return float(F.cross_entropy(logits[:-1].double(), ids[0, 1:], reduction="sum"))

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: output[0] if isinstance(output, tuple) else output})

    hooks = [site.down.register_forward_hook(keep("y")), site.block.register_forward_hook(keep("after"))]
    model(ids)
    for hook in hooks:
        hook.remove()
    for token, channel in product(range(LENGTH), range(seen["y"].shape[-1])):
        change = torch.zeros_like(seen["y"])
        change[0, token, channel] = step
        squares[token] += ((loss(change) - loss(-change)) / (2 * step)) ** 2
    for each in ("after",) if site.norm is None else ("after", "y"):
        squares *= seen[each][0].square().mean(-1).float()
    expected = max(1.0, float(squares[0] / squares[1:].mean()))
    assert first_token_importance(model, sites, ids)[1] == pytest.approx(expected, rel=2e-2)


def test_where_no_next_token_is_predicted_the_first_one_is_like_the_others() -> None:
    model = tiny_model("bert")
    assert first_token_importance(model, find_ffns(model), text(2)) == {}


def test_the_first_token_of_each_window_counts_by_its_importance(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    windows, site = split_windows(text(), 32, 0.125).fit[:4], find_ffns(model)[0]
    plain, told = (
        Stream(model, windows, tmp_path, 2**30, 4096, first).observe(site).weight.view(4, 32)
        for first in ({}, {0: 8.0, 1: 3.0})
    )
    ratio = told / plain
    torch.testing.assert_close(ratio[:, 0], 8 * ratio[:, 1])
    torch.testing.assert_close(ratio[:, 1:], ratio[:, 1:2].expand(4, 31))
