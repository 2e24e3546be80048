"""Folding whole models: quality, budget, memory of interrupted runs, and refusals."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from folds import SETTINGS, folded_tiny, text
from marks import long, mostly_long
from models import FAMILY_NAMES, LAYERS, LAYOUTS, tiny_model
from transformers import PreTrainedModel

from tardis_llm import FoldConfig, fold
from tardis_llm.calibration.blocks import run_block
from tardis_llm.calibration.text import split_windows
from tardis_llm.errors import InfeasibleBudgetError, InvalidInputError, UnsupportedModelError
from tardis_llm.families.sites import find_ffns
from tardis_llm.families.table import FAMILIES
from tardis_llm.pipeline.planning import LayerPlan
from tardis_llm.pipeline.session import Session
from tardis_llm.report import silent
from tardis_llm.runtime.placing import folded_ffns


@torch.no_grad()
def output_error(model: PreTrainedModel, dense: PreTrainedModel) -> float:
    """Squared error of the logits over their variance, on tokens that calibration has not seen."""
    ids = torch.randint(2, 256, (4, 32), generator=torch.Generator().manual_seed(7))
    target, output = dense(ids).logits, model(ids).logits
    return float((output - target).square().mean() / target.var())


def folded_error(name: str = "gpt2", **settings: object) -> float:
    return output_error(folded_tiny(name, dataclasses.replace(SETTINGS, **settings))[0], tiny_model(name))


@pytest.mark.parametrize("name", mostly_long(FAMILY_NAMES, LAYOUTS))
def test_every_family_folds_to_the_reduction_and_stays_close_to_the_dense_model(name: str):
    model, report = folded_tiny(name)
    assert report.reduction == pytest.approx(0.5, abs=0.02)
    assert [layer.prefix for layer in report.layers] == list(folded_ffns(model))
    # random neurons with a gate have no line: the best affine maps in place of their FFNs leave an error of 1
    gated = FAMILIES[model.config.model_type].gated
    assert output_error(model, tiny_model(name)) < (0.95 if gated else 0.2)


def test_more_bytes_give_a_smaller_error():
    assert folded_error(reduction=0.3) < 0.8 * folded_error(reduction=0.7)


def test_noise_in_a_probe_does_not_make_a_layer_free():
    from tardis_llm.pipeline.planning import Probe, _above_noise

    probes = _above_noise([Probe(-0.01, 1.0, {}), Probe(0.02, 1.0, {}), Probe(0.05, 1.0, {})])
    assert [probe.loss_increase for probe in probes] == pytest.approx([0.002, 0.02, 0.05])


@long
def test_refit_and_error_ranges_each_beat_the_published_recipe():
    alike = {"weigh": False}  # tokens count alike in the error here
    paper = folded_error(policy="coverage", refit=False, **alike)
    assert folded_error(policy="coverage", **alike) < paper
    assert folded_error(refit=False, **alike) < paper


def test_the_budget_is_met_by_both_policies():
    by_coverage = fold(tiny_model("gpt2"), text(), dataclasses.replace(SETTINGS, policy="coverage"))
    for report in (folded_tiny("gpt2")[1], by_coverage):
        assert report.reduction == pytest.approx(0.5, abs=0.02)


def test_free_predictor_widths_are_chosen_within_the_budget():
    report = fold(tiny_model("gpt2"), text(), dataclasses.replace(SETTINGS, predictor_bits=None))
    assert all(layer.bits in (1, 2, 3, 4) for layer in report.layers)
    assert report.reduction == pytest.approx(0.5, abs=0.02)


def test_a_uniform_split_fixes_alike_in_all_layers_without_measuring_any(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tardis_llm.pipeline.planning._probe_layers", lambda *_: pytest.fail("measured"))
    settings = dataclasses.replace(SETTINGS, split="uniform", predictor_bits=None)
    report = fold(tiny_model("gpt2"), text(), settings)
    assert report.reduction == pytest.approx(0.5, abs=0.02)
    assert {(layer.bits, layer.loss_increase) for layer in report.layers} == {(2, None)}
    assert [layer.fix_rate for layer in report.layers] == pytest.approx(LAYERS * [report.fix_rate], abs=0.03)


def test_only_the_chosen_layers_are_folded():
    model = tiny_model("gpt2", blocks=3)
    report = fold(model, text(), dataclasses.replace(SETTINGS, layers=(0, 2)))
    assert [layer.prefix for layer in report.layers] == ["transformer.h.0.mlp", "transformer.h.2.mlp"]
    assert list(folded_ffns(model)) == ["transformer.h.0.mlp", "transformer.h.2.mlp"]


def test_each_layer_is_calibrated_behind_the_folded_layers_before_it(monkeypatch: pytest.MonkeyPatch):
    from tardis_llm.calibration.stream import Stream

    seen: list[int] = []
    original = Stream.advance
    monkeypatch.setattr(Stream, "advance", lambda self: (seen.append(len(folded_ffns(self.model))), original(self))[1])
    fold(tiny_model("gpt2", blocks=3), text(), SETTINGS)
    assert seen == [0, 0, 0, 0, 1, 1, 2, 2]  # two boundaries, two streams: while measuring, then while folding


def test_token_ids_may_come_flat():
    report = fold(tiny_model("gpt2"), text().flatten(), SETTINGS)
    assert report.calibration["sequence_length"] == 32
    assert report.calibration["tokens"] + report.calibration["heldout_tokens"] == text().numel()


def test_hidden_states_on_disk_give_the_same_fold(tmp_path: Path):
    (in_memory, _), on_disk = folded_tiny("gpt2"), tiny_model("gpt2")
    fold(on_disk, text(), dataclasses.replace(SETTINGS, memory_limit_gib=1e-6), work=tmp_path)
    state = on_disk.state_dict()
    assert all(torch.equal(state[name], value) for name, value in in_memory.state_dict().items())


@long
def test_the_size_of_a_batch_hardly_changes_the_fold():
    one, many = tiny_model("gpt2"), tiny_model("gpt2")
    first = fold(one, text(), dataclasses.replace(SETTINGS, batch_tokens=96))  # more than kernels take
    second = fold(many, text(), dataclasses.replace(SETTINGS, batch_tokens=640))
    assert first.layers[-1].error == pytest.approx(second.layers[-1].error, rel=0.05)


class Stopped(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize(("stage", "done"), [("measuring layers", 1), ("folding layers", 1)])
def test_a_fold_that_stops_resumes_to_the_same_bytes(stage: str, done: int, tmp_path: Path):
    work = tmp_path / "work"

    def stop(*found: object) -> None:
        if found[:2] == (stage, done):
            raise Stopped

    with pytest.raises(Stopped):
        fold(tiny_model("gpt2"), text(), SETTINGS, work, progress=stop)
    finished = len(list(work.glob("layer-*.safetensors")))
    assert finished == (1 if stage == "folding layers" else 0)

    resumed, (whole, expected) = tiny_model("gpt2"), folded_tiny("gpt2")
    stages: list[str] = []
    report = fold(resumed, text(), SETTINGS, work, resume=True, progress=lambda stage, *_: stages.append(stage))
    assert ("measuring layers" in stages) == (stage == "measuring layers")
    state = resumed.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())
    assert report.layers == expected.layers
    assert not list(work.glob("scratch-*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fold leaves in its folder."""
    folder = tmp_path_factory.mktemp("work")
    fold(tiny_model("gpt2"), text(), SETTINGS, folder)
    return folder


