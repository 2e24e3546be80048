"""`tardis generate`: go on from a prompt, tokens shown as they come; or write down what a model of speech hears."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.markup import escape
from transformers import PreTrainedModel, TextStreamer

from ..calibration.audio import read_audio
from ..checkpoint.config_file import load_config
from ..checkpoint.loading import dtype_name, load_extractor, load_model, load_tokenizer
from ..config import check_seed
from ..devices import device_named
from ..errors import InvalidInputError
from ..evaluation.generation import generate as generate_text
from ..evaluation.generation import prompt_ids, room, transcript
from ..families.table import family_of
from ..runtime.decoding import prepare_decoding
from ..runtime.prefill import Prefill, set_prefill
from . import output as show
from .options import AsJson, Device, Dtype, ModelName, PromptsThrough


def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help="Text to go on from, or a file of speech to write down.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Randomness of the choice; 0 takes the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the random choice.")] = 0,
    prefill: PromptsThrough = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Run each token as one compiled graph: faster, but starts later.")
    ] = False,
    dtype: Dtype = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Generate text with a dense or folded model.

    A model of speech writes down what it hears in a file, greedily and whole.
    """
    if not prompt.strip():
        raise InvalidInputError("the prompt is empty; give some words to go on from.")
    check_seed(seed)
    place = device_named(device)
    if family_of(load_config(model)).speech:
        _refuse_choices(temperature, compile)
        _write_down(model, prompt, prefill, dtype, place, as_json)
        return
    tokenizer = load_tokenizer(model)
    loaded = _ready(model, dtype, place, prefill)
    ids = prompt_ids(loaded, tokenizer, prompt)
    space = room(loaded, tokenizer, ids)
    if space is not None and space < max_new_tokens:
        show.warn(f"only {space} tokens fit behind this prompt; the model takes {space + ids.shape[1]} in all.")
    streamer = None
    if not as_json:
        show.out.print(f"[bold]{escape(prompt)}[/]", end="")
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = generate_text(loaded, tokenizer, ids, max_new_tokens, temperature, seed, streamer, compile)
    if as_json:
        settings = {"temperature": temperature, "seed": seed}
        show.print_json({"model": model, "dtype": dtype_name(loaded), "prompt": prompt, "text": text, **settings})


def _ready(model: str, dtype: str | None, device: torch.device, prefill: Prefill) -> PreTrainedModel:
    """A model on a device, ready to generate: on the CPU its weights are laid out for that."""
    loaded = load_model(model, dtype)
    if device.type == "cpu":
        prepare_decoding(loaded)
    set_prefill(loaded, prefill)
    return loaded.to(device)


def _refuse_choices(temperature: float, compile: bool) -> None:
    """Raise InvalidInputError for options that go with text alone."""
    if temperature or compile:
        raise InvalidInputError("speech is written down greedily and not compiled; leave out --temperature, --compile.")


def _write_down(
    model: str, path: str, prefill: Prefill, dtype: str | None, device: torch.device, as_json: bool
) -> None:
    """Print what a model of speech hears in a file."""
    tokenizer, extractor = load_tokenizer(model), load_extractor(model)
    loaded = _ready(model, dtype, device, prefill)
    features = read_audio([path], loaded, extractor)
    text = transcript(loaded, tokenizer, features)
    if as_json:
        show.print_json({"model": model, "dtype": dtype_name(loaded), "audio": path, "text": text})
    else:
        show.out.print(escape(text))
