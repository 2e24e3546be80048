"""Activations are recognised by what they compute, whatever they are called."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.bloom.modeling_bloom import BloomGelu

from tardis_llm.errors import UnsupportedModelError
from tardis_llm.ffn.activations import ACTIVATIONS, identify

SPELLINGS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_supported_transformers_spelling_is_recognised(spelling: str) -> None:
    assert identify(ACT2FN[spelling]) == SPELLINGS[spelling]


@pytest.mark.parametrize("spelling", sorted(set(ACT2CLS) - set(SPELLINGS)))
def test_every_other_transformers_spelling_is_refused_with_the_supported_list(spelling: str) -> None:
    with pytest.raises(UnsupportedModelError, match="gelu_tanh, quick_gelu, silu"):
        identify(ACT2FN[spelling])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (BloomGelu(), "gelu_tanh"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.ReLU(inplace=True), "relu"),
        (torch.relu, "relu"),
    ],
)
def test_modules_outside_the_transformers_table_are_recognised(module: nn.Module, name: str) -> None:
    assert identify(module) == name


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_canonical_function_is_identified_as_itself(name: str) -> None:
    assert identify(ACTIVATIONS[name]) == name


def test_a_gelu_clipped_far_out_is_not_taken_for_gelu() -> None:
    class Clipped(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return nn.functional.gelu(z).clip(-100, 100)

    with pytest.raises(UnsupportedModelError):
        identify(Clipped())


def test_a_learned_activation_is_refused_even_when_it_equals_relu() -> None:
    with pytest.raises(UnsupportedModelError):
        identify(nn.PReLU(init=0.0))


def test_a_module_that_changes_the_shape_is_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        identify(lambda z: z[..., ::2])


def test_identification_ignores_default_dtype_and_device() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert identify(ACT2FN["gelu_new"]) == "gelu_tanh"
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions_keep_shape_and_dtype(name: str, dtype: torch.dtype) -> None:
    z = torch.randn(3, 1, 5, dtype=dtype)
    result = ACTIVATIONS[name](z)
    assert result.shape == z.shape and result.dtype == dtype
