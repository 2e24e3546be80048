"""TEAL and CATS: thresholds, what they skip, and the bytes that this saves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rivals import RIVALS, WINDOWS, ffn_bytes, inputs_of, logits, rival_model
from synthetic import normal
from torch import Tensor

from tardis_llm.baselines import apply_baseline, count_skips
from tardis_llm.baselines.cats import neurons_to_skip
from tardis_llm.baselines.skipping import Magnitudes, Skip
from tardis_llm.baselines.teal import greedy_sparsities
from tardis_llm.errors import InfeasibleBudgetError, InvalidInputError
from tardis_llm.families.linear import weight_of
from tardis_llm.families.sites import find_ffns

every_rival = pytest.mark.parametrize("name", RIVALS)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97])
def test_thresholds_are_quantiles_of_magnitudes(share: float):
    x = normal(700, 60)
    magnitudes = Magnitudes()
    magnitudes.add(x[:300])
    magnitudes.add(x[300:])
    threshold = magnitudes.threshold(share)
    assert threshold == pytest.approx(float(x.abs().quantile(share)) if share else 0.0, rel=0.01)
    assert float((Skip(threshold, {})(x) == 0).double().mean()) == pytest.approx(share, abs=0.005)


def test_zeros_are_skipped_for_nothing():
    x = normal(500, 20).relu()
    magnitudes = Magnitudes()
    magnitudes.add(x)
    skipped = Skip(magnitudes.threshold(0.3), {})(x)  # half of them are zero already
    assert torch.equal(skipped, x)
    assert magnitudes.threshold(1.0) > float(x.max())


def test_the_greedy_search_raises_what_costs_least():
    sizes = [100, 100, 200]

    def error(sparsities: list[float]) -> float:
        return 1.0 * sparsities[0] + 5.0 * sparsities[1] + 4.0 * sparsities[2]  # per weight: 1, 5, 2

    assert greedy_sparsities(error, sizes, 0.25, 0.05) == pytest.approx([1.0, 0.0, 0.0])
    assert greedy_sparsities(error, sizes, 0.5, 0.05) == pytest.approx([1.0, 0.0, 0.5])
    found = greedy_sparsities(error, sizes, 0.77, 0.05)
    assert sum(s * size for s, size in zip(found, sizes, strict=True)) == pytest.approx(0.77 * 400)


@every_rival
def test_teal_zeroes_the_inputs_below_the_thresholds_and_nothing_else(name: str):
    model, dense = rival_model(name), rival_model(name)
    report = apply_baseline("teal", model, WINDOWS, 0.4)
    layers = [layer for site in find_ffns(model) for layer in site.linears.values()]
    state = dense.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for layer, x in zip(layers, inputs_of(model, layers, WINDOWS.heldout), strict=True):
        kept = x[x != 0].abs()
        assert float(kept.min()) >= layer.skip.threshold
    assert not torch.allclose(logits(model), logits(dense))
    assert report.reduction == pytest.approx(0.4, abs=0.04)  # held-out text is not the text of the thresholds


@every_rival
def test_bytes_of_teal_are_the_columns_that_are_left_and_all_biases(name: str):
    model = rival_model(name)
    report = apply_baseline("teal", model, WINDOWS, 0.5)
    layers = {key: layer for site in find_ffns(model) for key, layer in site.linears.items()}
    assert [row.name for row in report.layers] == list(layers)
    inputs = inputs_of(model, list(layers.values()), WINDOWS.heldout)
    for row, layer, x in zip(report.layers, layers.values(), inputs, strict=True):
        weight, whole = weight_of(layer).nbytes, sum(part.nbytes for part in layer.parameters())
        assert row.dense == row.resident == whole
        assert row.touched == pytest.approx(whole - weight + weight * float((x != 0).double().mean()))
    assert report.dense == ffn_bytes(model)


def test_teal_spends_its_sparsity_where_it_costs_least():
    model = rival_model("llama")
    for site in find_ffns(model):  # inputs hardly matter to the gate
        next(iter(site.projections.values())).weight.data *= 1e-3
    apply_baseline("teal", model, WINDOWS, 0.3)
    for site in find_ffns(model):
        gate, up = site.projections.values()
        assert gate.skip.threshold > 2 * up.skip.threshold


def gate_of(model: object, name: str, ids: Tensor) -> list[Tensor]:
    """Per FFN, [tokens, h] act(g), or act(z) without a gate, on the inputs that it gets."""
    found = []
    for site in find_ffns(model):  # type: ignore[arg-type]
        layer = next(iter(site.projections.values()))
        (x,) = inputs_of(model, [layer], ids)  # type: ignore[arg-type]
        with torch.no_grad():
            z = layer(x)[:, : site.intermediate_size]
            found.append({"llama": torch.nn.functional.silu, "phi3": torch.nn.functional.silu}.get(name, act(site))(z))
    return found


def act(site: object) -> Callable[[Tensor], Tensor]:
    return lambda z: type(site.activation).forward(site.activation, z)  # type: ignore[attr-defined]


@every_rival
def test_cats_leaves_out_the_neurons_whose_gate_is_below_the_threshold(name: str):
    model = rival_model(name)
    report = apply_baseline("cats", model, WINDOWS, 0.3)
    sites = find_ffns(model)
    hidden = inputs_of(model, [site.down for site in sites], WINDOWS.heldout)
    rates = []
    for site, gate, h in zip(sites, gate_of(model, name, WINDOWS.heldout), hidden, strict=True):
        left = gate.abs() >= site.activation.skip.threshold
        assert torch.equal(h != 0, left)
        rates.append(1 - float(left.double().mean()))
    # 30 % of the bytes are a share of the neurons: all but the gate is skipped with them, or down alone
    share = 0.3 * 3 / 2 if name in ("llama", "phi3") else 0.3 * 2
    assert sum(rates) / len(rates) == pytest.approx(share, abs=0.04)
    assert report.touched == pytest.approx(
        ffn_bytes(model) - sum(saved(s, r) for s, r in zip(sites, rates, strict=True))
    )
    assert report.resident == report.dense == ffn_bytes(model)


def saved(site: object, rate: float) -> float:
    """Bytes that a token does not read: of down, and of a gated FFN's up as many."""
    down = weight_of(site.down).nbytes  # type: ignore[attr-defined]
    return rate * down * (2 if site.gated else 1)  # type: ignore[attr-defined]


