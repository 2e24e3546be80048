"""Low-bit matrices: how they are stored, and how well they are rounded."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import correlated, generator, normal, quick
from torch import Tensor

from tardis_llm.config import PREDICTOR_BITS
from tardis_llm.errors import InvalidInputError
from tardis_llm.ffn.packed import PackedMatrix, expand_scale, pack, unpack
from tardis_llm.folding import rounding as module
from tardis_llm.folding.rounding import best_scale, quantise

widths = st.sampled_from(PREDICTOR_BITS)
every_width = pytest.mark.parametrize("bits", PREDICTOR_BITS)


def codes(bits: int, h: int, d: int, seed: int = 0) -> Tensor:
    """Random codes [h, d] uint8 below 2^bits."""
    return torch.randint(2**bits, (h, d), generator=generator(seed)).to(torch.uint8)


def covariance_of(d: int, seed: int = 0) -> Tensor:
    """Second moments [d, d] of correlated inputs."""
    x = correlated(4 * d, d, seed)
    return x.T @ x / len(x)


def output_error(w: Tensor, rounded: PackedMatrix, covariance: Tensor) -> float:
    """Mean over tokens of |(w - rounded) x|^2."""
    error = (rounded.dequantise() - w).double()
    return float(((error @ covariance.double()) * error).sum())


@quick
@given(widths, st.integers(1, 5), st.integers(1, 40) | st.integers(500, 1100))
def test_packing_and_unpacking_gives_the_codes_back(bits: int, h: int, d: int) -> None:
    original = codes(bits, h, d)
    planes = pack(original, bits)
    assert planes.shape == (h, bits, -(-d // 8))
    assert planes.dtype == torch.uint8
    assert torch.equal(unpack(planes, d), original)


def test_the_layout_of_the_planes_is_the_documented_one() -> None:
    # the first plane has the high bits; a block of 9 columns has 2 bytes, and bit k of byte j is that of column 2 k + j
    planes = pack(torch.tensor([[3, 0, 1, 2, 3, 3, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1, 2]]), 2)
    assert planes.tolist() == [
        [[0b00000101, 0b00000110], [0b00010111, 0b00000100]],
        [[0b00010000, 0b00000000], [0b00000000, 0b00001000]],
    ]


def test_blocks_of_512_columns_come_first() -> None:
    codes = torch.zeros(1, 512 + 512 + 8)
    for column in (3, 512 + 64 * 5 + 7, 1024 + 6):
        codes[0, column] = 1
    (plane,) = pack(codes, 1)[0]
    assert plane.nonzero().flatten().tolist() == [3, 64 + 7, 128]
    assert plane[[3, 64 + 7, 128]].tolist() == [1, 1 << 5, 1 << 6]


@every_width
def test_the_first_planes_are_a_coarser_copy(bits: int) -> None:
    original = codes(bits, 4, 19)
    for kept in range(1, bits + 1):
        assert torch.equal(unpack(pack(original, bits)[:, :kept], 19), original >> (bits - kept))


@every_width
def test_levels_are_symmetric_and_evenly_spaced(bits: int) -> None:
    every_code = torch.arange(2**bits)[None]
    stored = PackedMatrix(pack(every_code, bits), torch.tensor([[0.5]]).half(), 2**bits, 2**bits)
    levels = stored.dequantise()[0]
    assert torch.equal(levels, -levels.flip(0))
    assert levels.diff().unique().tolist() == [0.5]
    assert stored.bits == bits


def test_every_group_of_columns_has_its_own_scale() -> None:
    scale = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]).half()
    stored = PackedMatrix(pack(torch.ones(2, 8, dtype=torch.uint8), 1), scale, 8, 3)
    assert stored.dequantise().tolist() == [[0.5, 0.5, 0.5, 1, 1, 1, 2, 2], [4, 4, 4, 8, 8, 8, 16, 16]]


def test_scales_expand_to_columns() -> None:
    assert expand_scale(torch.tensor([[1.0, 2.0]]), 3, 5).tolist() == [[1, 1, 1, 2, 2]]


@quick
@given(widths, st.integers(1, 40), st.integers(1, 50), st.booleans())
def test_shapes_and_types_are_the_stored_ones(bits: int, d: int, group_size: int, gptq: bool) -> None:
    stored = quantise(normal(3, d), bits, group_size, covariance_of(d) if gptq else None)
    group = min(group_size, d)
    assert (stored.columns, stored.group_size, stored.bits) == (d, group, bits)
    assert stored.planes.shape == (3, bits, -(-d // 8))
    assert stored.scale.shape == (3, -(-d // group))
    assert stored.scale.dtype == torch.float16
    assert stored.dequantise().shape == (3, d)


@quick
@given(widths, st.integers(0, 1000))
def test_nearest_rounding_takes_the_nearest_level(bits: int, seed: int) -> None:
    w = normal(4, 20, seed=seed)
    stored = quantise(w, bits, 8)
    scale = expand_scale(stored.scale.float(), 8, 20)
    levels = (torch.arange(2**bits) - (2**bits - 1) / 2) * scale[..., None]
    least = (levels - w[..., None]).abs().amin(-1)
    torch.testing.assert_close((stored.dequantise() - w).abs(), least, rtol=0, atol=1e-5)


@quick
@given(widths, st.integers(0, 1000), st.integers(3, 30))
def test_the_best_scale_is_no_worse_than_the_largest_weight_as_the_outer_level(
    bits: int, seed: int, group_size: int
) -> None:
    w = normal(6, 20, seed=seed) * torch.logspace(-1, 1, 20)
    group = min(group_size, 20)
    top = (2**bits - 1) / 2
    for first in range(0, 20, group):
        part = w[:, first : first + group]
        widest = part.abs().amax(1, keepdim=True) / top

        def error(scale: Tensor, part: Tensor = part) -> Tensor:
            level = (part / scale + top).round().clamp(0, 2**bits - 1) - top
            return (level * scale - part).square().sum(1)

        best = best_scale(w, bits, group_size)[:, first // group, None].float()
        rounding = 5e-4 * part.norm(dim=1)  # of the scale to fp16
        assert (error(best).sqrt() <= error(widest).sqrt() + rounding).all()


def test_scales_do_not_depend_on_how_many_rows_are_rounded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(10, 20)
    scale = best_scale(w, 2, 8)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)
    assert torch.equal(best_scale(w, 2, 8), scale)


@pytest.mark.parametrize("bits", [1, 2])
def test_the_best_scale_is_well_below_the_largest_weight_for_few_bits(bits: int) -> None:
    w = normal(50, 256)
    outer = best_scale(w, bits, 256)[:, 0].float() * (2**bits - 1) / 2
    ideal = {1: 0.798, 2: 1.494}[bits]  # outer levels of the least squared error for a normal distribution
    assert float(outer.mean()) == pytest.approx(ideal, rel=0.05)


def test_a_short_last_group_is_rounded_by_itself() -> None:
    w = normal(5, 20)
    whole, last = quantise(w, 2, 8), quantise(w[:, 16:].contiguous(), 2, 8)
    assert torch.equal(whole.dequantise()[:, 16:], last.dequantise())


@quick
@given(widths, st.integers(0, 100))
def test_gptq_on_uncorrelated_inputs_of_one_size_rounds_to_nearest(bits: int, seed: int) -> None:
    w = normal(8, 30, seed=seed)
    stored = quantise(w, bits, 16, 0.7 * torch.eye(30))
    scale = expand_scale(stored.scale.float(), 16, 30)
    nearest = (w / scale + stored.middle).round().clamp(0, 2**bits - 1)
    assert torch.equal(unpack(stored.planes, 30), nearest.to(torch.uint8))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", [16, 1000])
def test_gptq_keeps_the_output_better_than_nearest(bits: int, group_size: int) -> None:
    gptq = nearest = 0.0
    for seed in range(4):
        w, covariance = normal(32, 150, seed=seed), covariance_of(150, seed)  # more columns than a block of GPTQ
        gptq += output_error(w, quantise(w, bits, group_size, covariance), covariance)
        nearest += output_error(w, quantise(w, bits, group_size), covariance)
    assert gptq < 0.8 * nearest


def test_gptq_equals_the_optimal_correction_of_the_columns_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROUNDS", 0)  # of what goes on behind it
    w, covariance = normal(16, 140), covariance_of(140)
    stored = quantise(w, 2, 1000, covariance)
    order = covariance.diagonal().argsort(descending=True)  # the largest inputs first
    found, w, covariance = stored.dequantise()[:, order], w[:, order], covariance[order][:, order]
    # damped twice: by a fifth of the mean, and within the sweep by a hundredth of what the mean is then
    damped = covariance.double() + torch.eye(140) * (0.2 + 0.012) * covariance.diagonal().mean()
    scale, chosen = stored.scale.double(), torch.zeros(16, 140, dtype=torch.float64)
    for j in range(140):
        target = w.double()[:, j:]
        if j:  # where the error so far is least felt: minimise it over the columns left, in closed form
            felt = (w.double() - chosen)[:, :j] @ damped[:j, j:]
            target = target + torch.linalg.solve(damped[j:, j:], felt.T).T
        chosen[:, j] = ((target[:, 0:1] / scale + 1.5).round().clamp(0, 3) - 1.5)[:, 0] * scale[:, 0]
    same = (found - chosen.float()).abs() < 1e-3
    assert float(same.float().mean()) > 0.99


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitting_scales_and_codes_to_each_other_keeps_the_output_better(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, covariance = normal(32, 150), covariance_of(150)
    errors = []
    for rounds in (0, 2):
        monkeypatch.setattr(module, "_ROUNDS", rounds)
        errors.append(output_error(w, quantise(w, bits, 64, covariance), covariance))
    assert errors[1] < 0.95 * errors[0]


def test_scales_that_fit_levels_are_found() -> None:
    level = torch.randint(0, 4, (6, 40), generator=torch.Generator().manual_seed(1)) - 1.5
    scale = (normal(6, 3).abs() + 1).half()
    w = level * expand_scale(scale.float(), 16, 40)
    fitted = module.refit_scale(w, level, (scale * 1.2).half(), 16, covariance_of(40))
    torch.testing.assert_close(fitted, scale, rtol=0.01, atol=0)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    covariance = covariance_of(20)
    covariance[3], covariance[:, 3] = 0, 0
    w = normal(8, 20)
    assert torch.isfinite(quantise(w, 2, 8, covariance).dequantise()).all()
    assert torch.isfinite(quantise(w, 2, 8, torch.zeros(20, 20)).dequantise()).all()


@pytest.mark.parametrize("gptq", [False, True])
def test_more_bits_give_less_error(gptq: bool) -> None:
    w, covariance = normal(40, 48), covariance_of(48)
    errors = [output_error(w, quantise(w, b, 16, covariance if gptq else None), covariance) for b in PREDICTOR_BITS]
    for coarse, fine in pairwise(errors):
        assert fine < 0.6 * coarse


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_eight_bits_are_accurate_for_weights_of_any_usual_size(size: float) -> None:
    w = size * normal(20, 100)
    assert float((quantise(w, 8, 64).dequantise() - w).norm() / w.norm()) < 0.02


def test_a_row_of_zeros_stays_next_to_zero() -> None:
    w = normal(3, 20)
    w[1] = 0
    rounded = quantise(w, 2, 8, covariance_of(20)).dequantise()
    assert rounded[1].abs().max() < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    w = normal(3, 20)
    w[1, 7] = value
    with pytest.raises(InvalidInputError, match="NaN or infinite"):
        quantise(w, 2, 8)


def test_weights_too_large_for_the_scales_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="too large"):
        quantise(1e7 * normal(3, 20), 2, 8)


def test_rounding_leaves_the_weights_alone() -> None:
    w = normal(3, 20)
    before = w.clone()
    quantise(w, 2, 8, covariance_of(20))
    assert torch.equal(w, before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_grid_with_a_zero_leaves_weights_beside_a_large_one_near_zero(bits: int) -> None:
    w = 0.02 * normal(8, 64)
    w[:, 5] = torch.tensor([2.0, -2.0]).repeat(4)
    with_zero, without = (quantise(w, bits, 64, has_zero=zero) for zero in (True, False))
    small = torch.arange(64) != 5
    assert (with_zero.dequantise() - w)[:, small].square().mean() < 1.01 * w[:, small].square().mean()
    assert (with_zero.dequantise() - w)[:, 5].abs().max() < 0.02, "the largest weight is a level of its own"
    if bits < 8:
        assert (without.dequantise() - w).square().mean() > 3 * (with_zero.dequantise() - w).square().mean()
    assert with_zero.has_zero and with_zero.nbytes == without.nbytes


def test_a_grid_with_a_zero_has_the_levels_that_it_states() -> None:
    stored = quantise(normal(6, 40), 4, 16, has_zero=True)
    codes = unpack(stored.planes, 40).float()
    torch.testing.assert_close(stored.dequantise(), (codes - 8) * expand_scale(stored.scale.float(), 16, 40))
    assert stored.middle == 8 and quantise(normal(6, 40), 4, 16).middle == 7.5


def test_scales_suit_the_weights_of_large_inputs() -> None:
    w, importance = normal(32, 64), torch.ones(64)
    importance[7] = 1e5
    plain, suited = (best_scale(w, 3, 64, importance=each).float() for each in (None, importance))
    errors = [(((w / s + 3.5).round().clamp(0, 7) - 3.5) * s - w)[:, 7].abs().mean() for s in (plain, suited)]
    assert errors[1] < 0.2 * errors[0]
