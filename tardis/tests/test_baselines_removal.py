"""FLAP, layer skipping and affine maps: what is removed, what makes up for it, and the bytes."""

from __future__ import annotations

import pytest
import torch
from models import HIDDEN, LAYERS
from rivals import RIVALS, WINDOWS, ffn_bytes, inputs_of, logits, outputs_of, rival_model

from tardis_llm.baselines import apply_baseline
from tardis_llm.baselines.ffns import matrices_of
from tardis_llm.baselines.flap import flap_scores
from tardis_llm.families.linear import bias_of, weight_of
from tardis_llm.families.sites import find_ffns

every_rival = pytest.mark.parametrize("name", RIVALS)


def test_scores_are_variance_times_norm_standardised():
    variance, down = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([[1.0, 0.0, 1.0], [2.0, 3.0, 0.0]])
    raw = torch.tensor([5.0, 18.0, 4.0]).double()
    torch.testing.assert_close(flap_scores(variance, down), (raw - 9) / raw.std())


@every_rival
def test_flap_removes_the_neurons_of_least_score_of_the_dense_model(name: str):
    model, dense = rival_model(name), rival_model(name)
    report = apply_baseline("flap", model, WINDOWS, 0.4)
    sites = find_ffns(dense)
    hidden = inputs_of(dense, [site.down for site in sites], WINDOWS.fit)
    scores = [
        flap_scores(h.double().var(0, correction=0), weight_of(s.down)) for s, h in zip(sites, hidden, strict=True)
    ]
    gone = torch.stack([(weight_of(site.down) == 0).all(0) for site in find_ffns(model)])
    count = int(0.4 * gone.numel() + 1e-9)
    assert int(gone.sum()) == count
    threshold = torch.stack(scores).flatten().kthvalue(count).values
    assert torch.equal(gone, torch.stack(scores) <= threshold)
    assert 0.38 < report.sparsity < 0.41
    assert report.touched == report.resident < 0.62 * report.dense


@every_rival
def test_flap_keeps_the_mean_output_of_the_first_ffn(name: str):
    model, dense = rival_model(name), rival_model(name)
    apply_baseline("flap", model, WINDOWS, 0.4)
    ours, theirs = (outputs_of(each, find_ffns(each)[0], WINDOWS.fit) for each in (model, dense))
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, theirs, atol=1e-2)


@every_rival
def test_bytes_of_flap_are_those_of_smaller_matrices(name: str):
    model = rival_model(name)
    report = apply_baseline("flap", model, WINDOWS, 0.4)
    rows = iter(report.layers)
    for site in find_ffns(model):
        h = int((weight_of(site.down) != 0).any(0).sum())
        *ups, _ = matrices_of(site)
        for up in ups:
            neurons = len(up.weight) // site.intermediate_size * h
            assert next(rows).touched == 4 * neurons * (HIDDEN + (bias_of(up.module) is not None))
        assert next(rows).touched == 4 * (h * HIDDEN + HIDDEN)  # with a bias, even where there was none
    assert report.dense == ffn_bytes(rival_model(name))


@every_rival
def test_layers_are_skipped_by_what_the_loss_misses(name: str):
    model, dense = rival_model(name), rival_model(name)
    report = apply_baseline("skip", model, WINDOWS, 0.4)  # one of three
    ids = WINDOWS.heldout
    losses = []
    for site in find_ffns(dense):
        hook = site.down.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
        with torch.no_grad():
            losses.append(float(dense(ids, labels=ids).loss))
        hook.remove()
    least = losses.index(min(losses))
    gone = [row.name for row in report.layers if not row.touched]
    assert gone == [find_ffns(dense)[least].prefix]
    hook = find_ffns(dense)[least].down.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    torch.testing.assert_close(logits(model), logits(dense))
    hook.remove()
    assert report.touched == report.resident == ffn_bytes(dense) // LAYERS * (LAYERS - 1)
    assert report.dense == ffn_bytes(dense)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_affine_maps_take_the_place_of_gated_ffns(name: str):
    model, dense = rival_model(name), rival_model(name)
    report = apply_baseline("affine", model, WINDOWS)
    assert [row.name for row in report.layers] == [site.prefix for site in find_ffns(dense)]
    assert [row.touched for row in report.layers] == [4 * (HIDDEN**2 + HIDDEN)] * LAYERS
    assert report.dense == ffn_bytes(dense)
    first, *_ = sites = find_ffns(dense)
    linear = model.get_submodule(first.prefix)
    (x,) = inputs_of(model, [linear], WINDOWS.fit)
    with torch.no_grad():  # the mean output is kept exactly, whatever the damping
        torch.testing.assert_close(linear(x).mean(0), first.parent(x).mean(0), rtol=1e-4, atol=1e-5)
    assert all(isinstance(model.get_submodule(site.prefix), torch.nn.Linear) for site in sites)


@every_rival
@pytest.mark.parametrize("method", ["wanda@0.5", "gptq3", "owl-sparsegpt@0.5", "rtn3"])
def test_methods_for_matrices_take_all_matrices_of_an_ffn(name: str, method: str):
    model, dense = rival_model(name), rival_model(name)
    kind, _, reduction = method.partition("@")
    report = apply_baseline(kind, model, WINDOWS, float(reduction) if reduction else None)
    assert {row.name for row in report.layers} == {key for site in find_ffns(dense) for key in site.linears}
    assert report.dense == ffn_bytes(dense)
    state = dense.state_dict()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == {f"{row.name}.weight" for row in report.layers}
