"""Whole models compressed by the baselines: calibration, layouts, bytes, names and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from marks import mostly_long
from models import HIDDEN, INTERMEDIATE, LAYERS, LAYOUTS, record, tiny_model, tokens
from synthetic import correlated, normal
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tardis_llm.baselines import NAMES, BaselineReport, apply_baseline, full_name, needs_reduction
from tardis_llm.baselines.affine import FFNMoments, best_affine
from tardis_llm.baselines.gptq import quantise_gptq
from tardis_llm.baselines.inputs import InputStatistics, Need
from tardis_llm.baselines.layerwise import outlier_shares
from tardis_llm.baselines.matrices import find_matrices
from tardis_llm.baselines.owl import block_sparsities, outlier_share
from tardis_llm.baselines.pruning import prune_magnitude, prune_ria, prune_sparsegpt, prune_wanda, wanda_scores
from tardis_llm.baselines.rtn import round_to_nearest
from tardis_llm.calibration.text import Windows, split_windows
from tardis_llm.errors import InvalidInputError, UnsupportedModelError
from tardis_llm.families.sites import find_ffns, layer_list, set_module

every_layout = pytest.mark.parametrize("name", list(LAYOUTS))
WINDOWS = split_windows(tokens(12, 24), 24, 0.25)


def norms_of(x: Tensor) -> Tensor:
    """[in] norms of the columns of X [tokens, in]."""
    return x.square().sum(0, dtype=torch.float64).sqrt().float()


def hessian_of(x: Tensor) -> Tensor:
    """[in, in] of X [tokens, in], the product in fp32: rounding that cascades leaves no room for another."""
    return 2 / len(x) * (x.T @ x).double()


#: name -> (reduction to ask for, the same from w and its inputs X [tokens, in] fp32)
REFERENCES: dict[str, tuple[float | None, Callable[[Tensor, Tensor], Tensor]]] = {
    "magnitude": (0.6, lambda w, x: prune_magnitude(w, 0.6)),
    "wanda": (0.6, lambda w, x: prune_wanda(w, norms_of(x), 0.6)),
    "ria": (0.6, lambda w, x: prune_ria(w, norms_of(x), 0.6)),
    "sparsegpt": (0.6, lambda w, x: prune_sparsegpt(w, hessian_of(x), 0.6)),
    "rtn3-g64": (None, lambda w, x: round_to_nearest(w, 3, 64)),
    "gptq3-g64": (None, lambda w, x: quantise_gptq(w, hessian_of(x), 3, 64)),
}


def linear_layers(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if isinstance(module, nn.Linear | Conv1D)]


def matrix(module: nn.Module) -> Tensor:
    """[out, in] view of a layer's weight."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def by_hand(model: PreTrainedModel, compress: Callable[[Tensor, Tensor], Tensor], scope: str) -> None:
    """Compress block by block on the inputs that a forward of the whole model gives."""
    for site, block in zip(find_ffns(model), layer_list(model), strict=True):
        targets = linear_layers(block) if scope == "all" else list(site.linears.values())
        inputs, _ = record(model, targets, input_ids=WINDOWS.fit)
        for module, x in zip(targets, inputs, strict=True):
            matrix(module).copy_(compress(matrix(module).float(), x.flatten(0, -2).float()))


def output(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, 16)).logits


def reduction_for(name: str) -> float | None:
    if not needs_reduction(name):
        return None
    return 0.4 if name == "cats" else 0.6  # which reads half of a plain FFN to choose its neurons


def compressed(method: str, family: str = "gpt2", **more: object) -> tuple[PreTrainedModel, BaselineReport]:
    model = tiny_model(family)
    return model, apply_baseline(method, model, WINDOWS, reduction_for(method), **more)  # type: ignore[arg-type]


# Conv1D; attention beside the FFN; the FFN is the block itself; with a gate, apart and merged
@pytest.mark.parametrize(
    ("family", "scope"),
    mostly_long(
        [("gpt2", "ffn"), ("gpt2", "all"), ("gpt_neox", "all"), ("opt", "ffn"), ("gemma2", "all"), ("phi3", "ffn")],
        [("gpt2", "all"), ("opt", "ffn"), ("gemma2", "all")],
    ),
)
@pytest.mark.parametrize("method", REFERENCES)
def test_a_model_is_compressed_as_it_would_be_by_hand(family: str, method: str, scope: str):
    reduction, reference = REFERENCES[method]
    model, expected = tiny_model(family), tiny_model(family)
    apply_baseline(method, model, WINDOWS, reduction, scope)  # type: ignore[arg-type]
    with torch.no_grad():
        by_hand(expected, reference, scope)
    state = expected.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-6, msg=key)


