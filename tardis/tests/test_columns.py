"""Rounding column by column: the kernels do what the loop in torch does, but for the rounding of sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tardis_llm.errors import TardisError
from tardis_llm.ffn.packed import midpoint
from tardis_llm.folding.columns import BLOCK, by_torch, round_columns
from tardis_llm.runtime.cpu.library import loaded
from tardis_llm.runtime.cpu.structures import Rounding

#: [columns, rows]: one, odd ones, a block, rows of more than one task
SHAPES = [(1, 1), (3, 7), (17, 33), (BLOCK, 64), (BLOCK, 201)]


def operands(columns: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Target, base and scale [columns, rows], and a factor [columns, columns]: each column has the next ones suffer."""
    generator = torch.Generator().manual_seed(columns)
    target, base = torch.randn(2, columns, rows, generator=generator)
    scale = torch.rand(columns, rows, generator=generator) + 0.1
    scale[:, ::3] *= -1  # as those of groups whose largest weight is on the side that has a level more
    return target, base, scale, torch.randn(columns, columns, generator=generator) / columns


@pytest.mark.parametrize(("bits", "has_zero"), [(1, False), (2, False), (4, True), (8, True)])
@pytest.mark.parametrize("from_base", [True, False])
@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_kernels_round_as_specified(
    columns: int, rows: int, from_base: bool, bits: int, has_zero: bool, isa: str
) -> None:
    target, base, scale, factor = operands(columns, rows)
    rest = base if from_base else None, scale, factor, 2**bits - 1, midpoint(bits, has_zero)
    before = target.clone()
    found, wanted = round_columns(target, *rest), by_torch(target, *rest)
    assert torch.equal(target, before)
    codes = [(each.levels / scale + rest[-1]).round() for each in (found, wanted)]
    assert codes[0].min() >= 0 and codes[0].max() <= rest[-2]
    # a sum that is rounded once more may fall on the other side of a bound, and then all behind it differ
    same = (codes[0] == codes[1]).all(0)
    assert same.float().mean() > 0.98
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one[:, same], other[:, same], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("from_base", [True, False])
def test_each_column_makes_up_for_those_before_it(from_base: bool, isa: str) -> None:
    target, base = torch.tensor([[0.3], [0.0], [2.6]]), torch.tensor([[1.0], [1.0], [1.0]])
    factor = torch.tensor([[9.0, -1.0, 0.0], [9.0, 9.0, -0.5], [9.0, 9.0, 9.0]])
    found = round_columns(target, base if from_base else None, torch.ones(3, 1), factor, 3, 0)
    # 0.3 -> 0; the second target is 0 - 0.3, or 0 - 1; the third 2.6 + 0.5 times the second change
    changes = [-1.0, -1.0, 1.0] if from_base else [-0.3, 0.3, 0.25]
    assert found.levels.flatten().tolist() == ([0, 0, 2] if from_base else [0, 0, 3])
    assert found.change.flatten().tolist() == pytest.approx(changes)


def test_transposed_operands_are_read_as_they_are() -> None:
    operand = [part.T.contiguous().T for part in operands(20, 40)]
    found, wanted = round_columns(*operand, 15, 7.5), by_torch(*operand, 15, 7.5)
    assert torch.equal(found.levels, wanted.levels)


def test_without_kernels_the_loop_in_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tardis_llm.runtime.backend._kernels_wanted", lambda: False)
    monkeypatch.setattr("tardis_llm.runtime.backend.open_library", lambda: pytest.fail("kernels are not wanted"))
    found, wanted = round_columns(*operands(9, 5), 3, 1.5), by_torch(*operands(9, 5), 3, 1.5)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_more_columns_than_a_block_are_refused(isa: str) -> None:
    target, base, scale, factor = operands(BLOCK + 1, 4)
    with pytest.raises(TardisError, match="round_columns got arguments that do not fit together"):
        loaded().round_columns(Rounding.of(target, base, scale, factor, target.clone(), 3, 1.5))
    with pytest.raises(TardisError, match="scale is"):
        Rounding.of(target, base, scale[1:], factor, target, 3, 1.5)
