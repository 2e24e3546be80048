"""One training run: from nothing, or from its last checkpoint, to a saved Hugging Face directory.

While it runs, `OUTPUT/unfinished-run/` holds what is needed to go on: the recipe, the tokenizer, the tokens
and the last checkpoint. It is removed once the model is saved.
"""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from training.checkpoints import load_checkpoint, replacing, save_checkpoint
from training.corpus import (
    Batches,
    encode,
    fingerprint,
    read_tokens,
    train_tokenizer,
    write_tokens,
)
from training.models import build_model
from training.optimisers import build_optimisers, rate_factor, set_rate
from training.recipe import Recipe, RecipeError

# Called with the steps done and the loss of the last one; reading the loss waits for the device.
OnStep = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Job:
    """What to train on, and where to.

    Attributes:
        text: UTF-8 files, read in this order.
        output: the directory to make.
        tokenizer: a directory with a tokenizer to use; None trains one on `text`.
        held_out: a text to report perplexity on.
        checkpoint_every: steps between two checkpoints.
        resume: go on with what `output` holds, if it holds anything.
    """

    text: tuple[Path, ...]
    output: Path
    tokenizer: Path | None = None
    held_out: Path | None = None
    checkpoint_every: int = 200
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.text:
            raise RecipeError("there is no text to train on")
        if self.tokenizer is not None and not (self.tokenizer / "tokenizer.json").exists():
            raise RecipeError(f"{self.tokenizer} holds no tokenizer.json: name the directory of a model")

    @property
    def inputs(self) -> list[Path]:
        """The files that decide, with the recipe, which model comes out."""
        return [*self.text] if self.tokenizer is None else [*self.text, self.tokenizer / "tokenizer.json"]

    @property
    def folder(self) -> Path:
        """Where the state of an unfinished run lives."""
        return self.output / "unfinished-run"

    @property
    def checkpoint(self) -> Path:
        """The state after the last checkpointed step; without it there is nothing to go on with."""
        return self.folder / "checkpoint.pt"


def run(recipe: Recipe, job: Job, on_step: OnStep = lambda step, loss: None) -> dict[str, Any]:
    """Train, save to `job.output`, and return what `training.json` there records.

    Raises:
        RecipeError: a text is too short or not UTF-8, `output` is taken, the loss diverges, or a run is to be
            resumed with another recipe or other files than it began with.
    """
    claim_output(recipe, job)
    tokenizer = prepare_tokenizer(recipe, job)
    held_out = held_out_windows(recipe, job, tokenizer)
    batches = Batches(prepare_tokens(job, tokenizer), recipe)
    model = build_model(recipe, tokenizer).to(default_device())

    train(model, batches, recipe, job, on_step)

    record = {
        "recipe": asdict(recipe),
        "text": [path.name for path in job.text],
        "corpus_tokens": len(batches.tokens),
        "trained_tokens": recipe.steps * recipe.batch * recipe.context,
        "parameters": model.num_parameters(),
        "held_out_perplexity": None if held_out is None else perplexity(model, held_out, recipe.batch),
    }
    save(model, tokenizer, record, job)
    return record


def claim_output(recipe: Recipe, job: Job) -> None:
    """Begin a run in `job.output`; if one with a checkpoint is there, make sure that it is this one."""
    if not job.checkpoint.exists():
        begin(recipe, job)
        return
    if not job.resume:
        raise RecipeError(f"{job.output} holds an unfinished run: add --resume, or choose another --output")
    begun = json.loads((job.folder / "run.json").read_text())
    if changes := recipe.changes(begun["recipe"]):
        raise RecipeError(f"{job.output} was begun with another recipe: {'; '.join(changes)}")
    if begun["inputs"] != fingerprint(job.inputs):
        raise RecipeError(f"{job.output} was begun with other texts or another tokenizer: pass the same")


def begin(recipe: Recipe, job: Job) -> None:
    """Note down what is about to be trained; an attempt without a checkpoint gives way."""
    record = job.folder / "run.json"
    if (job.output / "config.json").exists():
        raise RecipeError(f"{job.output} holds a finished model: choose another --output")
    if job.folder.exists() and not record.exists():
        raise RecipeError(f"{job.folder} was not made by a training run: choose another --output")
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    record.write_text(json.dumps({"recipe": asdict(recipe), "inputs": fingerprint(job.inputs)}))


