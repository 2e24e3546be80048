"""Signatures, distances and the memory, on histograms of anything."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doraemon import Memory, distance, drift, signature

COUNTS = st.lists(st.floats(0, 1e9), min_size=1, max_size=20)


@given(COUNTS)
def test_a_signature_is_a_distribution_without_zeros(counts: list[float]) -> None:
    shares = signature(counts)
    assert shares.sum() == pytest.approx(1)
    assert (shares > 0).all()


@given(COUNTS, st.randoms())
def test_distance_is_zero_only_to_itself_and_finite(counts: list[float], random: object) -> None:
    one, other = signature(counts), signature(counts[::-1])
    assert distance(one, one) == 0
    assert 0 <= distance(one, other) < math.inf


def test_distance_counts_search_steps() -> None:
    half = np.array([0.5, 0.5, 0, 0])
    assert distance(half, np.full(4, 0.25)) == 1.0  # accesses in half of the bins: one step could be saved
    assert drift(half, np.full(4, 0.25), steps_per_bit=0.5) == 0.5
    assert distance(np.full(4, 0.25), half) == math.inf


def test_the_prior_is_believed_until_there_are_counts() -> None:
    prior = [0.7, 0.2, 0.1]
    np.testing.assert_allclose(signature([0, 0, 0], prior), prior)
    np.testing.assert_allclose(signature([0, 1e9, 0], prior), [0, 1, 0], atol=1e-6)


def test_the_least_recently_recalled_is_forgotten_first() -> None:
    memory = Memory[str](capacity=2)
    a, b, c = signature([9, 1, 1]), signature([1, 9, 1]), signature([1, 1, 9])
    memory.remember(a, "a")
    memory.remember(b, "b")
    match = memory.recall(a, within=0.0)
    assert match is not None and match.value == "a"
    memory.remember(c, "c")
    assert [value for _, value in memory] == ["a", "c"]


def test_remembering_a_workload_again_replaces_it() -> None:
    memory = Memory[int](capacity=4)
    for value in range(5):
        memory.remember(signature([100, 1 + value / 1000]), value)
    assert [value for _, value in memory] == [4]


def test_a_memory_of_capacity_0_remembers_nothing() -> None:
    memory = Memory[int](capacity=0)
    memory.remember(signature([1]), 1)
    assert len(memory) == 0


def test_histograms_of_other_bins_never_match() -> None:
    memory = Memory[int]()
    memory.remember(signature([1, 2, 3]), 1)
    assert memory.nearest(signature([1, 2])) is None
    with pytest.raises(ValueError, match="same bins"):
        distance([1.0], [0.5, 0.5])
    with pytest.raises(ValueError, match="give as many"):
        signature([1, 2], prior=[1])
    with pytest.raises(ValueError, match="more than 0"):
        signature([1, 2], strength=0)
