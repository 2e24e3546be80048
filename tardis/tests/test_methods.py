"""Names of methods, and what each does to a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from folds import SETTINGS, text
from models import tiny_model

from tardis_llm.calibration.text import split_windows
from tardis_llm.errors import InvalidInputError
from tardis_llm.evaluation.methods import FOLDS, NAMES, Method, apply_method, parse
from tardis_llm.report import FoldReport


def test_names_without_a_reduction_get_all_of_them_and_those_of_fixed_size_none():
    found = parse("tardis, wanda@0.6,gptq4,teal@0.4,gptq3+refit+affine,tardis-int4@0.875", [0.5, 0.7])
    assert [method.label for method in found] == [
        "tardis@0.5", "tardis@0.7", "wanda@0.6", "gptq4-g128", "teal@0.4", "gptq3-g128+affine+refit",
        "tardis-int4@0.875",
    ]  # fmt: skip


def test_a_method_named_twice_is_measured_once_and_dense_always():
    assert parse("rtn4,rtn4-g128,dense,tardis@0.5,tardis", [0.5]) == [Method("rtn4-g128"), Method("tardis", 0.5)]


def test_labels_read_back():
    for name in NAMES:
        (method,) = parse(name, [0.625])
        assert parse(method.label, []) == [method]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("wandas", "no method 'wandas'; choose from tardis, "),
        ("gptq5", "gptq4-g128"),
        ("gptq4@0.8", "fixed size"),
        ("tardis@eighty", "no number behind @"),
        ("tardis@1.5", "between 0 and 1"),
        (" , ", "no methods named"),
    ],
)
def test_names_that_cannot_be_are_refused(names: str, message: str):
    with pytest.raises(InvalidInputError, match=message):
        parse(names, [0.5])


@pytest.mark.parametrize("name", FOLDS)
def test_kinds_of_folds_are_made_with_their_settings(name: str, tmp_path: Path):
    model = tiny_model("gpt2")
    windows = split_windows(text(), 32, 0.125)
    method = Method(name, 0.5)
    settings = replace(SETTINGS, layers=(0,))
    report = apply_method(method, model, windows, settings, "ffn", tmp_path / "work", lambda *_: None)
    assert isinstance(report, FoldReport)
    assert report.config["reduction"] == 0.5
    assert {key: report.config[key] for key in FOLDS[name]} == FOLDS[name]
    assert report.config["probe_tokens"] == SETTINGS.probe_tokens
    assert (tmp_path / "work" / "layer-0000.safetensors").exists()