@every_layout
def test_every_layout_is_compressed_in_its_ffns_alone(name: str):
    model, dense = tiny_model(name), tiny_model(name)
    report = apply_baseline("wanda", model, WINDOWS, 0.5)
    touched = {part for site in find_ffns(model) for part in site.linears}
    assert {row.name for row in report.layers} == touched
    state = dense.state_dict()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == {f"{part}.weight" for part in touched}
    assert bool(torch.isfinite(output(model)).all())
    assert not torch.allclose(output(model), output(dense))


@every_layout
def test_scope_all_takes_every_linear_layer_of_the_blocks(name: str):
    model = tiny_model(name)
    report = apply_baseline("sparsegpt", model, WINDOWS, 0.5, "all")
    assert len(report.layers) == sum(len(linear_layers(block)) for block in layer_list(model))
    assert len(report.layers) > 2 * LAYERS
    for block in layer_list(model):
        assert all(float((matrix(m) == 0).float().mean()) == pytest.approx(0.5) for m in linear_layers(block))
    assert bool(torch.isfinite(output(model)).all())


def test_statistics_are_those_of_the_inputs_at_once():
    x = 3 * torch.randn(1200, 20, generator=torch.Generator().manual_seed(4))  # three chunks
    statistics = InputStatistics.zeros(20, Need.GRAM)
    statistics.add(x[:700].bfloat16())
    statistics.add(x[700:].bfloat16())
    x = x.bfloat16().double()
    torch.testing.assert_close(statistics.norms, x.norm(dim=0).float())
    torch.testing.assert_close(statistics.hessian, 2 / 1200 * x.T @ x, rtol=1e-5, atol=1e-5)
    assert InputStatistics.zeros(20, Need.NORMS).moments is None


@pytest.mark.parametrize("name", NAMES)
def test_every_baseline_runs_and_changes_the_model(name: str):
    model, report = compressed(name)
    assert report.method == name
    assert bool(torch.isfinite(output(model)).all())
    assert not torch.allclose(output(model), output(tiny_model("gpt2")))
    assert report.touched < report.dense
    assert report.resident == (report.dense if name in ("teal", "cats") else report.touched)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "sparsegpt", "owl-wanda", "owl-sparsegpt"])
def test_masks_have_the_sparsity_that_was_asked_for(name: str):
    model, report = compressed(name)
    zeros = sum(int((matrix(part) == 0).sum()) for site in find_ffns(model) for part in (site.up, site.down))
    weights = LAYERS * 2 * HIDDEN * INTERMEDIATE
    assert report.sparsity == pytest.approx(zeros / weights)
    assert report.sparsity == pytest.approx(0.6, abs=0.01)  # rows and blocks take the floor
    assert report.asked == 0.6


def test_bytes_of_masks_are_those_counted_by_hand():
    _, report = compressed("magnitude")
    removed = 9830  # floor of 0.6 * 64 * 256 = 9830.4
    kept, bitmap = 4 * (HIDDEN * INTERMEDIATE - removed), HIDDEN * INTERMEDIATE // 8
    up, down = report.layers[:2]
    assert (up.dense, up.touched) == (4 * (16384 + 256), kept + bitmap + 4 * 256)
    assert (down.dense, down.touched) == (4 * (16384 + 64), kept + bitmap + 4 * 64)
    assert (up.nonzero, up.weights) == (16384 - removed, 16384)
    assert report.dense == LAYERS * (up.dense + down.dense)
    assert report.touched == LAYERS * (up.touched + down.touched)
    assert report.reduction == pytest.approx(1 - report.touched / report.dense)


