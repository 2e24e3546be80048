"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub name of a model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; as in the checkpoint without.", show_default=False)
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="Text file in UTF-8, or dataset as name:config:split:column. Repeatable."),
]
TextFile = Annotated[Path | None, typer.Option("--text", help="Text file in UTF-8.", show_default=False)]
