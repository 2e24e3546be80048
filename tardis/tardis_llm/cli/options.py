"""Arguments and options that several commands have, and options that are made from the fields of settings.

A command with a parameter whose type is a dataclass gets one option per field, with the field's default; its help is
what the docstring of the dataclass says of the field. So each setting is described in one place.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_type_hints

import torch
import typer
from rich.markup import escape

from ..calibration.documents import Documents, read_documents
from ..errors import InvalidInputError
from ..runtime.prefill import Prefill
from . import output as show

Precision = Literal["bf16", "int8", "int4"]
_BITS = {"int8": 8, "int4": 4}  # bf16 is the model's own dtype, see `check_precision`
Number = TypeVar("Number", int, float)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub name of a model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Dtype = Annotated[
    str | None, typer.Option(help="Load the model in float32, bfloat16 or float16; default: as in the checkpoint.")
]
_SOURCES = "Text in UTF-8; records in .jsonl, .json, .csv, .tsv or .parquet; or a dataset as name:config:split:column."
Texts = Annotated[list[str] | None, typer.Option("--text", help=f"{_SOURCES} Repeatable.")]
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
        help="Where a folded model sends prompts: through its folds (folded), its dense FFNs (exact), or by what is "
        "faster for so many tokens (auto).",
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
        example: of such a text, for the error.

    Raises:
        InvalidInputError: the text is something else.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidInputError(f"{flag} is {text!r}; give numbers such as {example}.") from error


class _Spelling(NamedTuple):
    """How an option is written that differs from the field of its settings.

    Attributes:
        flag: name of the option.
        type: type of the option.
        read: makes a value of the field out of one of the option.
        write: makes the default of the option out of the field's.
    """

    flag: str
    type: Any
    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


def _precision(flag: str) -> _Spelling:
    return _Spelling(flag, Precision | None, _BITS.get, lambda bits: bits)


def _integers(flag: str, example: str) -> _Spelling:
    def read(text: str | None) -> tuple[int, ...] | None:
        return None if text is None else numbers(flag, text, int, example)

    return _Spelling(flag, str | None, read, lambda given: given and ",".join(map(str, given)))


#: by the name of the field
_SPELLINGS = {
    "fold_bits": _precision("--fold-dtype"),
    "fallback_bits": _precision("--fallback"),
    "linear_bits": _precision("--linears"),
    "layers": _integers("--layers", "0,1,5"),
    "batch_sizes": _integers("--batch", "1,8"),
    "memory_limit_gib": _Spelling("--memory-limit", float, float, float),
    "compiled": _Spelling("--compile", bool, bool, bool),
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
        shown += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in made]

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
        help = docs[each.name][:1].upper() + docs[each.name][1:]
        option = partial(typer.Option, help=help, min=each.metadata.get("min"))
        spelling = _SPELLINGS.get(each.name)
        if spelling:
            annotation, default = Annotated[spelling.type, option(spelling.flag)], spelling.write(each.default)
        else:
            annotation, default = Annotated[types[each.name], option()], each.default
        yield inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _settings(kind: type, given: dict[str, Any]) -> Any:
    """An object of `kind` made of the options for it, which are taken out of `given`."""
    values = {each.name: given.pop(each.name) for each in _fields(kind)}
    return kind(**{name: _SPELLINGS[name].read(it) if name in _SPELLINGS else it for name, it in values.items()})


def check_precision(context: typer.Context, dtype: torch.dtype) -> None:
    """Raise InvalidInputError where an option asks for bf16 and the model's dtype is another."""
    if "bf16" in context.params.values() and dtype != torch.bfloat16:
        raise InvalidInputError(
            f"parts in bf16 are asked for, but the model is in {str(dtype).removeprefix('torch.')}; add --dtype "
            "bfloat16."
        )
