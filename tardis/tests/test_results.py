"""The page of results says what was measured, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK_TINY

import ablation
import results
import vllm_results
from sections.choices import plot_calibration
from sections.comparison import Compared, against_masks, against_quantisers, compared_table, zero_shot
from sections.real import real_part, real_readme_part
from sections.speed import Speed
from tardis_llm import FoldConfig
from tardis_llm.calibration.limits import default_length
from tardis_llm.checkpoint.loading import load_dense, load_tokenizer
from tardis_llm.evaluation.methods import Method, parse
from tardis_llm.evaluation.perplexity import token_perplexity, windows_of
from tardis_llm.evaluation.rows import Row, write_table
from tardis_llm.evaluation.tasks import Metric

RECORD = {
    "model": {"name": "toy", "sha256": "0", "dtype": "bfloat16"},
    "calibration": {"files": ["a.txt", "b.txt"], "tokens": 7000, "heldout_tokens": 1000, "sha256": "0"},
    "evaluation": {"file": "c.txt", "tokens": 5120, "window": 256, "sha256": "0"},
    "tasks": {"items": {"blimp": 2010, "lambada": None}, "local": True},
    "scope": "ffn",
    "software": {"tardis": "0", "torch": "2", "transformers": "5"},
    "machine": {"cpu": "a processor", "threads": 2},
}
_SCORES = {"piqa": {"value": 0.625}}
REAL: dict[str, Any] = {
    "settings": {"tokens": 8192, "calibration": 32768, "window": 512, "dtype": "bfloat16"},
    "machine": {"cpu": "a processor", "threads": 1},
    "models": {
        "toy-1b": {
            "methods": {
                "dense": {"touched": 1.0, **{text: {"value": 10.0} for text in ("wikitext2", "lambada", "code")}},
                "tardis-int4@0.8": {
                    **{"touched": 0.2, "wikitext2": {"value": 11.0}, "lambada": {"value": 12.0}},
                    **{"code": {"value": 20.0}, "tasks": _SCORES},
                },
            }
        }
    },
}
#: perplexity over dense, and bytes touched
MEASURED = {
    "tardis@0.7": (1.01, 0.3), "tardis@0.8": (1.1, 0.2), "tardis@0.78": (1.08, 0.22), "tardis-paper@0.78": (1.4, 0.22),
    "tardis-int8@0.75": (1.001, 0.25), "tardis-int4@0.83": (1.005, 0.17), "tardis-int4@0.875": (1.05, 0.125),
    "tardis-int4@0.915": (1.2, 0.085), "gptq4-g128": (1.002, 0.262), "gptq3-g128": (1.02, 0.2),
    "gptq2-g128": (1.3, 0.13), "rtn2-g128": (1.001, 0.11), **{f"{name}@{r}": (1 + r * 10, 1.05 - r)
    for name in ("sparsegpt", "owl-sparsegpt", "wanda", "owl-wanda", "ria", "magnitude") for r in (0.7, 0.78, 0.8)},
}  # fmt: skip


def measured(label: str, ratio: float, touched: float) -> Row:
    (method,) = [Method("dense")] if label == "dense" else parse(label, [])
    scores = {"blimp": Metric(0.6, 0.01), "lambada": Metric(0.02, 0.005)}
    lost = (ratio - 1) / 10
    changes = {task: Metric(-lost, 0.002) for task in scores}
    return Row(
        method,
        perplexity=80 * ratio,
        perplexity_error=1.0,
        ratio=ratio,
        ratio_error=0.001,
        scores=scores,
        changes=changes,
        touched=touched,
        resident=1.2,
        seconds=12.0,
    )


@pytest.fixture
def compared(tmp_path: Path) -> Compared:
    scores = {"blimp": Metric(0.6, 0.012), "lambada": Metric(0.02, 0.005)}
    unchanged = dict.fromkeys(scores, Metric(0, 0))
    dense = dataclasses.replace(measured("dense", 1, 1), ratio_error=0, scores=scores, changes=unchanged, resident=1)
    rows = [dense, *(measured(label, *figures) for label, figures in MEASURED.items())]
    rows.append(Row(Method("tardis", 0.9), "not feasible"))
    (tmp_path / "compare.json").write_text(json.dumps(RECORD))
    write_table(tmp_path / "table.csv", rows)
    return Compared.read(tmp_path)


def line(text: str, start: str) -> list[str]:
    """The cells of the table row that starts so."""
    row = next(each for each in text.splitlines() if each.startswith(f"| {start} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_every_method_is_in_the_table(compared: Compared):
    text = compared_table(compared)
    assert line(text, "tardis@0.78")[1:5] == ["86.40", "1.0800 ± 0.0010", "22.0%", "120.0%"]
    assert line(text, "tardis@0.9")[1] == "does not fit"
    assert len(text.splitlines()) == 2 + len(MEASURED) + 2


def test_losses_of_masks_are_in_multiples_of_the_folds(compared: Compared):
    cells = line(against_masks(compared), "0.8")
    assert cells[1:3] == ["1.1000 ± 0.0010", "20.0%"]
    assert cells[3] == "80.0x (25%)"  # 8.0 against 0.1


def test_a_fold_is_only_better_than_a_quantiser_in_no_more_bytes(compared: Compared):
    text = against_quantisers(compared)
    assert line(text, "gptq4-g128")[3:] == ["tardis-int8@0.75", "25.0%", "1.0010 ± 0.0010", "yes"]
    assert line(text, "gptq2-g128")[3] == "tardis-int4@0.875"
    assert line(text, "rtn2-g128")[-1] == "**no**"
    assert "better in 3 of 4 cases, and in 3 of 4 between 8.5% and 27.5%" in text


def test_changes_beyond_a_standard_error_are_marked(compared: Compared):
    text = zero_shot(compared)
    assert line(text, "tardis@0.7")[1:] == ["-0.1 ± 0.2", "-0.1 ± 0.2"]
    assert line(text, "tardis@0.8")[1:] == ["-1.0 ± 0.2", "-1.0 ± 0.2 (!)"]
    assert "tardis@0.78" not in text


def test_the_readme_keeps_what_is_around_its_part(compared: Compared):
    part = results.readme_part(compared, Speed.read(results.SPEEDS), REAL)
    before = f"head\n{results.BEGIN}\n\nOUTDATED | 1.23\n\n{results.END}\ntail\n"
    after = results.replace_part(before, part)
    assert after.startswith("head\n")
    assert after.endswith("tail\n")
    assert "OUTDATED" not in after
    assert results.replace_part(after, part) == after
    assert line(part, "TARDIS, bf16")[1:4] == ["78.0%", "86.40", "1.0800 ± 0.0010"]


def test_real_models_are_compared_by_the_increase_of_the_loss():
    assert line(real_part([REAL]), "dense")[1:] == ["100.0%", "10.00", "10.00", "10.00", ""]
    assert line(real_part([REAL]), "**tardis-int4**")[1:] == ["20.0%", "+0.095", "+0.182", "+0.693", "62.5%"]
    assert line(real_readme_part(REAL), "**tardis-int4**")[1:] == ["20.0%", "+0.095", "+0.182", "+0.693"]


def test_runs_with_other_calibration_stand_behind_the_first():
    other = copy.deepcopy(REAL)
    other["settings"]["calibration"] = 4 * REAL["settings"]["calibration"]
    part = real_part([REAL, other])
    before, _, after = part.partition(f"Calibrated on {other['settings']['calibration']:,} tokens, on an ")
    assert line(before, "dense")[1] == line(after, "dense")[1] == "100.0%"


def test_the_page_has_the_ablation_in_full(compared: Compared, tmp_path: Path):
    cells = {
        cell.key: {
            "ratio": {"a": 1 + 0.001 * n, "b": 1.5}, "ratio_error": {"a": 0.1, "b": 0.2}, "touched": 0.2,
            "resident": 1.2, "fix_rate": 0.05, "bits": [1, 2], "seconds": 30.0,
        }
        for n, cell in enumerate(ablation.cells())
    }  # fmt: skip
    found = {"title": "toy ablation", "evaluations": ["a", "b"], "cells": cells}
    speed = Speed.read(results.SPEEDS)
    text = results.page(compared, found, speed, [REAL])
    for fold in speed.packed["folds"].values():
        assert f"{fold['kernels']:.3f}" in text
        assert abs(fold["ratio"] - 1) < 0.002
        assert fold["resident"] < 0.35
    for cell in ablation.cells():
        assert f"### {cell.group}\n" in text
        assert line(text[text.index(f"### {cell.group}\n") :], cell.name)[1].startswith(
            f"{cells[cell.key]['ratio']['a']:.4f}"
        )
    assert not re.search(r"\bnan\b", text)
    plot_calibration(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_published_page_is_made_of_the_published_results():
    compared = Compared.read(results.COMPARE)
    found = json.loads(results.ABLATION.read_text())
    speed = Speed.read(results.SPEEDS)
    real = [json.loads(path.read_text()) for path in results.REAL]
    assert results.PAGE.read_text(encoding="utf-8") == results.page(compared, found, speed, real)
    readme = results.README.read_text(encoding="utf-8")
    assert results.replace_part(readme, results.readme_part(compared, speed, real[0])) == readme


def test_cells_of_the_ablation_are_valid_and_named_once_a_group():
    cells = list(ablation.cells())
    assert len({(cell.group, cell.name) for cell in cells}) == len(cells)
    for cell in cells:
        FoldConfig(tokens=cell.tokens, **cell.settings)


def test_a_cell_of_the_ablation_is_a_fold_with_its_settings(tiny_dir: Path, tiny_text: Path):
    tokenizer = load_tokenizer(str(tiny_dir))
    windows = windows_of(tiny_text.read_text()[:4000], tokenizer, default_length(tokenizer, None))
    dense = {"text": token_perplexity(load_dense(str(tiny_dir), "bfloat16"), windows)}
    bench = ablation.Bench(str(tiny_dir), {"wikipedia": [tiny_text], "novels": []}, {"text": windows}, dense)
    settings = {"reduction": 0.5, "predictor_bits": 2, "probe_tokens": int(QUICK_TINY[3]), "damping": 0.1}
    found = bench.measure(ablation.Cell("group", "name", settings, 4096, "wikipedia"))
    assert found["bits"] == [2, 2]
    assert found["dampings"] == [0.1, 0.1]
    assert found["touched"] == pytest.approx(0.5, abs=0.05)
    assert found["ratio"]["text"] == pytest.approx(1, abs=0.2)
    assert found["tokens"] == 3584


def test_the_page_on_serving_has_the_published_figures():
    text = vllm_results.PAGE.read_text(encoding="utf-8")
    part = vllm_results.speed_part(results.SPEEDS)
    assert vllm_results.replaced(text, part) == text
    assert len(part.splitlines()) > 20
