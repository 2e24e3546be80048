"""Activations are recognised by what they compute, whatever they are called."""

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN, XIELUActivation
from transformers.models.bloom.modeling_bloom import BloomGelu

from tardis_llm.errors import UnsupportedModelError
from tardis_llm.ffn.activations import ACTIVATIONS, KINDS, activation, identify, kind, named, parameters

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


@pytest.mark.parametrize("spelling", sorted(set(ACT2CLS) - {*SPELLINGS, "xielu"}))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xielu_has_the_parameters_that_its_layer_has_learned(dtype: torch.dtype) -> None:
    module = XIELUActivation(alpha_p_init=1.3, alpha_n_init=0.9, beta=0.4, eps=-1e-3, dtype=dtype)
    name = identify(module)
    assert kind(name) == "xielu" and parameters(name) == pytest.approx((1.3, 0.9, 0.4, -1e-3), rel=1e-2)
    assert identify(copy.deepcopy(module).float()) == name  # the dtype that a model is loaded in is no part of it
    z = torch.linspace(-9, 9, 2001)
    torch.testing.assert_close(activation(name)(z), module.float()(z), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        module.alpha_p += 1
    assert identify(module) != name


def test_what_xielu_has_learned_is_not_known_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert identify(XIELUActivation()) == "xielu"


def test_a_module_with_the_parameters_of_xielu_that_computes_something_else_is_refused() -> None:
    class Other(XIELUActivation):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return super().forward(z) + z

    with pytest.raises(UnsupportedModelError):
        identify(Other())


def test_names_say_parameters_exactly() -> None:
    for values in ((0.1, 1 / 3, 0.5, -1e-6), (1e300, -2.0, 0.0, 5e-324)):
        assert parameters(named("xielu", *values)) == values
    assert named("xielu", 0.8, 0.8, 0.5, -1e-6) == "xielu(0.8,0.8,0.5,-1e-06)"
    assert [parameters(name) for name in ACTIVATIONS] == [()] * len(ACTIVATIONS)


@pytest.mark.parametrize(
    "name",
    [
        *("swiglu", "", "gelu(1.0)", "xielu", "xielu()", "xielu(0.8,0.8,0.5)", "xielu(0.8,0.8,0.5,-1e-06,1.0)"),
        *("xielu(0.8,0.8,0.5,nan)", "xielu(0.8,0.8,0.5,inf)", "xielu(0.8,0.8,0.5,1e999)", "xielu(0.8,0.8,0.5,x)"),
        *("xielu(0.80,0.8,0.5,-1e-06)", "xielu( 0.8,0.8,0.5,-1e-06)", "xielu(0.8,0.8,0.5,-1e-06", "xielu(1,1,1,1)"),
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError):
        activation(name)
    assert kind(name) in (*KINDS, "swiglu", "")


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
