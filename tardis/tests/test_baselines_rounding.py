"""The column sweep and what rides on it: SparseGPT and GPTQ; and plain rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import correlated, generator, normal, quick
from torch import Tensor

from tardis_llm.baselines import gptq, rtn
from tardis_llm.baselines.gptq import quantise_gptq
from tardis_llm.baselines.pruning import prune_magnitude, prune_sparsegpt, prune_wanda, removed
from tardis_llm.baselines.rtn import Grid, fit_grid, round_to_nearest
from tardis_llm.errors import InvalidInputError
from tardis_llm.folding.sweep import by_columns, inverse_factor, sweep

widths = st.sampled_from((2, 3, 4, 8))
seeds = st.integers(0, 1000)


def hessian_of(d: int, seed: int = 0, tokens: int | None = None) -> Tensor:
    """H [d, d] fp64 of correlated inputs, fewer than d of them if so asked."""
    x = correlated(tokens or 4 * d, d, seed).double()
    return 2 / len(x) * x.T @ x


def error(w: Tensor, new: Tensor, hessian: Tensor) -> Tensor:
    """[out] squared error of the outputs, fp64."""
    change = (new - w).double()
    return ((change @ hessian) * change).sum(1)


def naive_sweep(w: Tensor, factor: Tensor, put: Tensor) -> Tensor:
    """The sweep as its formula stands, with the columns that `put` has zeros for set to zero: no blocks, fp64."""
    w, factor = w.double().clone(), factor.double()
    q = torch.zeros_like(w)
    for j in range(w.shape[1]):
        q[:, j] = w[:, j] * (put[:, j] != 0)
        err = (w[:, j] - q[:, j]) / factor[j, j]
        w[:, j:] -= torch.outer(err, factor[j, j:])
    return q


def test_the_factor_gives_back_the_inverse_of_the_damped_matrix():
    H = hessian_of(12)
    U = inverse_factor(H).double()
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(damped), rtol=1e-4, atol=1e-5)
    assert torch.equal(U, U.triu())


@pytest.mark.parametrize("width", [1, 5, 128])
def test_the_width_of_a_block_does_not_change_the_sweep(width: int):
    w, H = normal(6, 23), hessian_of(23)
    mask = normal(6, 23, seed=5) > 0

    def given_mask(at: list[int]):  # type: ignore[no-untyped-def]
        def rule(start: int, columns: Tensor, diagonal: Tensor):  # type: ignore[no-untyped-def]
            start = at[0]
            at[0] += len(columns)
            return lambda j, column: column * mask[:, start + j]

        return rule

    expected = naive_sweep(w, inverse_factor(H), mask)
    swept = sweep(w, H, width, by_columns(given_mask([0])))
    torch.testing.assert_close(swept.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_sweep_that_changes_nothing_gives_the_matrix_back_and_leaves_it_alone():
    w = normal(9, 4).T  # not contiguous, and its transpose is
    before = w.clone()
    unchanged = by_columns(lambda start, columns, diagonal: lambda j, column: column)
    assert torch.equal(sweep(w, hessian_of(9), 4, unchanged), before)
    prune_sparsegpt(w, hessian_of(9), 0.5)
    assert torch.equal(w, before)


def test_sparsegpt_on_an_example():
    # H = [[a, b], [b, a]] after damping, with H^-1 = [[a, -b], [-b, a]] / (a^2 - b^2), so that
    # U_11^2 = a / (a^2 - b^2), U_12 = -b / (a^2 - b^2) / U_11 and U_22^2 = H^-1_22 - U_12^2 = 1 / a
    a, b = 2.0, 1.0
    H = torch.tensor([[a / 1.01, b], [b, a / 1.01]])
    # the score of w_2 = 1 is 1 / U_22^2 = a = 2; that of w_1 = 1.1 is 1.1^2 (a^2 - b^2) / a = 1.815: it goes, and w_2
    # takes over w_1 b / a, by which the output changes least
    pruned = prune_sparsegpt(torch.tensor([[1.1, 1.0]]), H, 0.5)
    torch.testing.assert_close(pruned, torch.tensor([[0.0, 1.0 + 1.1 * b / a]]))
    # w_1 = 1.2 scores 2.16, so w_2 goes; columns to the left stay as they are
    torch.testing.assert_close(prune_sparsegpt(torch.tensor([[1.2, 1.0]]), H, 0.5), torch.tensor([[1.2, 0.0]]))


@quick
@given(st.integers(1, 8), st.integers(1, 40), st.floats(0.01, 0.99), seeds)
def test_sparsegpt_with_independent_inputs_is_magnitude_block_by_block(
    rows: int, columns: int, sparsity: float, seed: int
):
    w = normal(rows, columns, seed=seed)
    expected = torch.cat([prune_magnitude(block, sparsity) for block in w.split(16, 1)], 1)
    assert torch.equal(prune_sparsegpt(w, torch.eye(columns), sparsity, block=16), expected)


@quick
@given(st.integers(1, 8), st.integers(2, 40), st.floats(0.01, 0.99), seeds)
def test_sparsegpt_removes_exactly_the_share_of_every_block(rows: int, columns: int, sparsity: float, seed: int):
    pruned = prune_sparsegpt(normal(rows, columns, seed=seed), hessian_of(columns, seed), sparsity, block=16)
    for block in pruned.split(16, 1):
        assert int((block == 0).sum()) == removed(block.numel(), sparsity)


def test_sparsegpt_has_less_error_than_wanda_and_magnitude():
    w, H = normal(32, 64), hessian_of(64)
    ours = error(w, prune_sparsegpt(w, H, 0.6), H).sum()
    assert ours < 0.7 * error(w, prune_wanda(w, H.diagonal().sqrt().float(), 0.6), H).sum()
    assert ours < 0.7 * error(w, prune_magnitude(w, 0.6), H).sum()


def test_weights_of_dead_inputs_go():
    x = correlated(80, 12).double()
    x[:, [3, 7]] = 0
    H = 2 / 80 * x.T @ x
    for new in (
        prune_sparsegpt(normal(5, 12), H, 0.3),
        sweep(normal(5, 12), H, 4, by_columns(lambda *_: lambda j, column: column)),
    ):
        assert torch.equal(new[:, [3, 7]], torch.zeros(5, 2))
        assert bool(torch.isfinite(new).all())
    assert bool(torch.isfinite(quantise_gptq(normal(5, 12), torch.zeros(12, 12), 4, 8)).all())


def test_fewer_tokens_than_inputs_are_enough():
    w, H = normal(8, 40), hessian_of(40, tokens=10)
    assert bool(torch.isfinite(prune_sparsegpt(w, H, 0.5)).all())
    assert bool(torch.isfinite(quantise_gptq(w, H, 3, 16)).all())


def test_rounding_on_an_example():
    # range -1 to 2 in 2 bits: steps of 1, zero point 1, levels -1 0 1 2, and nothing is gained by clipping
    w = torch.tensor([[-1.0, 2.0, 0.0, 1.0]])
    grid = fit_grid(w, 2)
    assert (grid.scale.tolist(), grid.zero.tolist()) == ([1.0], [1])
    assert (grid.scale.dtype, grid.zero.dtype) == (torch.float16, torch.uint8)
    assert torch.equal(round_to_nearest(w, 2, 4), w)
    moved = torch.tensor([[-1.2, 2.9, 0.4, 0.6]])
    assert Grid(2, torch.tensor([1.0]).half(), torch.tensor([1])).nearest(moved).tolist() == [[-1, 2, 0, 1]]


def test_a_single_outlier_is_clipped():
    # steps of 3.5 / 3 would leave 127 weights an error of 0.11 each; at 0.7 it is 0.04, and 1.2 more for the outlier
    w = torch.cat([torch.linspace(-1, 1, 127), torch.tensor([2.5])])[None]
    assert float(fit_grid(w, 2).scale) < 0.7 * 3.5 / 3


@quick
@given(widths, st.integers(1, 40), seeds)
def test_the_grid_has_the_least_error_of_all_that_are_tried(bits: int, columns: int, seed: int):
    w = normal(3, columns, seed=seed)
    low, high = w.amin(1).clamp_max(0), w.amax(1).clamp_min(0)
    tried = torch.stack([rtn._squared_error(grid, w) for grid in rtn._candidates(low, high, bits)])
    assert torch.equal(rtn._squared_error(fit_grid(w, bits), w), tried.amin(0))


@quick
@given(widths, st.integers(1, 40), seeds)
def test_not_clipping_is_among_what_is_tried(bits: int, columns: int, seed: int):
    w = normal(3, columns, seed=seed)
    low, high = w.amin(1).clamp_max(0), w.amax(1).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).half()
    whole = Grid(bits, scale, (-low / scale.float()).round().clamp(0, 2**bits - 1))
    assert bool((rtn._squared_error(fit_grid(w, bits), w) <= rtn._squared_error(whole, w)).all())


@quick
@given(widths, st.integers(1, 50), st.integers(1, 20), seeds)
def test_every_weight_takes_the_nearest_level_of_its_group(bits: int, columns: int, group: int, seed: int):
    w = normal(3, columns, seed=seed) + 0.3
    rounded = round_to_nearest(w, bits, group)
    for part, new in zip(w.split(group, 1), rounded.split(group, 1), strict=True):
        grid = fit_grid(part, bits)
        levels = (torch.arange(2**bits) - grid.zero[:, None]) * grid.scale.float()[:, None]
        nearest = (levels[:, None] - part[..., None]).abs().amin(-1)
        torch.testing.assert_close((new - part).abs(), nearest, rtol=0, atol=1e-5)
        assert all(set(row.tolist()) <= set(level.tolist()) for row, level in zip(new, levels, strict=True))
        assert int(grid.zero.max()) < 2**bits


def test_eight_bits_are_close_and_every_bit_helps():
    w = normal(16, 256)
    errors = [float((round_to_nearest(w, bits, 128) - w).square().mean()) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    assert float((round_to_nearest(w, 3, 64) - w).square().mean()) < errors[1]


def test_groups_of_zeros_and_of_one_sign_are_rounded():
    assert torch.equal(round_to_nearest(torch.zeros(2, 9), 3, 4), torch.zeros(2, 9))
    ramp = torch.arange(4.0)[None]
    assert torch.equal(round_to_nearest(ramp, 2, 4), ramp)
    assert torch.equal(round_to_nearest(-ramp, 2, 4), -ramp)


def test_weights_beyond_fp16_scales_are_refused():
    with pytest.raises(InvalidInputError, match="fp16 scales"):
        round_to_nearest(torch.full((1, 4), 1e7), 2, 4)


def test_gptq_on_an_example():
    # Levels 0 1 2 3. The first two inputs have the damped H = [[1, 0.9], [0.9, 1]], so U_12 / U_11 = -0.9: rounding
    # 0.45 down to 0 adds 0.45 * 0.9 to 1.2, and 1.605 goes to 2, where plain rounding takes 1.
    w, H = torch.tensor([[0.45, 1.2, 3.0, 0.0]]), torch.eye(4) / 1.01
    H[0, 1] = H[1, 0] = 0.9
    assert round_to_nearest(w, 2, 4).tolist() == [[0, 1, 3, 0]]
    assert quantise_gptq(w, H, 2, 4).tolist() == [[0, 2, 3, 0]]


def test_rows_are_compared_by_their_error_on_the_outputs():
    H = torch.tensor([[1.0, 0.5], [0.5, 0.1]])
    # [2, 0]: 4 against [1, 1]: 1 + 2 * 0.5 + 0.1 = 2.1; [0, 2]: 0.4 against the same
    assert gptq._worse(torch.tensor([[2.0, 0], [0, 2]]), torch.ones(2, 2), H).tolist() == [True, False]


def test_the_sweep_alone_can_be_worse_than_plain_rounding_and_then_is_not_taken():
    taken = 0
    for seed in range(20):
        w, H = normal(5, 12, seed=seed), hessian_of(12, seed, tokens=30)
        order, grid, swept = H.diagonal().argsort(descending=True), fit_grid(w, 3), torch.empty_like(w)
        replace = by_columns(lambda *_, grid=grid: lambda j, column: grid.nearest(column))
        put = sweep(w[:, order], H[order][:, order], 16, replace)
        swept[:, order] = put
        plain, new = round_to_nearest(w, 3, 16), quantise_gptq(w, H, 3, 16)
        worse = error(w, swept, H) > error(w, plain, H)
        assert torch.equal(new, torch.where(worse[:, None], plain, swept))
        taken += int(worse.sum())
    assert 0 < taken < 50


@quick
@given(widths, st.integers(1, 6), st.integers(2, 40), seeds)
def test_gptq_within_a_group_heeds_no_order_of_the_inputs(bits: int, rows: int, columns: int, seed: int):
    w, H = normal(rows, columns, seed=seed), hessian_of(columns, seed, tokens=3 * columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    moved = quantise_gptq(w[:, order], H[order][:, order], bits, columns)
    torch.testing.assert_close(moved, quantise_gptq(w, H, bits, columns)[:, order])


@quick
@given(widths, st.integers(1, 6), st.integers(2, 40), seeds)
def test_gptq_with_independent_inputs_is_plain_rounding(bits: int, rows: int, columns: int, seed: int):
    w = normal(rows, columns, seed=seed)
    assert torch.equal(quantise_gptq(w, torch.eye(columns), bits, 16), round_to_nearest(w, bits, 16))


@quick
@given(widths, st.integers(1, 40), st.integers(1, 120), seeds)
def test_gptq_never_has_more_error_than_plain_rounding(bits: int, columns: int, tokens: int, seed: int):
    w, H = normal(5, columns, seed=seed), hessian_of(columns, seed, tokens)
    plain = error(w, round_to_nearest(w, bits, 16), H)
    assert bool((error(w, quantise_gptq(w, H, bits, 16), H) <= plain * (1 + 1e-5)).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_has_far_less_error_than_plain_rounding(bits: int):
    w, H = normal(32, 128), hessian_of(128)
    assert error(w, quantise_gptq(w, H, bits, 64), H).sum() < 0.5 * error(w, round_to_nearest(w, bits, 64), H).sum()


def test_gptq_puts_levels_of_one_grid_into_every_group():
    new = quantise_gptq(normal(6, 40), hessian_of(40), 2, 16)
    for part in new.split(16, 1):
        assert all(len(set(row.tolist())) <= 4 for row in part)


def test_gptq_fits_a_group_to_the_weights_as_updated_by_then():
    # the second group is zero until the first is rounded: a grid fitted before would have nothing but zero
    w = torch.cat([normal(8, 16), torch.zeros(8, 16)], 1)
    x = correlated(200, 16).double()
    x = torch.cat([x, x + 0.3 * torch.randn(200, 16, generator=generator(3)).double()], 1)
    new = quantise_gptq(w, 2 / 200 * x.T @ x, 2, 16)
    assert bool(new[:, 16:].any())