def test_cats_cannot_save_what_it_reads_to_choose():
    assert neurons_to_skip(0.5, 2, 3) == pytest.approx(0.75)
    with pytest.raises(InfeasibleBudgetError, match=r"not feasible: 50\.0% of the weights .* less than 0\.500"):
        apply_baseline("cats", rival_model("gpt2"), WINDOWS, 0.5)
    with pytest.raises(InfeasibleBudgetError, match=r"33\.3% of the weights .* less than 0\.667"):
        apply_baseline("cats", rival_model("llama"), WINDOWS, 0.7)


@pytest.mark.parametrize("method", ["teal", "cats"])
def test_bytes_can_be_counted_on_any_text(method: str):
    model = rival_model("phi3")
    report = apply_baseline(method, model, WINDOWS, 0.4)
    with count_skips(model) as counts:
        model(WINDOWS.heldout)
    assert counts.measured(report).touched == pytest.approx(report.touched)
    with count_skips(model) as counts:
        model(WINDOWS.fit)
    other = counts.measured(report)
    assert other.touched != report.touched
    assert other.reduction == pytest.approx(0.4, abs=0.01)
    with count_skips(rival_model("phi3")) as counts:
        pass
    assert counts.measured(report) == report


@pytest.mark.parametrize("method", ["teal", "cats"])
def test_low_precision_models_skip_in_their_dtype(method: str):
    model = rival_model("llama", torch.bfloat16)
    report = apply_baseline(method, model, WINDOWS, 0.4)
    assert report.reduction == pytest.approx(0.4, abs=0.05)
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["teal", "cats", "flap", "skip", "rtn4+affine"])
def test_methods_for_ffns_refuse_all_linear_layers(method: str):
    reduction = None if method.startswith("rtn") else 0.4
    with pytest.raises(InvalidInputError, match="give 'ffn'"):
        apply_baseline(method, rival_model("gpt2"), WINDOWS, reduction, "all")
