"""The five terms in which everything else is said, for plain and for gated neurons."""

from __future__ import annotations

import pytest
import torch
from synthetic import normal

from tardis_llm.ffn.activations import ACTIVATIONS
from tardis_llm.ffn.neuron import Neurons, value

H, TOKENS = 6, 40
every_k = pytest.mark.parametrize("k", [1, 2])
every_activation = pytest.mark.parametrize("name", list(ACTIVATIONS))


def neurons(k: int, name: str = "gelu") -> Neurons:
    low = normal(H, seed=2) - 1
    return Neurons(name, low, low + normal(H, seed=3).abs(), normal(k * H, seed=4), normal(H, seed=5))


@every_k
@every_activation
def test_value_line_residual_and_score_are_those_of_each_neuron_by_itself(k: int, name: str) -> None:
    v, made, act, norm = 2 * normal(TOKENS, k * H, seed=1), neurons(k, name), ACTIVATIONS[name], normal(H, seed=6).abs()
    for i in range(H):
        own, slope = v[:, i::H], made.slope[i::H]
        wanted = act(own[:, 0]) * (own[:, 1] if k == 2 else 1)
        line = own @ slope + made.offset[i]
        torch.testing.assert_close(made.value(v)[:, i], wanted)
        torch.testing.assert_close(made.line(v)[:, i], line)
        torch.testing.assert_close(made.residual(v)[:, i], wanted - line)
        torch.testing.assert_close(made.score(v, norm)[:, i], (wanted - line).abs() * norm[i])
    assert torch.equal(made.residual(v, made.value(v)), made.residual(v))
    assert torch.equal(value(v, act, k), made.value(v)) and made.k == k and made.count == H


@every_k
def test_some_of_the_neurons_are_what_they_are_among_all(k: int) -> None:
    v, made = normal(TOKENS, k * H, seed=1), neurons(k)
    chosen = torch.tensor([4, 1])
    own = v.unflatten(1, (k, H))[:, :, chosen].flatten(1)
    assert torch.equal(made.at(chosen).residual(own), made.residual(v)[:, chosen])
    assert torch.equal(made.at(slice(None)).residual(v), made.residual(v))
    assert made.at(torch.tensor([], dtype=torch.long)).residual(v[:, :0]).shape == (TOKENS, 0)


def test_bounds_are_in_the_range_and_nan_is_not() -> None:
    made = neurons(1)
    v = torch.stack([made.low, made.high, made.low - 1, made.high + 1, torch.full((H,), torch.nan)])
    assert made.outside(v).all(1).tolist() == [False, False, True, True, True]
    assert not made.outside(v)[:2].any()


def test_a_gated_neuron_leaves_its_range_by_its_residual() -> None:
    made, v = neurons(2), normal(TOKENS, 2 * H, seed=1)
    residual = made.residual(v)
    assert torch.equal(made.outside(v), (residual < made.low) | (residual > made.high))
    assert made.outside(v).any() and not made.outside(v).all()
    assert made.outside(torch.full((1, 2 * H), torch.nan)).all()


def test_what_is_stored_in_halves_is_computed_in_fp32() -> None:
    made, v = neurons(1), normal(TOKENS, H, seed=1)
    halves = made.map(torch.Tensor.half)
    assert halves.nbytes * 2 == made.nbytes and halves.residual(v).dtype == torch.float32
    assert torch.equal(halves.residual(v), halves.map(torch.Tensor.float).residual(v))
