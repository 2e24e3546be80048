"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub name of a model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; as in the checkpoint without.", show_default=False)
]
_SOURCES = "Text in UTF-8; records in .jsonl, .json, .csv, .tsv or .parquet; or a dataset as name:config:split:column."
Texts = Annotated[list[str] | None, typer.Option("--text", help=f"{_SOURCES} Repeatable.", show_default=False)]
TextFile = Annotated[str | None, typer.Option("--text", help=_SOURCES, show_default=False)]
TextField = Annotated[
    str | None, typer.Option(help="Field of the records that holds their text; 'text' without.", show_default=False)
]
