"""Train a small language model from text: the recipe behind the sample models.

    python benchmarks/train_sample.py corpus.txt --held-out other.txt --output my-model --steps 2000

Trains a byte-level BPE tokenizer (or takes one with `--tokenizer`), then a GPT-2 with GELU or ReLU or a Llama
with SwiGLU. Interrupted, it goes on with `--resume` as if nothing had happened: on one CPU, with the same
number of threads, the weights come out the same to the last bit.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.recipe import Activation, Recipe, RecipeError, Schedule
from training.run import Job, OnStep, default_device, run

LOSS_EVERY = 10  # steps; oftener, and a GPU waits for the progress bar


def main(
    text: Annotated[list[Path], typer.Argument(help="UTF-8 texts.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option(help="Directory to make.", file_okay=False)],
    held_out: Annotated[
        Path | None, typer.Option(help="Text to report perplexity on.", exists=True, dir_okay=False)
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of a tokenizer to use.", exists=True, file_okay=False)
    ] = None,
    activation: Annotated[Activation, typer.Option(help="swiglu makes a Llama.")] = Recipe.activation,
    layers: Annotated[int, typer.Option()] = Recipe.layers,
    width: Annotated[int, typer.Option()] = Recipe.width,
    ffn_width: Annotated[int | None, typer.Option(help="Default: 4 x width; swiglu 8/3 x width.")] = None,
    heads: Annotated[int, typer.Option()] = Recipe.heads,
    vocab: Annotated[int, typer.Option(help="Tokens, if a tokenizer is trained.")] = Recipe.vocab,
    context: Annotated[int, typer.Option(help="Tokens per window.")] = Recipe.context,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = Recipe.batch,
    steps: Annotated[int, typer.Option()] = Recipe.steps,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = Recipe.warmup,
    schedule: Annotated[Schedule, typer.Option()] = Recipe.schedule,
    learning_rate: Annotated[float, typer.Option()] = Recipe.learning_rate,
    weight_decay: Annotated[float, typer.Option(help="Of the matrices.")] = Recipe.weight_decay,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = Recipe.clip,
    seed: Annotated[int, typer.Option(min=0)] = Recipe.seed,
    checkpoint_every: Annotated[int, typer.Option(help="Steps.", min=1)] = Job.checkpoint_every,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
) -> None:
    """Train a small language model from text."""
    console = Console(highlight=False)
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32 on a GPU
    try:
        recipe = Recipe(
            activation=activation,
            layers=layers,
            width=width,
            ffn_width=ffn_width,
            heads=heads,
            vocab=vocab,
            context=context,
            batch=batch,
            steps=steps,
            warmup=warmup,
            schedule=schedule,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            clip=clip,
            seed=seed,
        )
        job = Job(tuple(text), output, tokenizer, held_out, checkpoint_every, resume)
        console.print(f"{activation} model to {output}, on {default_device()}; reading the text first")
        with progress_bar(console) as progress:
            record = run(recipe, job, reporter(progress, recipe))
    except RecipeError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(summary(record))


def progress_bar(console: Console) -> Progress:
    """Steps, speed and loss."""
    fields = TextColumn("{task.fields[speed]:,.0f} tokens/s  loss {task.fields[loss]:.3f}")
    return Progress(BarColumn(), MofNCompleteColumn(), fields, TimeRemainingColumn(), console=console)


def reporter(progress: Progress, recipe: Recipe) -> OnStep:
    """A callback of the run that moves the progress bar, which appears with the first step."""
    task = progress.add_task("", total=recipe.steps, visible=False, speed=0.0, loss=float("nan"))
    first: list[tuple[int, float]] = []  # step and time at which the clock began; a resumed run begins late

    def on_step(step: int, loss: torch.Tensor) -> None:
        if not first:
            first.append((step, time.perf_counter()))
        elif step % LOSS_EVERY == 0 or step == recipe.steps:
            begun, since = first[0]
            speed = (step - begun) * recipe.batch * recipe.context / (time.perf_counter() - since)
            progress.update(task, completed=step, visible=True, speed=speed, loss=loss.item())

    return on_step


def summary(record: dict[str, Any]) -> str:
    """The run in a line."""
    line = f"{record['parameters']:,} parameters, {record['trained_tokens']:,} tokens"
    if record["held_out_perplexity"] is None:
        return f"{line}; no --held-out text, so no perplexity"
    return f"{line}; perplexity of the held-out text {record['held_out_perplexity']:.2f}"


if __name__ == "__main__":
    typer.run(main)
