"""`tardis eval` with tasks and with both recipes of perplexity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, assert_refused
from harness_data import write_items
from models import tiny_model, tiny_tokenizer

Tardis = Callable[..., Result]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of tasks."""
    return write_items(tmp_path)


def test_tasks_alone_give_a_table_and_json(tardis: Tardis, tiny_dir: Path, data: Path):
    arguments = ("eval", tiny_dir, "--tasks", "blimp,hellaswag", "--task-data", data, "--limit", 4)
    result = tardis(*arguments)
    assert result.code == 0
    assert "perplexity" not in result.out
    for part in ("blimp", "hellaswag", "acc_norm", "standard error", "±"):
        assert part in result.out
    figures = json.loads(tardis(*arguments, "--json").out)
    assert figures["perplexity"] is figures["measure"] is figures["text"] is None
    assert [(task["task"], task["metric"], task["items"]) for task in figures["tasks"]] == [
        ("blimp", "acc", 4),
        ("hellaswag", "acc_norm", 4),
    ]
    assert set(figures["tasks"][1]["also"]) == {"acc"}
    assert f"{figures['tasks'][0]['value']:.2%}" in result.out


def test_text_and_tasks_of_a_folded_model(tardis: Tardis, fold: Callable[..., Result], data: Path, tiny_text: Path):
    folder = data / "folded"
    assert fold(out=folder).code == 0
    arguments = ("eval", folder, "--text", tiny_text, "--tasks", "winogrande", "--task-data", data)
    figures = json.loads(tardis(*arguments, "--json").out)
    assert figures["measure"] == "token perplexity"
    assert figures["perplexity"]["windows"] == 8_000 // 128
    assert figures["ffn"]["touched"] < figures["ffn"]["dense"]
    assert figures["tasks"][0]["items"] == 3
    alone = json.loads(tardis("eval", folder, "--text", tiny_text, "--json").out)
    assert alone["perplexity"] == figures["perplexity"]
    assert alone["fix_rate_per_layer"] == figures["fix_rate_per_layer"]  # the tasks' tokens are not counted


def test_the_recipe_per_word_says_so(tardis: Tardis, tiny_dir: Path, data: Path):
    (data / "text.txt").write_text("The first text.\nOf two lines.\n\nThe second one is here.", encoding="utf-8")
    arguments = ("eval", tiny_dir, "--text", data / "text.txt", "--recipe", "words")
    result = tardis(*arguments)
    assert "word perplexity" in result.out
    assert "11 words, 52 tokens predicted in 2 documents" in " ".join(result.out.split())
    figures = json.loads(tardis(*arguments, "--json").out)
    assert figures["measure"] == figures["perplexity"]["kind"] == "word perplexity"
    assert figures["perplexity"]["length"] == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --text FILE, --tasks NAMES or both"),
        (("--tasks", "piqa,hellswag"), "there is no task hellswag; choose from hellaswag"),
        (("--tasks", ""), "choose from hellaswag"),
        (("--tasks", "piqa", "--limit", "1"), "the limit is 1"),
    ],
)
def test_wrong_input_is_refused(tardis: Tardis, tiny_dir: Path, arguments: tuple[str, ...], message: str):
    assert_refused(tardis("eval", tiny_dir, *arguments), message)


def test_missing_data_and_encoders_are_refused(tardis: Tardis, tiny_dir: Path, data: Path, tmp_path: Path):
    (data / "piqa_valid.jsonl").unlink()
    result = tardis("eval", tiny_dir, "--tasks", "piqa", "--task-data", data)
    assert_refused(result, f"there is no file {data / 'piqa_valid.jsonl'}; put the task's items there")
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    assert_refused(tardis("eval", tmp_path / "bert", "--tasks", "blimp", "--task-data", data), "is an encoder")


def test_a_wrong_recipe_is_wrong_usage(tardis: Tardis, tiny_dir: Path, tiny_text: Path):
    assert tardis("eval", tiny_dir, "--text", tiny_text, "--recipe", "bytes").code == 2
