"""Quantisers with an affine term and a refitted down matrix."""

from __future__ import annotations

import pytest
import torch
from marks import in_turns, mostly_long
from models import HIDDEN, LAYERS, tokens
from rivals import RIVALS, WINDOWS, ffn_bytes, logits, rival_model
from synthetic import correlated, normal

from tardis_llm.baselines import apply_baseline, full_name
from tardis_llm.baselines.affine import FFNMoments
from tardis_llm.baselines.inputs import Need
from tardis_llm.baselines.layerwise import MatrixMethod
from tardis_llm.baselines.repair import Repairs, quantise_repaired, refit_down
from tardis_llm.baselines.rtn import round_to_nearest
from tardis_llm.calibration.text import split_windows
from tardis_llm.errors import InvalidInputError
from tardis_llm.families.linear import bias_of, weight_of
from tardis_llm.families.sites import find_ffns

every_rival = pytest.mark.parametrize("name", RIVALS)
MORE = split_windows(tokens(80, 24), 24, 0.2)


def moments(h: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> FFNMoments:
    found = FFNMoments.zeros(h.shape[1], y.shape[1])
    found.add(h, y, weight)
    return found


@pytest.mark.parametrize("biased", [False, True])
def test_the_refit_is_that_of_ridge_regression(biased: bool):
    h, w = correlated(400, 12).double(), normal(5, 12, seed=3).double()
    y = h @ (w + 0.3 * normal(5, 12, seed=4)).T + 0.1 * normal(400, 5, seed=5)
    weight = normal(400, seed=6).square()
    at = weight.double().sqrt()[:, None]
    mean_h, mean_y = ((each * at**2).sum(0) / (at**2).sum() * biased for each in (h, y))
    found = refit_down(w, moments(h, y, weight), moments(h, y, weight), biased)
    penalty = 1e-2 * float((at * (h - mean_h)).square().sum(0).mean())  # the least damping fits known text best
    rows = torch.cat([at * (h - mean_h), penalty**0.5 * torch.eye(12, dtype=torch.float64)])
    wanted = torch.cat([at * (y - mean_y), penalty**0.5 * w.T])
    solved = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(found.double(), solved, rtol=1e-4, atol=1e-4)


def test_the_damping_is_chosen_on_heldout_tokens():
    h, w = correlated(20, 12).double(), normal(5, 12, seed=3).double()
    noise = moments(h, h @ w.T + 3 * normal(20, 5, seed=5))  # few tokens of which nothing is to be learned
    other = correlated(400, 12, seed=9).double()
    held = moments(other, other @ w.T)
    mistaken, careful = (float((refit_down(w, noise, by, False) - w).norm()) for by in (noise, held))
    assert careful < 0.5 * mistaken


def test_without_repairs_a_model_is_rounded_as_ever():
    model, plain = rival_model("phi3"), rival_model("phi3")
    method = MatrixMethod("rtn", Need.NOTHING, lambda w, x: round_to_nearest(w, 3, 64), lambda w: 1)
    quantise_repaired(model, WINDOWS, method, Repairs())
    apply_baseline("rtn3-g64", plain, WINDOWS)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", mostly_long(RIVALS, {"llama"}))
def test_weighing_changes_the_hessians_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    plain, weighed, alike = (rival_model(name) for _ in range(3))
    apply_baseline("gptq3", plain, WINDOWS)
    report = apply_baseline("gptq3+weigh", weighed, WINDOWS)
    monkeypatch.setattr("tardis_llm.calibration.stream._mean_square", lambda x: torch.ones(x.shape[:-1]))
    monkeypatch.setattr("tardis_llm.baselines.repair.first_token_importance", lambda *_: {})
    apply_baseline("gptq3+weigh", alike, WINDOWS)
    torch.testing.assert_close(logits(alike), logits(plain), rtol=1e-2, atol=1e-2)  # with all weights one
    assert not torch.equal(logits(weighed), logits(alike))
    assert report.touched == apply_baseline("gptq3", rival_model(name), WINDOWS).touched


@torch.no_grad()
def error(method: str, name: str) -> float:
    """Of the logits on text of the calibration's kind, relative to their variance."""
    model, dense = rival_model(name), rival_model(name)
    apply_baseline(method, model, MORE)
    ours, theirs = (each(MORE.heldout).logits.flatten(0, 1) for each in (model, dense))
    return float((ours - theirs).square().sum() / theirs.var(0).sum())


@pytest.mark.parametrize(("name", "kind"), in_turns(RIVALS, ["rtn", "gptq"], 4))
def test_each_repair_makes_up_for_some_of_the_error(name: str, kind: str):
    plain, affine, refit, both = (error(f"{kind}2{more}", name) for more in ("", "+affine", "+refit", "+affine+refit"))
    assert affine < plain
    assert refit < plain
    assert both < min(affine, refit)


@every_rival
def test_bytes_of_the_affine_term_are_counted(name: str):
    base = apply_baseline("rtn3", rival_model(name), WINDOWS)
    report = apply_baseline("rtn3+affine", rival_model(name), WINDOWS)
    term = (HIDDEN * (HIDDEN * 4 + 1 * 20)) // 8 + 4 * HIDDEN  # a row is one group of 64; the model is in fp32
    assert report.touched == base.touched + LAYERS * term == report.resident
    assert report.dense == base.dense == ffn_bytes(rival_model(name))
    assert [row.name for row in report.layers if row.name.endswith("affine")] == [
        f"{site.prefix}.affine" for site in find_ffns(rival_model(name))
    ]
    assert apply_baseline("rtn3+refit", rival_model(name), WINDOWS).touched == base.touched


@every_rival
def test_a_refit_leaves_down_on_its_grid_and_keeps_the_mean_where_there_is_a_bias(name: str):
    model, dense = rival_model(name), rival_model(name)
    apply_baseline("gptq2+refit", model, WINDOWS)
    first, theirs = find_ffns(model)[0], find_ffns(dense)[0]
    for row in weight_of(first.down)[:4]:
        assert all(len(group.unique()) <= 4 for group in row.split(128))
    bias = bias_of(theirs.down)
    assert (bias is None) == (bias_of(first.down) is None)
    assert bias is None or not torch.equal(bias, bias_of(first.down))


def test_an_affine_term_forgets_its_input():
    model = rival_model("gpt2")
    apply_baseline("rtn2+affine", model, WINDOWS)
    logits(model)
    assert all(site.down.affine._input is None for site in find_ffns(model))


def test_low_precision_models_are_repaired_in_their_dtype():
    model = rival_model("llama", torch.bfloat16)
    apply_baseline("gptq2+affine+refit", model, WINDOWS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert bool(torch.isfinite(logits(model)).all())


def test_names_are_composed():
    assert full_name("gptq3+refit+affine") == "gptq3-g128+affine+refit"
    assert full_name("rtn2-g64+refit") == "rtn2-g64+refit"
    assert full_name("gptq4+weigh") == "gptq4-g128+weigh"
    for wrong in ("gptq3+", "gptq3+paint", "wanda+refit", "affine+refit"):
        with pytest.raises(InvalidInputError, match=r"followed by \+affine, \+refit, \+weigh"):
            full_name(wrong)
    with pytest.raises(InvalidInputError, match="no Hessian"):
        full_name("rtn3+weigh")
