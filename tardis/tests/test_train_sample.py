"""The training recipe learns, goes on where it was killed, and refuses what cannot work."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from marks import mostly_long
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer import Typer
from typer.testing import CliRunner

import train_sample
from tardis_llm import sample
from training.optimisers import rate_factor, split_parameters
from training.recipe import Activation, Recipe, RecipeError, Schedule
from training.run import Job, run

TINY = {
    "layers": 2,
    "width": 32,
    "heads": 2,
    "vocab": 300,
    "context": 32,
    "batch": 4,
    "steps": 12,
    "warmup": 0.2,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that share a busy core spend the time of such small operations waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sample.calibration_text().read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("activation", mostly_long(Activation, [Activation("swiglu")]))
def test_loss_decreases_and_result_loads_as_a_hugging_face_model(
    activation: Activation, text: Path, tmp_path: Path
) -> None:
    losses: list[float] = []
    output = tmp_path / "model"
    record = run(
        Recipe(**TINY | {"activation": activation, "steps": 30}),
        Job((text,), output, held_out=text),
        on_step=lambda step, loss: losses.append(loss.item()),
    )
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.5
    assert record["held_out_perplexity"] < len(AutoTokenizer.from_pretrained(output)) / 2
    assert json.loads((output / "training.json").read_text()) == record
    assert not (output / "unfinished-run").exists()
    model = AutoModelForCausalLM.from_pretrained(output)
    hidden = {"gelu": "gelu_pytorch_tanh", "relu": "relu", "swiglu": "silu"}[activation]
    assert hidden in (
        getattr(model.config, "activation_function", None),
        getattr(model.config, "hidden_act", None),
    )


@pytest.mark.parametrize("activation", mostly_long(Activation, [Activation("gelu")]))
def test_killed_and_resumed_run_gives_the_weights_of_an_uninterrupted_one(
    activation: Activation, text: Path, tmp_path: Path
) -> None:
    recipe = Recipe(**TINY | {"activation": activation})
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(recipe, Job((text,), straight))

    def kill(step: int, loss: torch.Tensor) -> None:
        if step == 7:  # two steps past the checkpoint: they are lost and must be taken again
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, Job((text,), broken, checkpoint_every=5), on_step=kill)
    steps: list[int] = []
    run(recipe, Job((text,), broken, resume=True), on_step=lambda step, loss: steps.append(step))

    assert steps == list(range(6, 13))
    expected, found = weights(straight), weights(broken)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_given_tokenizer_is_used_and_kept(text: Path, tmp_path: Path) -> None:
    run(
        Recipe(**TINY | {"steps": 2}),
        Job((text,), tmp_path / "model", tokenizer=sample.model_dir()),
    )
    kept = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert kept.get_vocab() == AutoTokenizer.from_pretrained(sample.model_dir()).get_vocab()
    assert weights(tmp_path / "model")["transformer.wte.weight"].shape[0] == len(kept)


def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else() -> None:
    model = AutoModelForCausalLM.from_pretrained(sample.model_dir())
    matrices, others = split_parameters(model)
    layers = model.config.n_layer
    assert len(matrices) == 4 * layers  # attention in and out, FFN up and down
    assert len(matrices) + len(others) == len(list(model.parameters()))
    assert any(parameter is model.lm_head.weight for parameter in others)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_learning_rate_rises_to_its_peak_and_falls_almost_to_zero(schedule: Schedule) -> None:
    recipe = Recipe(steps=1000, warmup=0.05, schedule=schedule)
    factors = [rate_factor(step, recipe) for step in range(recipe.steps)]
    assert factors[:51] == sorted(factors[:51])
    assert factors[50:] == sorted(factors[50:], reverse=True)
    assert max(factors) == factors[50] == 1
    assert 0 < factors[-1] < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "width 32 must be a multiple"),
        ({"vocab": 256}, "must exceed 256"),
        ({"layers": 0}, "layers must be positive"),
        ({"warmup": 50}, "a share of the steps"),
    ],
)
def test_recipe_that_cannot_be_says_why(change: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**TINY | change)


def test_too_short_text_says_how_much_is_needed_and_leaves_the_output_free(text: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A short text.\n" * 10)
    with pytest.raises(RecipeError, match="a batch needs 160"):
        run(Recipe(**TINY), Job((tmp_path / "short.txt",), tmp_path / "model"))
    run(Recipe(**TINY), Job((text,), tmp_path / "model"))


def test_folder_of_somebody_else_is_left_alone(text: Path, tmp_path: Path) -> None:
    note = tmp_path / "model" / "unfinished-run" / "note.txt"
    note.parent.mkdir(parents=True)
    note.write_text("mine")
    with pytest.raises(RecipeError, match="not made by a training run"):
        run(Recipe(**TINY), Job((text,), tmp_path / "model"))
    assert note.read_text() == "mine"


def test_unfinished_run_is_neither_overwritten_nor_continued_with_another_recipe_or_text(
    text: Path, tmp_path: Path
) -> None:
    def kill(step: int, loss: torch.Tensor) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        run(Recipe(**TINY), Job((text,), output, checkpoint_every=1), on_step=kill)
    with pytest.raises(RecipeError, match="add --resume"):
        run(Recipe(**TINY), Job((text,), output))
    with pytest.raises(RecipeError, match="steps was 12, is 13"):
        run(Recipe(**TINY | {"steps": 13}), Job((text,), output, resume=True))
    text.write_text(text.read_text(encoding="utf-8") + "more", encoding="utf-8")
    with pytest.raises(RecipeError, match="other texts"):
        run(Recipe(**TINY), Job((text,), output, resume=True))


def test_divergence_ends_the_run_and_spares_the_last_checkpoint(text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="lower --learning-rate"):
        run(Recipe(**TINY | {"learning_rate": 1e30}), Job((text,), tmp_path / "model", checkpoint_every=1))


def test_command_line_trains_refuses_to_overwrite_and_reports_errors_without_a_traceback(
    text: Path, tmp_path: Path
) -> None:
    app = Typer()
    app.command()(train_sample.main)
    options = [f"--{name}={value}" for name, value in TINY.items()]
    command = [str(text), "--output", str(tmp_path / "model"), "--held-out", str(text), *options]

    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "perplexity of the held-out text" in first.output
    second = CliRunner().invoke(app, command)
    assert second.exit_code == 2
    assert "finished model" in second.output
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xfa" * 100)
    third = CliRunner().invoke(app, [str(binary), "--output", str(tmp_path / "other"), *options])
    assert third.exit_code == 2
    assert "not UTF-8" in third.output
