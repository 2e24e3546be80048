"""The sections on speed at equal quality and beside llama.cpp say what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sections.equal import equal_parts, equal_readme_part
from sections.llama import llama_parts


def judged(wikitext2: float, code: float, **more: Any) -> dict[str, Any]:
    return {"perplexity": {"wikitext2": {"value": wikitext2}, "code": {"value": code}}, **more}


ENTRIES = {
    "dense": judged(10, 5),
    "int4": judged(10.5, 5.5),
    "q4_0-pure": judged(11, 6, own={"wikitext2": {"value": 11.25}, "code": {"value": 6.25}}),
    "tardis-int4@0.8": judged(10.4, 5.9, fix_rate=0.3, bits=[2], touched=0.2),
    "tardis-int4@0.9": judged(10.9, 7, fix_rate=0.1, bits=[2], kept=0.4, touched=0.15),
}
SETTINGS = {"window": 512, "tokens": {"wikitext2": 8192, "code": 8192}, "calibration": 32768, "code": 0.25}
MACHINE = {"cpu": "a processor", "threads": 2, "read_bytes_per_second": 3e10, "batch": 1}
SECONDS = {
    "int4": [0.1] * 3,
    "q4_0-pure": [0.2] * 3,
    "tardis-int4@0.8": [0.08] * 3,
    "tardis-int4@0.9": [0.05] * 3,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "equal_quality_toy.json").write_text(json.dumps({"settings": SETTINGS, "entries": ENTRIES}))
    speed = {"subject": "toy", "layers": 8, **MACHINE, "seconds": SECONDS}
    (tmp_path / "equal_speed_toy_8_2_1.json").write_text(json.dumps(speed))
    return tmp_path


def row(text: str, start: str) -> list[str]:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_each_rival_meets_the_fastest_fold_that_is_no_worse(folder: Path):
    tables = list(equal_parts(folder))
    (speeds,) = [part for part in tables if part.startswith("| rival")]
    assert row(speeds, "int4") == ["int4", "10.0", "**1.25 [1.25-1.25]** tardis-int4@0.8", "none"]
    assert row(speeds, "llama.cpp Q4_0, pure")[1:] == [
        "5.0",
        "**4.00 [4.00-4.00]** tardis-int4@0.9",
        "**2.50 [2.50-2.50]** tardis-int4@0.8",
    ]
    assert any("Falcon-7B's shape with 8 layers" in part for part in tables)


def test_perplexities_stand_with_their_losses(folder: Path):
    (table,) = [part for part in equal_parts(folder) if part.startswith("Perplexity")]
    assert row(table, "dense")[1:3] == ["10.00", "5.00"]
    assert row(table, "llama.cpp Q4_0, pure")[1] == "11.00 (+0.095; own logits 11.25)"
    assert row(table, "tardis-int4@0.9")[1:] == ["10.90 (+0.086)", "7.00 (+0.336)", "40.0%", "10.0%", "15.0%"]


def test_the_readme_has_quality_and_speed_in_one_table(folder: Path):
    about, table = equal_readme_part(folder, "toy")
    assert "32,768 tokens of Wikipedia, novels and 25% code." in about
    assert row(table, "dense, perplexity")[1:] == ["10.00", "5.00", ""]
    assert row(table, "**tardis-int4@0.9**")[1:] == ["+0.086", "+0.336", "20.0"]
    assert row(table, "int4")[1:] == ["+0.049", "+0.095", "10.0"]


def scored(correct: str) -> dict[str, Any]:
    share = correct.count("1") / len(correct)
    return {"metric": "acc", "value": share, "standard_error": 0.25, "items": len(correct), "correct": correct}


def test_tasks_stand_with_their_change_paired_by_item(folder: Path):
    entries = {"dense": {"piqa": scored("1100"), "lambada": scored("1010")}, "int4": {"piqa": scored("1000")}}
    (folder / "equal_tasks_toy.json").write_text(json.dumps({"settings": {"items": 4}, "entries": entries}))
    (table,) = [part for part in equal_parts(folder) if part.startswith("Zero-shot")]
    assert row(table, "dense, accuracy")[1:] == ["50.0 ± 25.0", "50.0 ± 25.0"]
    assert row(table, "int4")[1:] == ["-25.0 ± 25.0", ""]
    assert "4 items of each task" in table


def test_sections_without_results_are_left_out(tmp_path: Path):
    assert [*equal_parts(tmp_path), *llama_parts(tmp_path)] == []


def test_processors_are_kept_apart(tmp_path: Path):
    ratio = {"value": 1.5, "low": 1.25, "high": 2.0}
    rows = [
        {"variant": "int4", "tokens_per_second": 20, "over_llama": ratio, "first_token_seconds": 2,
         "first_over_llama": ratio, "bytes": 1}
    ]  # fmt: skip
    for cpu, more in (("one", {}), ("two", {}), ("two", {"instructions": "avx2"})):
        run = {
            **more,
            "cpu": cpu,
            "threads": 2,
            "file": "falcon-7b-8.gguf",
            "compiled": False,
            "batch": 4,
            "prompt": 128,
            "llama_cpp": "libllama",
        }
        (tmp_path / f"llama_cpp_{cpu}{len(more)}.json").write_text(json.dumps({**run, "rows": rows}))
    parts = list(llama_parts(tmp_path))
    machines = ["one, threads: 2.", "two, threads: 2.", "two, threads: 2, both sides by avx2 only."]
    assert [part for part in parts if "threads: 2" in part] == machines
    assert row(parts[-1], "falcon-7b-8") == [
        *("falcon-7b-8", "4", "int4", "20.0", "1.50 [1.25-2.00]", "128", "2.00", "1.50 [1.25-2.00]")
    ]
