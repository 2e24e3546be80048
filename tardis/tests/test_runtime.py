"""The folded FFN at run time: exact where everything is fixed, affine where nothing is, and a good guest in a model."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from models import FAMILY_NAMES, tiny_model, tokens
from synthetic import (
    correlated,
    everything_fixed,
    fallback,
    folded_with,
    forward,
    half_fixed,
    nothing_fixed,
    random_ffn,
    residuals,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from tardis_llm.errors import InvalidInputError
from tardis_llm.families.sites import FFNSite, find_ffns
from tardis_llm.ffn.activations import ACTIVATIONS, activation
from tardis_llm.ffn.weights import DenseFFN
from tardis_llm.pipeline.session import sound_weights
from tardis_llm.runtime.decoding import prepare_decoding
from tardis_llm.runtime.modules import FoldedFFN
from tardis_llm.runtime.placing import folded_ffns, install, uninstall
from tardis_llm.runtime.reference import fixed_neurons, folded_ffn

D, H = 24, 96
FFN = random_ffn(D, H)
X = correlated(40, D, 3)
#: names of the tensors of a folded FFN
OWN = {"fold.weight", "fold.bias", "predictor.planes", "predictor.scale", "low", "high", "slope", "offset"}

every_family = pytest.mark.parametrize("name", FAMILY_NAMES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Same dtype, and apart by no more than a few roundings of numbers about one."""
    atol = 1e-5 if found.dtype == torch.float32 else 16 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def run(x: Tensor, folded, ffn: DenseFFN = FFN, dtype: torch.dtype = torch.float32) -> Tensor:  # type: ignore[no-untyped-def]
    """The folded FFN on x, weights and inputs in `dtype`."""
    return folded_ffn(x.to(dtype), folded.beside(fallback(ffn, dtype)))


