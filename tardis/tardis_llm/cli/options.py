"""Arguments and options that several commands have, and options that are made from the fields of settings.

A command with a parameter whose type is a dataclass gets one option per field, with the field's default; its help is
what the docstring of the dataclass says of the field. So each setting is described in one place.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import torch
import typer
from rich.markup import escape

from ..calibration.documents import Documents, read_documents
from ..errors import InvalidInputError
from ..runtime.prefill import Prefill
from . import output as show

Precision = Literal["bf16", "int8", "int4"]
_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_BITS = {"int8": 8, "int4": 4}  # bf16 is the model's own dtype, see `check_precision`
Number = TypeVar("Number", int, float)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Directory, GGUF file or hub name of a model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Dtype = Annotated[
    str | None, typer.Option(help="Load the model in float32, bfloat16 or float16; default: as in the checkpoint.")
]
Device = Annotated[
    str,
    typer.Option(
        help="What to compute on: cpu, cuda, cuda:1 and so on, or auto for the GPU that torch finds and the CPU "
        "without one. The model must fit there."
    ),
]
_SOURCES = "Text in UTF-8; records in .jsonl, .json, .csv, .tsv or .parquet; or a dataset as name:config:split:column."
Texts = Annotated[list[str] | None, typer.Option("--text", help=f"{_SOURCES} Repeatable.")]
Audio = Annotated[
    list[str] | None,
    typer.Option(
        "--audio",
        help="For models of speech, instead of --text: speech as .wav, or as log-mel features in .npy or .pt; other "
        "formats with the package soundfile. Repeatable.",
    ),
]
TextFile = Annotated[str | None, typer.Option("--text", help=_SOURCES)]
TextField = Annotated[str | None, typer.Option(help="Field of the records that holds their text; default: text.")]
Window = Annotated[
    int | None, typer.Option(help="Tokens per window; default: the most that model and tokenizer allow, up to 1024.")
]
TaskData = Annotated[
    Path | None, typer.Option(help="Folder with the tasks' files; default: download them from the hub.")
]
PromptsThrough = Annotated[
    Prefill,
    typer.Option(
        "--prefill",
        help="Where a folded model sends prompts: through its folds (folded), its dense FFNs or what stands for them "
        "in few bits (exact), or by what is faster for so many tokens (auto).",
    ),
]


def read_texts(sources: Sequence[str], field: str | None) -> list[Documents]:
    """The documents of files and datasets; says what they are. Errors as `read_documents`."""
    documents = [read_documents(source, field) for source in sources]
    show.say(f"text: {escape('; '.join(each.sentence() for each in documents))}")
    return documents


def numbers(flag: str, text: str, kind: type[Number], example: str) -> tuple[Number, ...]:
    """The numbers in text such as "0,1,5".

    Args:
        flag: option that the text was given with, for the error.
        text: numbers with commas between them.
        kind: int or float.
        example: numbers of the kind wanted, for the error.

    Raises:
        InvalidInputError: the text is something else.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidInputError(f"{flag} is {text!r}; give numbers such as {example}.") from error


#: options that are written in another way than the field of their settings: flag, type, and what reads its value
_SPELLINGS: dict[str, tuple[str, Any, Callable[[Any], Any]]] = {
    "fold_bits": ("--fold-dtype", Precision | None, _BITS.get),
    "fallback_bits": ("--fallback", Precision | None, _BITS.get),
    "linear_bits": ("--linears", Precision | None, _BITS.get),
    "layers": ("--layers", str | None, lambda text: text and numbers("--layers", text, int, "0,1,5")),
    "batch_sizes": ("--batch", str, lambda text: numbers("--batch", text, int, "1,8")),
    "memory_limit_gib": ("--memory-limit", float, float),
    "compiled": ("--compile", bool, bool),
}


def from_settings(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters of dataclass types are replaced by one option per field.

    Fields with `{"option": False}` as their metadata keep their defaults; `{"min": n}` is the least value.
    """
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    settings: dict[str, Any] = {each.name: each.annotation for each in parameters if is_dataclass(each.annotation)}
    shown: list[inspect.Parameter] = []
    for parameter in parameters:
        made = _options(settings[parameter.name]) if parameter.name in settings else [parameter]
        shown += [each.replace(kind=_KEYWORD) for each in made]

    @wraps(command)
    def run(**given: Any) -> None:
        made = {name: _settings(kind, given) for name, kind in settings.items()}
        command(**given, **made)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return run


def attribute_docs(kind: type) -> dict[str, str]:
    """What the docstring of a class says of each attribute under `Attributes:`, each on one line."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.+(?:\n {5,}.+)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _fields(kind: Any) -> list[Field[Any]]:
    return [each for each in fields(kind) if each.metadata.get("option", True)]


def _options(kind: type) -> Iterator[inspect.Parameter]:
    docs, types = attribute_docs(kind), get_type_hints(kind)
    for each in _fields(kind):
        flag, type_, _ = _SPELLINGS.get(each.name, (None, types[each.name], None))
        help = docs[each.name][:1].upper() + docs[each.name][1:]
        option = typer.Option(*filter(None, [flag]), help=help, min=each.metadata.get("min"))
        default = ",".join(map(str, each.default)) if isinstance(each.default, tuple) else each.default
        yield inspect.Parameter(each.name, _KEYWORD, default=default, annotation=Annotated[type_, option])


def _settings(kind: type, given: dict[str, Any]) -> Any:
    """An object of `kind` made of the options for it, which are taken out of `given`."""
    values = {each.name: given.pop(each.name) for each in _fields(kind)}
    return kind(**{name: _SPELLINGS[name][2](it) if name in _SPELLINGS else it for name, it in values.items()})


def check_precision(context: typer.Context, dtype: torch.dtype) -> None:
    """Raise InvalidInputError where an option asks for bf16 and the model's dtype is another."""
    if "bf16" in context.params.values() and dtype != torch.bfloat16:
        raise InvalidInputError(
            f"parts in bf16 are asked for, but the model is in {str(dtype).removeprefix('torch.')}; add --dtype "
            "bfloat16."
        )
