"""The command `tardis`: one verb per module; errors become one red line on stderr and exit code 1."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import torch
import typer
from safetensors import SafetensorError

from .. import __version__
from ..allocator import keep_freed_memory
from ..checkpoint.config_file import first_line
from ..errors import TardisError
from .bench import bench
from .compare import compare
from .demo import demo
from .eval import evaluate
from .fold import fold
from .generate import generate
from .inspect import inspect
from .output import explain, fail, quiet, show_warning
from .serve import serve

app = typer.Typer(
    name="tardis",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, fold, inspect, evaluate, compare, bench, generate):
    app.command("eval" if command is evaluate else None)(command)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"tardis {__version__}\n")
        raise typer.Exit


@app.callback()
def tardis(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Faster language models by constant folding of their feed-forward networks, with exact correction."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 error, 2 refused or wrong usage, 130, 143 or 129 interrupted."""
    keep_freed_memory()
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run the command line on `args`; returns the exit code."""
    quiet()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            app(args, prog_name="tardis")
    except SystemExit as done:
        return int(done.code or 0)
    except TardisError as error:
        fail(str(error))
    except torch.OutOfMemoryError as error:
        fail(f"the memory of the device is full ({first_line(error)}). Compute on the CPU, with --device cpu.")
    except (OSError, SafetensorError) as error:
        message = explain(error)
        if message is None:
            raise
        fail(message)
    return 1
