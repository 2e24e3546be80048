"""Methods side by side: cells are measured once, kept, and told from those of another comparison."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, assert_refused
from folds import SETTINGS, text
from harness_data import write_items
from marks import long
from models import LAYERS, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from sections.comparison import read_table
from tardis_llm.baselines import count_skips
from tardis_llm.calibration.text import split_windows
from tardis_llm.errors import InvalidInputError
from tardis_llm.evaluation import compare as module
from tardis_llm.evaluation.compare import Comparison
from tardis_llm.evaluation.curves import plot_curves
from tardis_llm.evaluation.fix_rate import count_fixes
from tardis_llm.evaluation.methods import DENSE, Method, parse
from tardis_llm.evaluation.perplexity import token_perplexity
from tardis_llm.evaluation.rows import Cell, Row, write_table
from tardis_llm.evaluation.tasks import Metric, Tasks
from tardis_llm.runtime.placing import folded_ffns

EVALUATION = torch.randint(2, 256, (6, 32), generator=torch.Generator().manual_seed(7))
FAST = ("--tokens", 2048, "--window", 32, "--eval-tokens", 1024)


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def comparison(directory: Path, **changes: Any) -> Comparison:
    """Of the tiny GPT-2, on random bytes."""
    values = {
        "load": lambda: tiny_model("gpt2", dtype=torch.bfloat16),
        "tokenizer": tiny_tokenizer(),
        "calibration": split_windows(text(), 32, 0.125),
        "evaluation": EVALUATION,
        "tasks": Tasks(),
        "config": SETTINGS,
        "scope": "ffn",
        "directory": directory,
        "device": torch.device("cpu"),
        "record": {"what": {"is": "compared"}},
    }
    made = Comparison(**{**values, **changes})
    made.open()
    return made


def cells(made: Comparison, names: str) -> list[Cell]:
    return [made.cell(method, quiet) for method in [Method(DENSE), *parse(names, [0.5])]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    data = write_items(tmp_path_factory.mktemp("items"))
    widths = replace(SETTINGS, predictor_bits=None)
    tasks = Tasks({"blimp": None, "lambada": 2}, data)
    made = comparison(tmp_path_factory.mktemp("compare"), tasks=tasks, config=widths)
    return cells(made, "wanda,rtn8,gptq2-g64,affine,tardis,tardis-int8,tardis@0.95")


def labelled(measured: list[Cell], label: str) -> Cell:
    return next(cell for cell in measured if cell.method.label == label)


@long
def test_the_dense_model_is_its_own_measure(measured: list[Cell]):
    dense = measured[0]
    found = Row.of(dense, dense)
    assert dense.perplexity is not None
    expected = token_perplexity(tiny_model("gpt2", dtype=torch.bfloat16), EVALUATION)
    assert found.perplexity == expected.value
    assert (found.ratio, found.ratio_error) == (1, 0)
    assert found.touched == found.resident == 1
    assert dense.dense == LAYERS * 2 * (2 * 64 * 256 + 64 + 256)
    assert found.changes == {"blimp": Metric(0, 0), "lambada": Metric(0, 0)}


def test_bytes_count_everything(measured: list[Cell]):
    weights, biases = LAYERS * 2 * 64 * 256, LAYERS * (64 + 256) * 2
    wanda, rtn = labelled(measured, "wanda@0.5"), labelled(measured, "rtn8-g128")
    assert wanda.touched == wanda.resident == weights // 2 * 2 + weights // 8 + biases
    groups = LAYERS * (256 + 64 * 2)  # of the up weight one a row, of the down weight two
    assert rtn.touched == rtn.resident == weights + groups * 3 + biases
    assert labelled(measured, "affine").touched == LAYERS * (64 * 64 + 64) * 2


def test_folds_are_counted_with_the_neurons_fixed_on_the_evaluation_text(tmp_path: Path):
    kept: list[PreTrainedModel] = []

    def load() -> PreTrainedModel:
        kept.append(tiny_model("gpt2", dtype=torch.bfloat16))
        return kept[-1]

    cell = comparison(tmp_path, load=load).cell(Method("tardis-int8", 0.5), quiet)
    with count_fixes(kept[-1]) as counts:
        token_perplexity(kept[-1], EVALUATION)
    rates = list(counts.rates.values())
    assert cell.fix_rate == pytest.approx(sum(rates) / len(rates))
    touched = 0.0
    for ffn, rate in zip(folded_ffns(kept[-1]).values(), rates, strict=True):
        fixing = ffn.weights.fixing
        always = sum(tensor.nbytes for tensor in ffn.state_dict().values()) - fixing
        touched += always + 2 * 256 + rate * fixing
    assert cell.touched == pytest.approx(touched)
    assert cell.resident < 0.7 * cell.dense


def test_what_skips_is_counted_on_the_evaluation_text(tmp_path: Path):
    kept: list[PreTrainedModel] = []

    def load() -> PreTrainedModel:
        kept.append(tiny_model("gpt2", dtype=torch.bfloat16))
        return kept[-1]

    dense, teal, cats, repaired = cells(comparison(tmp_path, load=load), "teal@0.4,cats@0.3,rtn3+affine")
    with count_skips(kept[1]) as counts:
        token_perplexity(kept[1], EVALUATION)
    saved = sum(rate * 2 * 64 * 256 for rate in counts.rates.values())
    assert teal.touched == pytest.approx(dense.touched - saved)
    assert teal.resident == cats.resident == dense.resident
    assert Row.of(cats, dense).touched == pytest.approx(0.7, abs=0.05)
    assert repaired.touched < dense.touched


def test_what_does_not_fit_says_why_and_does_not_stop_the_rest(measured: list[Cell]):
    cell = labelled(measured, "tardis@0.95")
    assert cell.infeasible is not None
    assert "not feasible" in cell.infeasible
    found = Row.of(cell, measured[0])
    assert math.isnan(found.perplexity)
    assert found.accuracy is None


def test_rounding_to_eight_bits_changes_little_and_to_two_much(measured: list[Cell]):
    ratios = {cell.method.name: Row.of(cell, measured[0]).ratio for cell in measured if not cell.infeasible}
    assert abs(ratios["rtn8-g128"] - 1) < 0.01
    assert abs(ratios["gptq2-g64"] - 1) > abs(ratios["rtn8-g128"] - 1)


def test_accuracies_are_of_all_tasks_and_paired(measured: list[Cell]):
    found = Row.of(labelled(measured, "affine"), measured[0])
    assert list(found.scores) == ["blimp", "lambada"]
    assert found.accuracy is not None
    mean = (found.scores["blimp"].value + found.scores["lambada"].value) / 2
    assert found.accuracy.value == pytest.approx(mean)
    errors = [score.standard_error for score in found.scores.values()]
    assert found.accuracy.standard_error == pytest.approx(math.hypot(*errors) / 2)
    ours, dense = (labelled(measured, label).scores[0].correct for label in ("affine", "dense"))
    assert found.changes["blimp"].value == pytest.approx((sum(ours) - sum(dense)) / 6)


def test_finished_cells_are_read_back_as_they_were(tmp_path: Path):
    first = cells(comparison(tmp_path), "rtn8,tardis@0.95")

    def never() -> PreTrainedModel:
        raise AssertionError("a finished cell is not measured again")

    again = cells(comparison(tmp_path, load=never), "rtn8,tardis@0.95")
    for one, other in zip(first, again, strict=True):
        assert one.as_dict() == other.as_dict()


@long
def test_an_interrupted_comparison_keeps_its_cells_and_goes_on_with_the_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = comparison(tmp_path)
    cells(made, "rtn8")
    stages: list[tuple[str, int]] = []

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "folding layers" and done == 2:
            raise KeyboardInterrupt

    def watch(stage: str, done: int, total: int) -> None:
        stages.append((stage, done))

    fold = Method("tardis", 0.5)
    with pytest.raises(KeyboardInterrupt):
        made.cell(fold, stop)
    assert made.finished(Method("rtn8-g128")) is not None
    assert made.finished(fold) is None
    resumed = made.cell(fold, watch)
    assert not any(stage == "measuring layers" for stage, _ in stages)
    assert not any((tmp_path / module._WORK).iterdir())
    whole = comparison(tmp_path / "other").cell(fold, quiet)
    assert resumed.perplexity == whole.perplexity


def test_another_comparison_does_not_go_into_the_same_directory(tmp_path: Path):
    comparison(tmp_path)
    comparison(tmp_path, record={"what": {"is": "compared"}, "machine": {"threads": 2}})
    with pytest.raises(InvalidInputError, match=r"different comparison: what\.is was .compared. and is now .other."):
        comparison(tmp_path, record={"what": {"is": "other"}})


@long
def test_with_all_matrices_in_scope_the_attention_of_a_fold_counts_as_read(tmp_path: Path):
    ffn = cells(comparison(tmp_path / "ffn"), "tardis,rtn8")
    both = cells(comparison(tmp_path / "all", scope="all"), "tardis,rtn8")
    attention = both[0].dense - ffn[0].dense
    assert attention == LAYERS * 2 * (64 * 192 + 192 + 64 * 64 + 64)
    assert both[1].touched == pytest.approx(ffn[1].touched + attention)
    assert both[1].dense == both[0].dense == both[2].dense
    assert both[2].touched > ffn[2].touched


def test_rows_survive_a_csv_file(measured: list[Cell], tmp_path: Path):
    rows = [Row.of(cell, measured[0]) for cell in measured]
    write_table(tmp_path / "t.csv", rows)
    back = read_table(tmp_path / "t.csv", ["blimp", "lambada"])
    for one, other in zip(rows, back, strict=True):
        assert repr(one) == repr(other)


@pytest.mark.parametrize("scored", [False, True])
def test_curves_are_drawn(measured: list[Cell], tmp_path: Path, scored: bool):
    rows = [Row.of(cell, measured[0]) for cell in measured]
    bad = {"perplexity": 1e6, "perplexity_error": 1.0, "ratio": 1e4, "ratio_error": 1.0}
    broken = Row(Method("magnitude", 0.8), **bad, touched=0.26, resident=0.26)
    rows = [each if scored else replace(each, scores={}) for each in [*rows, broken]]
    plot_curves(rows, tmp_path / "curves.png", "tiny")
    from matplotlib.image import imread

    image = imread(tmp_path / "curves.png")
    height, width = image.shape[:2]
    assert height > (0.7 if scored else 0.4) * width
    assert image[..., :3].std() > 0.05


def command(tiny_dir: Path, tiny_text: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("compare", tiny_dir, "-o", out, "--text", tiny_text, "--eval-text", tiny_text, *FAST, *more)


def test_the_command_writes_table_and_curves_and_goes_on(
    tardis: Callable[..., Result], tiny_dir: Path, tiny_text: Path, tmp_path: Path
):
    out = tmp_path / "out"
    arguments = ("--reductions", "0.5", "--tasks", "blimp:4,winogrande", "--task-data", write_items(tmp_path))
    first = tardis(*command(tiny_dir, tiny_text, out, "--methods", "wanda,rtn4", *arguments))
    assert first.code == 0
    for part in ("wanda@0.5", "rtn4-g128", "touched", "Zero-shot accuracy", "winogrande"):
        assert part in first.out
    assert (out / "curves.png").stat().st_size > 10_000
    kept = (out / "cells" / "wanda_0.5.json").read_bytes()
    second = tardis(*command(tiny_dir, tiny_text, out, "--methods", "wanda,tardis", *arguments, "--json"))
    figures = json.loads(second.out)
    assert [record["method"] for record in figures["rows"]] == ["dense", "wanda", "tardis"]
    assert figures["comparison"]["evaluation"]["tokens"] == 1024
    assert (out / "cells" / "wanda_0.5.json").read_bytes() == kept
    with (out / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [each["method"] for each in rows] == ["dense", "wanda", "tardis"]
    assert float(rows[1]["ratio"]) == figures["rows"][1]["ratio"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--methods", "wandas"), "no method"),
        (("--reductions", "half"), "give numbers"),
        (("--tasks", "blimp:many"), "write for example blimp:2010"),
        (("--tasks", "chess"), "no task chess"),
        (("--tasks", "wikitext"), "no accuracy"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(
    tardis: Callable[..., Result], tiny_dir: Path, tiny_text: Path, tmp_path: Path, more: tuple[str, str], message: str
):
    assert_refused(tardis(*command(tiny_dir, tiny_text, tmp_path / "out", *more)), message)
    assert not (tmp_path / "out").exists()


def test_a_comparison_needs_calibration_text(
    tardis: Callable[..., Result], tiny_dir: Path, tiny_text: Path, tmp_path: Path
):
    result = tardis("compare", tiny_dir, "-o", tmp_path / "out", "--eval-text", tiny_text)
    assert_refused(result, "calibration needs text")


def test_other_settings_do_not_mix_with_what_is_there(
    tardis: Callable[..., Result], tiny_dir: Path, tiny_text: Path, tmp_path: Path
):
    assert tardis(*command(tiny_dir, tiny_text, tmp_path / "out", "--methods", "rtn8")).code == 0
    result = tardis(*command(tiny_dir, tiny_text, tmp_path / "out", "--methods", "rtn8", "--seed", 3))
    assert_refused(result, "fold.seed was 0 and is now 3")