@pytest.fixture
def work(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "work")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"reduction": 0.6}}, r"config\.reduction was 0\.5 and is now 0\.6"),
        ({"model": {"seed": 1}}, r"model\.sha256 was .* and is now"),
        ({"windows": 39}, r"text\.sha256 was .* and is now"),
    ],
)
def test_a_wrong_resume_is_refused_and_the_difference_named(change: dict, message: str, work: Path):
    settings = dataclasses.replace(SETTINGS, **change.get("settings", {}))
    with pytest.raises(InvalidInputError, match=message):
        fold(
            tiny_model("gpt2", **change.get("model", {})),
            text(change.get("windows", 40)),
            settings,
            work,
            resume=True,
        )


def test_an_unfinished_fold_is_not_overwritten_unasked(work: Path):
    with pytest.raises(InvalidInputError, match="--resume"):
        fold(tiny_model("gpt2"), text(), SETTINGS, work)


def test_a_work_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="cannot write"):
        fold(tiny_model("gpt2"), text(), SETTINGS, tmp_path / "file" / "work")


@pytest.mark.parametrize("part", ["up", "down"])
def test_nan_in_the_weights_is_named_before_any_work(part: str):
    model = tiny_model("gpt2")
    getattr(find_ffns(model)[1], part).weight.data[0, 0] = torch.nan
    with pytest.raises(InvalidInputError, match=r"transformer\.h\.1\.mlp .*NaN"):
        fold(model, text(), SETTINGS)


def test_nan_in_the_hidden_states_is_named():
    model = tiny_model("gpt2")
    model.transformer.h[1].ln_1.weight.data[3] = torch.nan
    with pytest.raises(InvalidInputError, match=r"inputs or outputs of transformer\.h\.1\.mlp are NaN"):
        fold(model, text(), SETTINGS)