@pytest.mark.parametrize("kind", ["rtn", "gptq"])
def test_bytes_of_rounded_matrices_are_those_counted_by_hand(kind: str):
    _, report = compressed(f"{kind}3-g128")
    up, down = report.layers[:2]
    # up has 256 rows of one group of 64, down 64 rows of two groups of 128; a group has 16 + 3 bits, biases are fp32
    assert up.touched == (256 * (64 * 3 + 1 * 19)) // 8 + 4 * 256
    assert down.touched == (64 * (256 * 3 + 2 * 19)) // 8 + 4 * 64


def test_bytes_follow_the_dtype_and_missing_biases():
    model = tiny_model("falcon", dtype=torch.bfloat16)
    report = apply_baseline("magnitude", model, WINDOWS, 0.5)
    assert {row.touched for row in report.layers} == {2 * 8192 + 2048}
    assert {row.dense for row in report.layers} == {2 * 16384}


def test_bytes_of_affine_maps_are_those_counted_by_hand():
    _, report = compressed("affine")
    assert [row.touched for row in report.layers] == [4 * (64 * 64 + 64)] * LAYERS
    assert [row.dense for row in report.layers] == [4 * (2 * 64 * 256 + 256 + 64)] * LAYERS
    assert [row.name for row in report.layers] == [f"transformer.h.{i}.mlp" for i in range(LAYERS)]


@pytest.mark.parametrize(("name", "biases"), [("llama", 0), ("llama_biased", 2 * 172 + 64), ("phi3", 0)])
def test_bytes_of_gated_ffns_are_those_of_three_matrices(name: str, biases: int):
    for method in ("magnitude", "affine", "rtn4"):
        _, report = compressed(method, name)
        assert report.dense == LAYERS * 4 * (3 * 64 * 172 + biases), method


@pytest.mark.parametrize("name", ["llama_biased", "phi3", "gemma2"])
def test_affine_maps_of_gated_ffns_are_fitted_behind_the_maps_before_them(name: str):
    model, dense = tiny_model(name), tiny_model(name)
    apply_baseline("affine", model, WINDOWS)
    site = find_ffns(dense)[-1]
    linear = model.get_submodule(site.prefix)
    (x,), (y,) = record(model, [linear], input_ids=WINDOWS.fit)
    with torch.no_grad():  # the mean output on what the maps before give is kept exactly, whatever the damping
        expected = site.parent(x).flatten(0, -2).mean(0)
    torch.testing.assert_close(y.flatten(0, -2).mean(0), expected, rtol=1e-4, atol=1e-5)


def test_reports_say_how_many_tokens_were_used():
    _, report = compressed("wanda")
    assert report.touched == sum(row.touched for row in report.layers)
    assert (report.tokens, compressed("rtn4")[1].tokens) == (WINDOWS.fit.numel(), 0)


def test_low_precision_models_stay_in_their_dtype():
    for name in ("sparsegpt", "gptq4-g64", "affine"):
        model = tiny_model("gpt2", dtype=torch.bfloat16)
        apply_baseline(name, model, WINDOWS, reduction_for(name))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}, name
        assert bool(torch.isfinite(output(model)).all()), name


def test_sparsegpt_on_the_model_harms_less_than_magnitude():
    dense = output(tiny_model("gpt2"))
    errors = [float((output(compressed(name)[0]) - dense).square().mean()) for name in ("sparsegpt", "magnitude")]
    assert errors[0] < errors[1]


def test_owl_takes_the_outliers_of_the_dense_model():
    model = tiny_model("gpt2")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = []
    for site in find_ffns(model):
        inputs, _ = record(model, [site.up, site.down], input_ids=WINDOWS.fit)
        norms = [x.flatten(0, -2).norm(dim=0) for x in inputs]
        w = site.weights()
        expected.append(outlier_share([wanda_scores(w.w1, norms[0]), wanda_scores(w.w2, norms[1])]))
    shares = outlier_shares(model, WINDOWS)
    assert shares == pytest.approx(expected, abs=1e-4)
    assert len(set(shares)) > 1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    apply_baseline("owl-wanda", model, WINDOWS, 0.6)
    for site, sparsity in zip(find_ffns(model), block_sparsities(shares, 0.6), strict=True):
        assert (site.weights().w1 == 0).sum(1).tolist() == [int(HIDDEN * sparsity)] * INTERMEDIATE