def prepare_tokenizer(recipe: Recipe, job: Job) -> PreTrainedTokenizerBase:
    """The run's tokenizer: copied or trained when the run begins, read when it goes on."""
    folder = job.folder / "tokenizer"
    if not folder.exists():
        if job.tokenizer is not None:
            tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
        else:
            tokenizer = train_tokenizer(job.text, recipe.vocab, recipe.context)
        with replacing(folder) as draft:
            tokenizer.save_pretrained(draft)
    return AutoTokenizer.from_pretrained(folder)


def prepare_tokens(job: Job, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The tokens of all texts, encoded once."""
    path = job.folder / "tokens.bin"
    if not path.exists():
        write_tokens(tokenizer, job.text, path)
    return read_tokens(tokenizer, path)


def train(model: PreTrainedModel, batches: Batches, recipe: Recipe, job: Job, on_step: OnStep) -> None:
    """Take the steps that the last checkpoint leaves to take."""
    optimisers = build_optimisers(model, recipe)
    done = restore(load_checkpoint(job.checkpoint), model, optimisers)
    for step in range(done, recipe.steps):
        set_rate(optimisers, recipe.learning_rate * rate_factor(step, recipe))
        loss = train_step(model, optimisers, batches[step], recipe.clip)
        if (step + 1) % job.checkpoint_every == 0 or step + 1 == recipe.steps:
            checkpoint(job.checkpoint, step + 1, loss, model, optimisers)
        on_step(step + 1, loss)


def train_step(
    model: PreTrainedModel, optimisers: list[torch.optim.Optimizer], batch: torch.Tensor, clip: float
) -> torch.Tensor:
    """One step of both optimisers on one batch; returns the loss before it, still on the device."""
    batch = batch.to(model.device)  # [batch, context]
    loss = next_token_loss(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    return loss.detach()


def next_token_loss(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of all tokens but the first of each window, which is context only."""
    with mixed_precision(model.device):
        logits = model(windows, use_cache=False).logits[:, :-1]  # [batch, context - 1, vocab]
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def checkpoint(
    path: Path, step: int, loss: torch.Tensor, model: PreTrainedModel, optimisers: list[torch.optim.Optimizer]
) -> None:
    """Save all that the next step depends on, unless the run has diverged and is not worth going on with."""
    if not math.isfinite(loss.item()):
        raise RecipeError(
            f"the loss is {loss.item()} at step {step}: choose another --output and a lower --learning-rate"
        )
    state = {"step": step, "model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers]}
    save_checkpoint(path, state)


def restore(state: dict[str, Any] | None, model: PreTrainedModel, optimisers: list[torch.optim.Optimizer]) -> int:
    """Put a checkpoint back where it came from; return the number of steps that it has behind it."""
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    step: int = state["step"]
    return step


def held_out_windows(recipe: Recipe, job: Job, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """The held-out text as `[windows, context]`, its tail dropped; made early, to fail before training."""
    if job.held_out is None:
        return None
    tokens = torch.tensor([token for block in encode(tokenizer, job.held_out) for token in block])
    count = len(tokens) // recipe.context
    if count < 1:
        raise RecipeError(f"{job.held_out} is too short: {len(tokens)} tokens, a window has {recipe.context}")
    return tokens[: count * recipe.context].view(count, recipe.context)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: torch.Tensor, batch: int) -> float:
    """Token perplexity over windows `[windows, context]` without overlap."""
    model.eval()
    pieces = windows.to(model.device).split(batch)
    total = sum(next_token_loss(model, piece).item() * len(piece) for piece in pieces)
    return math.exp(total / len(windows))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], job: Job) -> None:
    """Write the finished model, then drop the state of the run."""
    model.save_pretrained(job.output)
    tokenizer.save_pretrained(job.output)
    (job.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    job.checkpoint.unlink()  # first: a folder half removed must not look like a run to resume
    shutil.rmtree(job.folder)


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed_precision(device: torch.device) -> AbstractContextManager[None]:
    """bf16 arithmetic on a GPU; fp32 on a CPU, where bf16 is often emulated. Weights are fp32 on both."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
