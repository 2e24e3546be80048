"""Matrices as code rows hold the same numbers, and folded FFNs that fix by them compute the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from synthetic import correlated, generator, normal, stored_fold
from torch import Tensor

from tardis_llm.errors import TardisError
from tardis_llm.ffn.packed import PackedMatrix, pack
from tardis_llm.ffn.weights import FoldedWeights, Storage
from tardis_llm.runtime.backend import lay_out
from tardis_llm.runtime.cpu.backend import CpuFFN
from tardis_llm.runtime.cpu.code_rows import CodeRows
from tardis_llm.runtime.cpu.library import can_be_code_rows, open_library
from tardis_llm.runtime.cpu.structures import Batch, Matrix, Vector
from tardis_llm.runtime.modules import FoldedFFN

BUILT = open_library()
needs_kernels = pytest.mark.skipif(BUILT is None, reason="the kernels are not built")
#: instruction sets whose kernels lay matrices out so
OWN = ("avx2", "avxvnni", "avx512bw")


def random_codes(rows: int, columns: int, bits: int, group_size: int, has_zero: bool = True) -> PackedMatrix:
    """A matrix of random codes and scales."""
    codes = torch.randint(2**bits, (rows, columns), generator=generator(columns))
    scale = normal(rows, -(-columns // group_size), seed=bits).half()
    return PackedMatrix(pack(codes, bits), scale, columns, group_size, has_zero)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 192, 1088])
def test_a_matrix_comes_back_as_it_was(columns: int, bits: int) -> None:
    for has_zero in (True, False):
        matrix = random_codes(37, columns, bits, 64, has_zero)
        rows = CodeRows.of(matrix)
        assert rows.nbytes == matrix.nbytes
        back = rows.matrix()
        assert torch.equal(back.planes, matrix.planes) and torch.equal(back.scale, matrix.scale)
        assert (back.columns, back.group_size, back.has_zero) == (columns, 64, has_zero)


@pytest.mark.parametrize(
    ("bits", "word", "shift"), [(4, 16 + 8 * 1 + 4 * 1 + 2, 4 * 3), (8, 48 + 8 * 1 + 4 * 1 + 2, 8)]
)
def test_what_a_word_has_where(bits: int, word: int, shift: int) -> None:
    codes = torch.zeros(2, 128, dtype=torch.uint8)
    # 4 bits: line 1, half 1, code 3, lane 6; 8 bits: line 3, half 1, code 1, lane 6
    codes[1, 64 + 32 + 8 * 3 + 6 if bits == 4 else 96 + 16 + 8 + 6] = 9
    data = CodeRows.of(PackedMatrix(pack(codes, bits), torch.ones(2, 2).half(), 128, 64)).data
    assert data.count_nonzero() == 1 and (int(data[1, word]) & 0xFFFF) == 9 << shift


def in_code_rows(weights: FoldedWeights) -> FoldedWeights:
    """The weights with W2 as code rows."""
    assert isinstance(weights.down, PackedMatrix)
    return replace(weights, down=CodeRows.of(weights.down))


@needs_kernels
@pytest.mark.parametrize(
    "storage", [Storage(64, 4, 4), Storage(64, 4, 8), Storage(128, 8, 4), Storage(512, 4, 4)], ids=str
)
@pytest.mark.parametrize(("d", "h", "k"), [(64, 70, 1), (192, 333, 2), (576, 131, 1)])
def test_fixing_by_them_is_fixing_by_planes(isa: str, storage: Storage, d: int, h: int, k: int) -> None:
    folded, dense = stored_fold(d, h, storage, torch.float32, k=k)
    weights = folded.beside(dense)
    planes, rows = CpuFFN(weights), CpuFFN(in_code_rows(weights))
    for count in (1, 7):
        x = correlated(count, d, count)
        assert rows.fixed(x).any()
        y, expected = rows(x), planes(x)
        assert float((y - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
        assert isa not in OWN or torch.equal(y, expected)  # the same integers in another order
        x[0, 3] = torch.nan
        assert rows(x)[0].isnan().all() and torch.equal(rows(x)[1:], y[1:])


@needs_kernels
def test_which_matrices_are_laid_out_so(isa: str) -> None:
    for matrix, fits in (
        (random_codes(8, 128, 4, 64), True),
        (random_codes(8, 128, 8, 128), True),
        (random_codes(8, 192, 4, 1000), True),
        (random_codes(8, 128, 3, 64), False),
        (random_codes(8, 128, 4, 32), False),
        (random_codes(8, 72, 4, 64), False),
    ):
        assert can_be_code_rows(matrix) == (fits and isa in OWN)
        laid_out = lay_out(matrix, torch.bfloat16, by_rows=True)
        assert isinstance(laid_out, CodeRows) if fits and isa in OWN else laid_out is None
    assert lay_out(random_codes(8, 128, 4, 64, has_zero=False), torch.bfloat16, by_rows=True) is None


@needs_kernels
def test_what_would_be_misread_is_refused() -> None:
    assert BUILT is not None
    rows, x = CodeRows.of(random_codes(8, 128, 4, 64)), normal(2, 128, seed=1)
    for wrong in (
        replace(rows, data=rows.data[:, :18].contiguous()),
        replace(rows, data=rows.data.int()),
        replace(rows, bits=2),
        replace(rows, scale=rows.scale[:, :1].contiguous()),
    ):
        with pytest.raises(TardisError):
            Matrix.of(wrong)
    with pytest.raises(TardisError, match="do not fit together"):  # they are added up, and never multiplied
        BUILT.linear(Matrix.of(rows), Vector.of(None, 8), Batch.of(x, x.new_empty(2, 8), 8))


@needs_kernels
def test_a_module_has_them_in_memory_and_planes_in_files(isa: str) -> None:
    folded, dense = stored_fold(128, 64, Storage(64, 4, 4), torch.float32)
    ffn, x = FoldedFFN(folded), correlated(3, 128)
    before: dict[str, Tensor] = {key: value.clone() for key, value in ffn.state_dict().items()}
    ffn.lay_out(torch.float32)
    assert isinstance(ffn.current.down, CodeRows) == (isa in OWN)
    laid_out = ffn(x, dense)
    after = ffn.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert isinstance(ffn.current.down, PackedMatrix)
    assert float((ffn(x, dense) - laid_out).abs().max()) <= 1e-5 * float(laid_out.abs().max())