def test_methods_that_need_no_inputs_run_no_forward():
    model = tiny_model("gpt2")
    model.forward = None  # type: ignore[assignment,method-assign]
    assert apply_baseline("magnitude", model, WINDOWS, 0.5).tokens == 0
    assert apply_baseline("rtn4", model, WINDOWS).tokens == 0


def test_progress_is_told_of_every_block():
    for name, stages in {"owl-wanda": 2, "rtn4": 1, "affine": 1}.items():
        told: list[tuple[str, int, int]] = []
        compressed(name, progress=lambda *step, told=told: told.append(step))
        assert [step[1:] for step in told] == [(done, LAYERS) for done in range(LAYERS + 1)] * stages


def test_the_best_affine_map_of_linear_outputs_is_that_of_least_squares():
    x, C, c = correlated(800, 12), normal(12, 12, seed=1), normal(12, seed=2)
    fit, heldout = FFNMoments.zeros(12, 12), FFNMoments.zeros(12, 12)
    fit.add(x[:600], x[:600] @ C.T + c)
    heldout.add(x[600:], x[600:] @ C.T + c)
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(800, 1)], 1), x @ C.T + c).solution
    weight, bias = best_affine(fit, heldout, torch.float32)
    torch.testing.assert_close(weight, solved[:-1].T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias, solved[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "falcon", "opt"])
def test_affine_gives_back_a_model_whose_ffns_are_linear(family: str):
    model = tiny_model(family)
    for site in find_ffns(model):
        set_module(model, site.activation_name, nn.Identity())
    windows = split_windows(torch.randint(2, 256, (60, 24), generator=torch.Generator().manual_seed(3)), 24, 0.2)
    sites, before = find_ffns(model), output(model)
    apply_baseline("affine", model, windows)
    torch.testing.assert_close(output(model), before, rtol=1e-3, atol=1e-3)
    for site in sites:  # the best map on the inputs behind the maps before, by least squares
        linear = model.get_submodule(site.down_name)
        x = record(model, [linear], input_ids=windows.fit)[0][0].flatten(0, -2)
        with torch.no_grad():
            y = site.down(site.up(x))
            ones = torch.ones(len(x), 1)
            solved = torch.linalg.lstsq(torch.cat([x, ones], 1).double(), y.double()).solution
            expected = torch.cat([x, ones], 1).double() @ solved
            torch.testing.assert_close(linear(x).double(), expected, rtol=1e-3, atol=2e-3)


@every_layout
def test_every_layout_takes_affine_maps(name: str):
    model, dense = tiny_model(name), tiny_model(name)
    apply_baseline("affine", model, WINDOWS)
    for site in find_ffns(dense):
        *others, last = (model.get_submodule(name) for name in site.replaced)
        assert all(isinstance(other, nn.Identity) for other in others)
        assert last.weight.shape == (HIDDEN, HIDDEN)
    error = (output(model) - output(dense)).square().mean() / output(dense).var()
    assert 0 < float(error) < (1.1 if find_ffns(dense)[0].gated else 0.5)  # random neurons with a gate have no line


def test_affine_maps_are_fitted_behind_the_maps_before_them():
    model, dense = tiny_model("gpt2"), tiny_model("gpt2")
    apply_baseline("affine", model, WINDOWS)
    site, linear = find_ffns(dense)[-1], model.get_submodule("transformer.h.1.mlp.c_proj")
    # the mean output on what the maps before give is kept exactly, whatever the damping
    inputs, _ = record(model, [linear], input_ids=WINDOWS.fit)
    x = inputs[0].flatten(0, -2)
    with torch.no_grad():
        y = site.down(site.activation(site.up(x)))
        torch.testing.assert_close(linear(x).mean(0), y.mean(0), rtol=1e-4, atol=1e-5)


def test_short_names_are_completed():
    assert [full_name(name) for name in ("rtn4", "gptq2", "gptq8-g64", "wanda")] == [
        *("rtn4-g128", "gptq2-g128", "gptq8-g64", "wanda")
    ]
    assert len(NAMES) == len(set(NAMES)) == 10 + 2 * 4 * 2 + 1
    assert [name for name in NAMES if needs_reduction(name)] == list(NAMES[:10])


@pytest.mark.parametrize("name", ["", "rtn5", "gptq4-g32", "owl-ria", "Wanda", "rtn4-g128x"])
def test_unknown_names_are_refused_with_the_known_ones(name: str):
    with pytest.raises(InvalidInputError, match=r"magnitude, wanda, .*gptq8-g64, affine"):
        apply_baseline(name, tiny_model("gpt2"), WINDOWS)


