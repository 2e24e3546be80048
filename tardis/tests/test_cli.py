"""The command line: what each verb prints and writes, interruption, and the self-check."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, assert_refused
from models import LAYERS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from tardis_llm import __version__, sample
from tardis_llm.checkpoint.folded import holds_fold
from tardis_llm.checkpoint.manifest import MANIFEST
from tardis_llm.cli import demo
from tardis_llm.cli import output as show
from tardis_llm.evaluation import self_check
from tardis_llm.pipeline import fold as pipeline
from tardis_llm.pipeline.workspace import FOLDER
from tardis_llm.report import FoldReport, LayerReport
from tardis_llm.runtime.placing import folded_ffns

Tardis = Callable[..., Result]


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint."""
    tensors: dict[str, str] = json.loads((directory / MANIFEST).read_text())["tensors"]
    return tensors


def test_python_m_runs_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("tardis_llm.cli.main.keep_freed_memory", lambda: None)
    monkeypatch.setattr(sys, "argv", ["tardis", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tardis_llm", run_name="__main__", alter_sys=True)
    assert (ended.value.code, capsys.readouterr().out) == (0, f"tardis {__version__}\n")


@pytest.mark.parametrize("verb", ["demo", "fold", "inspect", "eval", "generate"])
def test_every_verb_has_help(tardis: Tardis, verb: str):
    result = tardis(verb, "--help")
    assert result.code == 0
    assert "--json" in result.out


def test_fold_writes_a_checkpoint_that_transformers_loads(fold: Callable[..., Result], tmp_path: Path):
    result = fold("--max-shard-size", "200KB")
    assert result.code == 0
    for part in ("transformer.h.1.mlp", "reduction 5", "self-check: held-out perplexity", "sample: "):
        assert part in result.out
    assert "written to" in result.err
    assert "peak memory" in result.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(folded_ffns(model)) == LAYERS
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert not (tmp_path / "out" / FOLDER).exists()


def test_fold_prints_one_json_object_and_nothing_else(fold: Callable[..., Result], tmp_path: Path):
    result = fold("--json", "--layers", "1", "--dtype", "bfloat16", "--policy", "coverage", "--no-refit")
    assert result.code == 0
    figures = json.loads(result.out)
    assert figures["output"] == str(tmp_path / "out")
    assert figures["self_check"]["passed"]
    assert [layer["prefix"] for layer in figures["report"]["layers"]] == ["transformer.h.1.mlp"]
    assert figures["report"]["totals"]["reduction"] == pytest.approx(0.5, abs=0.02)
    assert figures["report"]["config"]["policy"] == "coverage"
    assert figures["report"]["layers"][0]["damping"] is None
    assert figures["seconds"] > 0
    assert figures["peak_memory_bytes"] > 2**20
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_an_encoder_is_folded_and_checked_by_its_output(fold: Callable[..., Result], tmp_path: Path):
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    figures = json.loads(fold("--json", model=tmp_path / "bert").out)
    assert figures["self_check"]["measure"] == "output change"
    assert figures["sample"] is None
    assert holds_fold(tmp_path / "out")


def test_eval_of_a_folded_model_gives_what_it_touches_on_that_text(tardis: Tardis, sample_folded: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text(sample.evaluation_text().read_text(encoding="utf-8")[:8_000], encoding="utf-8")
    result = tardis("eval", sample_folded, "--text", text, "--window", 128)
    assert result.code == 0
    assert "token perplexity" in result.out
    assert "windows of 128" in result.out
    assert "this text" in result.out
    figures = json.loads(tardis("eval", sample_folded, "--text", text, "--window", 128, "--json").out)
    assert 60 < figures["perplexity"]["value"] < 200
    assert 0 < figures["perplexity"]["standard_error"] < 30
    assert figures["perplexity"]["length"] == 128
    assert figures["ffn"]["reduction"] == pytest.approx(0.78, abs=0.01)
    assert figures["ffn"]["resident"] > figures["ffn"]["dense"]
    assert len(figures["fix_rate_per_layer"]) == 6


def test_eval_of_a_dense_model_gives_its_perplexity_alone(tardis: Tardis, tiny_dir: Path, tiny_text: Path):
    figures = json.loads(tardis("eval", tiny_dir, "--text", tiny_text, "--dtype", "bfloat16", "--json").out)
    assert figures["dtype"] == "bfloat16"
    assert figures["ffn"] is None
    assert figures["perplexity"]["windows"] == 8_000 // 128
    assert "touched" not in tardis("eval", tiny_dir, "--text", tiny_text).out


def test_inspect_of_a_folded_model_shows_and_draws_it(tardis: Tardis, sample_folded: Path, tmp_path: Path):
    result = tardis("inspect", sample_folded, "--plot", tmp_path / "new" / "fold.png")
    assert result.code == 0
    assert "transformer.h.5.mlp" in result.out
    assert "resident" in result.out
    assert (tmp_path / "new" / "fold.png").stat().st_size > 10_000
    figures = json.loads(tardis("inspect", sample_folded, "--json").out)
    assert figures["folded"]
    assert len(figures["layers"]) == 6


def test_inspect_of_a_dense_model_measures_it_on_text(tardis: Tardis, tiny_dir: Path, tiny_text: Path, tmp_path: Path):
    bare = tardis("inspect", tiny_dir)
    assert bare.code == 0
    assert "give --text FILE" in bare.err
    assert "largest reduction" in bare.out
    result = tardis("inspect", tiny_dir, "--text", tiny_text, "--plot", tmp_path / "dense.png", "--json")
    figures = json.loads(result.out)
    assert not figures["folded"]
    assert all(0 < layer["linearity"] < 1.2 for layer in figures["layers"])
    assert (tmp_path / "dense.png").stat().st_size > 10_000
    # fixed at 0.5 with 1 bit, by hand: dense 4 (2 d h + d + h), always 4 (d^2 + d) + h (d / 8 + 2 + 8) + 4 h
    d, h = 64, 256
    rate = (2 * (2 * d * h + d + h) - 4 * (d * d + d) - h * (d / 8 + 10) - 4 * h) / (8 * d * h)
    assert figures["feasible"][0]["fix_rates"]["0.5"] == pytest.approx(rate)


def test_generate_streams_the_prompt_and_what_follows(tardis: Tardis, sample_folded: Path):
    streamed = tardis("generate", sample_folded, "The history of", "--max-new-tokens", 8)
    assert streamed.code == 0
    assert streamed.out.startswith("The history of ")
    figures = json.loads(tardis("generate", sample_folded, "The history of", "--max-new-tokens", 8, "--json").out)
    assert streamed.out.strip() == "The history of" + figures["text"]


def test_generate_warns_where_the_positions_end(tardis: Tardis, tiny_dir: Path):
    result = tardis("generate", tiny_dir, "x" * 120, "--max-new-tokens", 100, "--json")
    assert result.code == 0
    assert "only 8 tokens fit" in result.err


def test_the_demo_compares_writes_and_draws(
    tardis: Tardis, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sample, "model_dir", lambda: tiny_dir)  # the same demo on a smaller model and less text
    for name in ("_ERROR", "_COVERAGE"):
        quick = dataclasses.replace(getattr(demo, name), reduction=0.5, predictor_bits=1, probe_tokens=256)
        monkeypatch.setattr(demo, name, quick)
    monkeypatch.setattr(demo, "_TOKENS", 2_048)
    monkeypatch.setattr(demo, "_EVALUATION", 3_000)
    result = tardis("demo", "-o", tmp_path)
    assert result.code == 0
    for part in ("dense", "coverage, no refit", "error, refit", "±", "resident", "next:"):
        assert part in result.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "fold.png", "folded"]
    assert holds_fold(tmp_path / "folded")
    figures = json.loads((tmp_path / "demo.json").read_text())
    dense, paper, ours = figures["compared"]
    assert dense["ratio"] == 1
    assert dense["ffn"] is None
    for row in (paper, ours):
        assert row["ffn"]["reduction"] == pytest.approx(0.5, abs=0.02)
        assert row["perplexity"]["value"] == pytest.approx(dense["perplexity"]["value"] * row["ratio"])
    assert figures["texts"].keys() == {"dense", "folded"}
    assert tardis("demo", "-o", tmp_path, "--json").code == 0  # over its own files


def interrupt_after(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when `layers` layers are folded."""
    whole, done = pipeline._fold_layer, []

    def partial(*args: object) -> object:
        if len(done) == layers:
            raise KeyboardInterrupt
        done.append(1)
        return whole(*args)

    monkeypatch.setattr(pipeline, "_fold_layer", partial)


def test_an_interrupted_fold_resumes_to_the_same_bytes(
    fold: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert fold(out=tmp_path / "whole").code == 0
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        result = fold()
    assert result.code == 130
    assert "run the same command with --resume" in result.err
    assert_refused(fold(), "holds an unfinished fold. Go on with --resume")
    assert_refused(fold("--resume", "--seed", 1, "--reduction", "0.4"), "config.reduction was 0.5 and is now 0.4")
    assert fold("--resume").code == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_resuming_where_nothing_is_there_starts_and_says_so(fold: Callable[..., Result]):
    result = fold("--resume")
    assert result.code == 0
    assert "nothing to resume" in result.err


def test_a_fold_that_ruins_the_model_is_not_written_unless_forced(
    fold: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(self_check, "LARGEST_RATIO", 0.5)  # as if it had doubled
    result = fold("--json")
    assert result.code == 2
    assert "the self-check failed, so nothing was written" in result.err
    assert "--resume --force" in result.err
    figures = json.loads(result.out)
    assert figures["output"] is None
    assert not figures["self_check"]["passed"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FOLDER]
    forced = fold("--resume", "--force")
    assert forced.code == 0
    assert "written all the same because of --force" in forced.err
    assert holds_fold(tmp_path / "out")


@pytest.mark.parametrize("error", [0.4, 1.0, 2.6, float("nan")])
def test_a_layer_that_is_worse_than_its_mean_output_is_warned_of(capsys: pytest.CaptureFixture[str], error: float):
    sound = LayerReport("model.layers.0.mlp", 2, 0.1, 0.2, 0.3, None, None, 400, 80.0, 450)
    other = dataclasses.replace(sound, prefix="model.layers.1.mlp", error=error)
    show.print_fold(FoldReport([sound, other]), "Folded layers")
    err = capsys.readouterr().err
    assert ("model.layers.1.mlp has an error of" in err) == (error != 0.4)
    assert "model.layers.0.mlp" not in err
