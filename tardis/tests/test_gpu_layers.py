"""What `benchmarks/gpu.py` measures folds against has the shape of what they replace."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gpu_layers import Linear, Shape, dense_linear, ffn_step, torch_int4_linear


@pytest.mark.parametrize("linear", [dense_linear, torch_int4_linear])
@pytest.mark.parametrize("k", [1, 2])
def test_rivals_take_inputs_whose_columns_fill_no_group(linear: Linear, k: int) -> None:
    shape = Shape(d=136, h=264, k=k, activation="silu", layers=1, vocabulary=1, kv=1)
    with FakeTensorMode():
        x = torch.empty(3, 136, dtype=torch.bfloat16, device="cuda")
        y = ffn_step(shape, linear)(x)
    assert y.is_cuda and (y.shape, y.dtype) == (x.shape, x.dtype)