def fold_sites(model: PreTrainedModel, make=half_fixed) -> list[FFNSite]:  # type: ignore[no-untyped-def]
    """Fold every FFN of a model as `make` does; returns the sites as they were."""
    sites = find_ffns(model)
    for site in sites:
        ffn = sound_weights(site).in_fp32()
        install(model, site, FoldedFFN(make(ffn, model.dtype)))
    return sites


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of the random tokens."""
    return model(tokens()).logits


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@every_dtype
def test_with_everything_fixed_the_output_is_dense(name: str, dtype: torch.dtype) -> None:
    ffn = random_ffn(D, H, name)
    folded = everything_fixed(ffn, dtype)
    assert fixed_neurons(X, folded.beside(ffn)).all()
    y = run(X, folded, ffn, dtype)
    assert y.dtype == dtype
    assert_near(y, forward(ffn, X).to(dtype))


@every_dtype
def test_with_nothing_fixed_the_output_is_the_affine_map(dtype: torch.dtype) -> None:
    folded = nothing_fixed(FFN, dtype)
    assert not fixed_neurons(X, folded.beside(FFN)).any()
    x = X.to(dtype)
    assert torch.equal(run(X, folded, dtype=dtype), nn.functional.linear(x, folded.fold, folded.bias))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_the_output_is_fold_plus_residuals_of_the_neurons_out_of_range(name: str) -> None:
    ffn = random_ffn(D, H, name)
    folded = half_fixed(ffn)
    zhat = X @ folded.predictor.dequantise().T + ffn.b1
    fixed = (zhat < folded.neurons.low) | (zhat > folded.neurons.high)
    assert 0.3 < float(fixed.float().mean()) < 0.9
    assert torch.equal(fixed_neurons(X, folded.beside(ffn)), fixed)
    r = residuals(activation(name), X @ ffn.w1.T + ffn.b1, folded.neurons.slope, folded.neurons.offset) * fixed
    expected = X.double() @ folded.fold.double().T + folded.bias + r @ ffn.w2.double().T
    assert_near(run(X, folded, ffn), expected.float())


@every_dtype
def test_a_batch_gives_what_its_tokens_give_one_by_one(dtype: torch.dtype) -> None:
    # ranges with which every token fixes a few neurons of its own, and some fix none
    folded = folded_with(FFN, torch.full((H,), -torch.inf), torch.full((H,), 2.6), dtype)
    fixed = fixed_neurons(X, folded.beside(FFN))
    assert fixed.any(0).sum() > 2 * fixed.sum(1).max()
    assert (~fixed.any(1)).any()
    one_by_one = torch.cat([run(row[None], folded, dtype=dtype) for row in X])
    assert_near(run(X, folded, dtype=dtype), one_by_one)


def test_the_bounds_themselves_are_in_range() -> None:
    folded = nothing_fixed(FFN)
    zhat = nn.functional.linear(X[:1], folded.predictor.dequantise(), FFN.b1)[0]
    exactly = folded_with(FFN, zhat, zhat)
    assert not fixed_neurons(X[:1], exactly.beside(FFN)).any()
    above = folded_with(FFN, torch.nextafter(zhat, zhat + 1), zhat + 1)
    assert fixed_neurons(X[:1], above.beside(FFN)).all()


@pytest.mark.parametrize("shape", [(D,), (5, D), (1, D), (0, D), (2, 3, D), (2, 1, 2, D)])
@every_dtype
def test_inputs_of_any_leading_shape_keep_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    module = FoldedFFN(half_fixed(FFN, dtype))
    count = math.prod(shape[:-1])
    x = X[:count].reshape(shape).to(dtype)
    y = module(x, fallback(FFN, dtype))
    assert y.shape == shape
    assert y.dtype == dtype
    assert_near(y.reshape(-1, D), run(X[:count], module.weights, dtype=dtype))


@pytest.mark.parametrize("make", [nothing_fixed, half_fixed, everything_fixed])
def test_nan_comes_out_where_it_came_in_and_nowhere_else(make) -> None:  # type: ignore[no-untyped-def]
    folded = make(FFN)
    x = X.clone()
    x[1, 5] = torch.nan
    assert fixed_neurons(x, folded.beside(FFN))[1].all()
    y = run(x, folded)
    assert y[1].isnan().all()
    others = torch.arange(len(X)) != 1
    assert_near(y[others], run(X, folded)[others])


@pytest.mark.parametrize("make", [nothing_fixed, half_fixed, everything_fixed])
def test_missing_biases_count_as_zero(make) -> None:  # type: ignore[no-untyped-def]
    zero = DenseFFN(FFN.w1, torch.zeros(H), FFN.w2, torch.zeros(D), "gelu")
    folded = make(zero)
    without = folded_ffn(X, folded.beside(DenseFFN(FFN.w1, None, FFN.w2, None, "gelu")))
    assert_near(without, run(X, folded, zero))


def test_the_module_gives_back_the_tensors_it_was_made_of() -> None:
    folded = half_fixed(FFN)
    module = FoldedFFN(folded)
    back = module.weights
    for mine, given in zip(
        (back.fold, back.bias, *back.neurons.tensors), (folded.fold, folded.bias, *folded.neurons.tensors), strict=True
    ):
        assert torch.equal(mine, given)
    assert torch.equal(back.predictor.dequantise(), folded.predictor.dequantise())
    assert set(module.state_dict()) == OWN
    assert not any(parameter.requires_grad for parameter in module.parameters())


@every_family
def test_uninstalling_restores_the_dense_model_exactly(name: str) -> None:
    model = tiny_model(name)
    modules, state, dense = dict(model.named_modules()), model.state_dict(), logits(model)
    sites = fold_sites(model)
    assert not torch.allclose(logits(model), dense, atol=1e-3)
    for site in sites:
        uninstall(model, site)
    assert torch.equal(logits(model), dense)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(state)


@every_family
def test_uninstalling_restores_a_model_that_was_prepared_and_nothing_is_kept_twice(name: str) -> None:
    model = tiny_model(name)
    dense, sites = logits(model), fold_sites(model)
    prepare_decoding(model)
    for site in sites:
        for place, layer in site.linears.items():
            assert layer.weight is model.get_submodule(place)._parameters["weight"]
        uninstall(model, site)
        assert all(layer.weight.requires_grad for layer in site.linears.values())
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-4)


def test_a_folded_model_holds_no_dense_layers() -> None:
    model = tiny_model("gpt2")
    layers = [weakref.ref(layer) for site in fold_sites(model) for layer in site.linears.values()]
    gc.collect()
    assert [layer() for layer in layers] == [None] * len(layers)
    before = logits(model)
    prepare_decoding(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@every_family
def test_a_model_with_everything_fixed_gives_the_dense_logits(name: str) -> None:
    model = tiny_model(name)
    dense = logits(model)
    fold_sites(model, everything_fixed)
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-4)


@every_family
def test_a_folded_ffn_gets_the_input_of_the_dense_one_and_its_output_is_used(name: str) -> None:
    model = tiny_model(name)
    site = find_ffns(model)[1]
    seen: list[Tensor] = []
    hook = site.up.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    logits(model)
    hook.remove()
    ffn = sound_weights(site).in_fp32()
    folded = FoldedFFN(half_fixed(ffn))
    install(model, site, folded)
    folded.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    before = logits(model)
    assert torch.equal(seen[0], seen[1])
    folded.weights.bias[0] += 1  # one alone: the same for all is lost in a norm
    assert not torch.allclose(logits(model), before, atol=1e-3)


@every_family
def test_a_folded_model_keeps_the_dense_names_and_adds_only_its_own(name: str) -> None:
    model = tiny_model(name)
    everything = {key: value.clone() for key, value in model.state_dict().items()}
    learned = tuple(f"{site.activation_name}." for site in find_ffns(model))  # xIELU's, which are in the fold's format
    dense = {key: value for key, value in everything.items() if not key.startswith(learned)}
    sites = fold_sites(model)
    state = model.state_dict()
    assert not [key for key in state if key.startswith(learned)]
    for key, value in dense.items():
        assert torch.equal(state[key], value)
    added = set(state) - set(dense)
    assert added == {f"{site.prefix}.tardis.{key}" for site in sites for key in OWN}
    assert list(folded_ffns(model)) == [site.prefix for site in sites]


@every_family
def test_running_a_folded_model_changes_none_of_its_tensors(name: str) -> None:
    model = tiny_model(name)
    fold_sites(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = logits(model)
    assert torch.equal(logits(model), first)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "falcon", "opt", "bert"])
def test_the_dense_weights_are_shared_not_copied(name: str) -> None:
    model = tiny_model(name)
    pointers = {key: value.data_ptr() for key, value in model.named_parameters()}
    sites = fold_sites(model)
    assert {key: dict(model.named_parameters())[key].data_ptr() for key in pointers} == pointers
    with torch.no_grad():
        sites[0].weights().w2.zero_()
    assert not model.state_dict()[f"{sites[0].down_name}.weight"].any()


@pytest.mark.parametrize("name", ["gpt2", "falcon", "opt"])
def test_a_copy_of_a_folded_model_is_independent(name: str) -> None:
    model = tiny_model(name)
    sites = fold_sites(model)
    expected = logits(model)
    for part in (f"{sites[1].up_name}.weight", f"{sites[1].down_name}.weight", f"{sites[1].prefix}.tardis.fold.weight"):
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), expected)
        twin.state_dict()[part].zero_()
        assert not torch.allclose(logits(twin), expected, atol=1e-3)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "falcon", "opt"])
def test_models_in_half_precision_fold_in_their_dtype(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype)
    dense = logits(model)
    fold_sites(model, everything_fixed)
    folded = logits(model)
    assert folded.dtype == dtype
    error = (folded - dense).float().norm() / dense.float().norm()
    assert float(error) < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_single_layers_fold() -> None:
    model = tiny_model("gpt2")
    site = find_ffns(model)[1]
    ffn = sound_weights(site).in_fp32()
    install(model, site, FoldedFFN(half_fixed(ffn)))
    assert list(folded_ffns(model)) == ["transformer.h.1.mlp"]


def test_generation_with_a_cache_equals_the_forward_of_the_whole() -> None:
    model = tiny_model("gpt2")
    fold_sites(model)
    ids = tokens()
    made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        expected = model(made).logits.argmax(-1)
    assert torch.equal(made[:, ids.shape[1] :], expected[:, ids.shape[1] - 1 : -1])


def test_folding_twice_is_refused() -> None:
    model = tiny_model("gpt2")
    fold_sites(model)
    with pytest.raises(InvalidInputError, match="not a linear layer"):
        find_ffns(model)