def test_too_little_text_says_how_much_is_needed():
    with pytest.raises(InvalidInputError, match="need 256 at least"):
        fold(tiny_model("gpt2"), text(4), SETTINGS)


def test_an_infeasible_reduction_says_what_is_feasible_and_what_limits_it():
    with pytest.raises(InfeasibleBudgetError, match=r"largest is 0\.\d+.*fold takes .*predictor.*Lower --reduction"):
        fold(tiny_model("gpt2"), text(), dataclasses.replace(SETTINGS, reduction=0.9))


def test_a_folded_model_is_not_folded_again():
    with pytest.raises(InvalidInputError, match="already folded"):
        fold(folded_tiny("gpt2")[0], text(), SETTINGS)


def test_an_activation_that_is_not_known_is_refused():
    with pytest.raises(UnsupportedModelError, match="gelu_tanh"):
        fold(tiny_model("gpt2", activation_function="tanh"), text(), SETTINGS)


@pytest.mark.parametrize(
    "wrong", [{"reduction": 0.0}, {"reduction": 1.0}, {"policy": "best"}, {"predictor_bits": 5}, {"tokens": 0}]
)
def test_settings_out_of_range_name_the_setting(wrong: dict):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        FoldConfig(**wrong)


def test_layers_out_of_range_are_refused():
    with pytest.raises(InvalidInputError, match="choose from 0 to 1"):
        fold(tiny_model("gpt2"), text(), dataclasses.replace(SETTINGS, layers=(5,)))


def test_a_plan_survives_its_file(work: Path):
    from tardis_llm.files import read_json

    plan = [LayerPlan(**layer) for layer in read_json(work / "plan.json")["layers"]]
    assert len(plan) == LAYERS
    assert all(0 < layer.fix_rate < 1 for layer in plan)


def test_settings_that_a_gated_ffn_cannot_have_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"policy is 'coverage'.*has a gate; give 'error'"):
        fold(tiny_model("llama"), text(), dataclasses.replace(SETTINGS, policy="coverage"))
    with pytest.raises(InvalidInputError, match=r"remainder_bits is 3; give 0 to 8 bits, and only with fallback_bits"):
        dataclasses.replace(SETTINGS, remainder_bits=3)


@pytest.mark.parametrize("name", mostly_long(["gpt2", "llama"], ["llama"]))
def test_the_outputs_wanted_are_chosen(name: str) -> None:
    """The first fold, behind nothing that was folded, is the same; those behind it are not."""
    assert SETTINGS.target == "stream"
    folds = [tiny_model(name), tiny_model(name), folded_tiny(name)[0]]
    for model, target in zip(folds, ("own", "dense"), strict=False):
        fold(model, text(), dataclasses.replace(SETTINGS, target=target))
    first, *_, last = (list(layer) for layer in zip(*(folded_ffns(model).values() for model in folds), strict=True))
    own, *others = (ffn.weights.fold for ffn in first)
    assert all(torch.allclose(own, other, atol=1e-2) for other in others)
    assert not any(torch.equal(last[0].weights.fold, ffn.weights.fold) for ffn in last[1:])


@torch.no_grad()
@pytest.mark.parametrize(("name", "left"), [("llama", 1e-6), ("granite", 1e-6), ("gpt2", 1e-6), ("gemma2", 0.5)])
def test_the_stream_target_makes_up_for_what_folds_have_changed_before(name: str, left: float, tmp_path: Path) -> None:
    """With the target in place of the FFN's output, the stream behind the block is the dense model's."""
    model, dense, config = tiny_model(name), tiny_model(name), SETTINGS
    first, second = find_ffns(model)[:2]
    windows = split_windows(text(), 32, 0.125)
    session = Session(model, [first, second], windows, config, tmp_path, silent)
    followed = session.follow(windows.fit)
    followed.at(first)
    followed.pass_by(first.index)
    first.down.get_parameter("weight").mul_(0.7)  # a poor fold of the first FFN
    wanted = followed.at(second).target
    ids = windows.fit[:4]
    aim = run_block(dense, 1, ids, hidden=run_block(dense, 0, ids))
    hidden = run_block(model, 0, ids)
    changed = run_block(model, 1, ids, hidden=hidden)
    with_target = second.down.register_forward_hook(lambda *_: wanted[: ids.numel()].view(*ids.shape, -1))
    made_up = run_block(model, 1, ids, hidden=hidden)
    with_target.remove()
    assert (made_up - aim).square().sum() < left * (changed - aim).square().sum()
