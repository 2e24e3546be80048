"""The kernels check what they are handed: no type, size or place of a tensor is taken on trust."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from synthetic import edited, packed, stored_fold
from torch import Tensor

from tardis_llm.errors import TardisError
from tardis_llm.ffn.packed import PackedMatrix
from tardis_llm.ffn.weights import Storage
from tardis_llm.pipeline.linears import low_bit_copy
from tardis_llm.runtime.cpu.backend import CpuFFN
from tardis_llm.runtime.cpu.library import open_library
from tardis_llm.runtime.cpu.panels import Panels
from tardis_llm.runtime.cpu.structures import Matrix, Vector
from tardis_llm.runtime.linears.lowbit import BITS

needs_library = pytest.mark.skipif(open_library() is None, reason="the CPU kernels are not built")
D, H = 64, 96
_SHORT: dict[str, Any] = {"shape": lambda t: t[:-1].contiguous(), "dtype": lambda t: t.to(torch.float64)}


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers at an odd address."""
    memory = torch.zeros(tensor.nbytes + 1, dtype=torch.uint8)
    moved = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, offset=1, count=tensor.numel()).view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize("part", ["planes", "scale"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t[:-1].contiguous(),
        lambda t: t[..., None],
        lambda t: t.to(torch.float32),
        lambda t: t.view(torch.int8 if t.dtype == torch.uint8 else torch.bfloat16),
        lambda t: t.transpose(0, -1),
        lambda t: torch.cat([t, t], -1),
    ],
)
def test_a_low_bit_matrix_of_other_planes_or_scales_is_refused(part: str, edit: Any):
    matrix = packed(H, D, 2, 16)
    assert Matrix.of(matrix).rows == H
    with pytest.raises(TardisError):
        Matrix.of(replace(matrix, **{part: edit(getattr(matrix, part))}))


@pytest.mark.parametrize("change", [{"columns": 640}, {"columns": 0}, {"group_size": 0}, {"group_size": 1}])
def test_a_low_bit_matrix_of_other_sizes_is_refused(change: dict[str, int]):
    with pytest.raises(TardisError):
        Matrix.of(replace(packed(H, D, 2, 16), **change))


@pytest.mark.parametrize("change", [{"rows": 2 * H}, {"columns": 2 * D}, {"bits": 4}, {"group_size": 1}])
@pytest.mark.parametrize("bits", [2, 16])
def test_panels_of_other_sizes_are_refused(bits: int, change: dict[str, int]):
    matrix: Tensor | PackedMatrix = packed(H, D, 2, 64) if bits == 2 else torch.zeros(H, D, dtype=torch.bfloat16)
    panels = Panels.of(matrix)
    assert Matrix.of(panels).rows == H
    if bits == 2 or not {"bits", "group_size"} & change.keys():
        with pytest.raises(TardisError):
            Matrix.of(replace(panels, **change))


def test_dense_matrices_and_vectors_are_floating_aligned_and_contiguous():
    matrix, vector = torch.zeros(4, 6), torch.zeros(4)
    for wrong in (matrix.double(), matrix.int(), matrix.T, matrix[0], misaligned(matrix), matrix.to("meta")):
        with pytest.raises(TardisError):
            Matrix.of(wrong)
    for other in (vector.double(), matrix, vector.expand(3, 4)[:, 0], misaligned(vector)):
        with pytest.raises(TardisError):
            Vector.of(other, 4)


@needs_library
@pytest.mark.parametrize("storage", [Storage(16), Storage(16, 8, 4), Storage(16, 4)])
@pytest.mark.parametrize("part", ["bias", "low", "high", "slope", "offset"])
@pytest.mark.parametrize("kind", _SHORT)
def test_a_fold_whose_vectors_do_not_fit_is_refused_when_it_is_prepared(storage: Storage, part: str, kind: str):
    folded, dense = stored_fold(D, H, storage, torch.float32)
    whole = folded if part == "bias" else folded.neurons
    changed: Any = {part: _SHORT[kind](getattr(whole, part))}
    wrong = replace(folded, **changed) if part == "bias" else edited(folded, **changed)
    CpuFFN(folded.beside(dense))
    with pytest.raises(TardisError):
        CpuFFN(wrong.beside(dense))


@needs_library
def test_operators_refuse_what_does_not_fit():
    x, weight = torch.zeros(2, D), torch.zeros(H, D)
    planes, scale = packed(H, D, 2, 16).planes, packed(H, D, 2, 16).scale
    calls = [
        lambda: torch.ops.tardis.linear(x, weight.double(), None),
        lambda: torch.ops.tardis.linear(x, weight[0], None),
        lambda: torch.ops.tardis.linear(x, planes.view(torch.int8), None, scale, 16),
        lambda: torch.ops.tardis.linear(x, planes, None, scale.float(), 16),
        lambda: torch.ops.tardis.linear(x, planes, None, scale, 4),
        lambda: torch.ops.tardis.linear(x, planes[:, 0], None, scale, 16),
        lambda: torch.ops.tardis.linear(torch.zeros(2, 640), planes, None, scale, 16),
        lambda: torch.ops.tardis.linear(x.bfloat16(), weight.bfloat16()[0], None, transposed=True),
    ]
    for call in calls:
        with pytest.raises(TardisError):
            call()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("part", ["planes", "scale"])
def test_a_low_bit_linear_layer_of_other_shapes_is_refused(bits: int, part: str):
    layer = low_bit_copy(torch.nn.Linear(128, 64), bits, 64)
    setattr(layer, part, torch.nn.Parameter(getattr(layer, part)[:-1].clone(), requires_grad=False))
    with pytest.raises(TardisError):
        layer.prepared(torch.zeros(1, 128))