@pytest.mark.parametrize("reduction", [None, 0.0, 1.0, -0.5, 70.0, float("nan")])
def test_reductions_that_are_no_share_are_refused(reduction: float | None):
    with pytest.raises(InvalidInputError, match=r"between 0 and 1, such as 0\.7"):
        apply_baseline("wanda", tiny_model("gpt2"), WINDOWS, reduction)


@pytest.mark.parametrize("name", ["rtn4", "gptq3-g64", "affine"])
def test_fixed_sizes_take_no_reduction(name: str):
    with pytest.raises(InvalidInputError, match="leave it out"):
        apply_baseline(name, tiny_model("gpt2"), WINDOWS, 0.5)


def test_scopes_that_do_not_exist_or_do_not_suit_are_refused():
    with pytest.raises(InvalidInputError, match="ffn, all"):
        apply_baseline("rtn4", tiny_model("gpt2"), WINDOWS, scope="attention")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="give 'ffn'"):
        apply_baseline("affine", tiny_model("gpt2"), WINDOWS, scope="all")


@pytest.mark.parametrize("name", ["magnitude", "wanda", "rtn4", "affine"])
def test_weights_that_are_not_finite_are_refused_by_name_before_anything_changes(name: str):
    model = tiny_model("gpt2")
    model.transformer.h[1].mlp.c_proj.weight.data[0, 0] = torch.nan
    first = model.transformer.h[0].mlp.c_fc.weight.clone()
    with pytest.raises(InvalidInputError, match=r"transformer\.h\.1\.mlp\.c_proj has NaN"):
        apply_baseline(name, model, WINDOWS, reduction_for(name))
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, first)


@pytest.mark.parametrize("name", ["wanda", "gptq4", "affine"])
def test_inputs_that_are_not_finite_are_refused_by_name(name: str):
    model = tiny_model("gpt2")
    model.transformer.h[1].ln_2.bias.data[0] = torch.inf
    with pytest.raises(InvalidInputError, match=r"inputs of transformer\.h\.1\.mlp\.c_fc are NaN or infinite"):
        apply_baseline(name, model, WINDOWS, reduction_for(name))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_weight_that_overflows_once_compressed_is_refused_by_name():
    model = tiny_model("gpt2", dtype=torch.float16)
    matrix_of_interest = find_matrices(model, "ffn")[0][0]
    with pytest.raises(InvalidInputError, match="float16"):
        matrix_of_interest.write(torch.full((INTERMEDIATE, HIDDEN), 1e6))


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(InvalidInputError, match="eval"):
        apply_baseline("wanda", tiny_model("gpt2").train(), WINDOWS, 0.5)


def test_a_linear_layer_that_never_runs_is_named():
    model = tiny_model("gpt2")
    model.transformer.h[0].spare = nn.Linear(4, 4)
    apply_baseline("wanda", model, WINDOWS, 0.5)
    with pytest.raises(InvalidInputError, match=r"transformer\.h\.0\.spare got no input"):
        apply_baseline("wanda", model, WINDOWS, 0.5, "all")


def test_families_without_support_are_refused():
    model = tiny_model("gpt2")
    model.config.model_type = "mixtral"
    with pytest.raises(UnsupportedModelError):
        apply_baseline("rtn4", model, WINDOWS)


def test_hidden_states_on_disk_give_the_same_model(monkeypatch: pytest.MonkeyPatch):
    in_memory, _ = compressed("sparsegpt")
    monkeypatch.setattr("tardis_llm.baselines.inputs._MEMORY_LIMIT", 100)
    on_disk, _ = compressed("sparsegpt")
    assert torch.equal(output(in_memory), output(on_disk))


def test_the_heldout_windows_do_not_matter_to_methods_without_damping():
    first = tiny_model("gpt2")
    apply_baseline("gptq4", first, Windows(WINDOWS.fit, WINDOWS.heldout))
    second = tiny_model("gpt2")
    apply_baseline("gptq4", second, Windows(WINDOWS.fit, WINDOWS.heldout[:1]))
    assert torch.equal(output(first), output(second))
