"""What the commands share: consoles, progress bars, tables, JSON, and what a person needs to read about an error."""

from __future__ import annotations

import errno
import json
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from huggingface_hub.utils import logging as hub_logging
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from safetensors import SafetensorError

from ..evaluation.perplexity import Perplexity
from ..report import FoldReport, Progress

#: results go to stdout; progress, messages and errors to stderr, so that --json stays clean
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_SPEED_SECONDS = 3600.0  # the time left is estimated from steps this far back: a layer of a large model takes long


def quiet() -> None:
    """Keep transformers' and the hub's own bars and warnings off the screen."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


@contextmanager
def progress_bars(prefix: str = "") -> Iterator[Progress]:
    """A callback that draws one bar per stage on stderr, with the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=err, speed_estimate_period=_SPEED_SECONDS) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"{prefix}{stage}", total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def say(text: str) -> None:
    """A message for people, on stderr."""
    err.print(text)


def fail(text: str) -> None:
    """An error message, in red on stderr."""
    err.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)


def warn(text: str) -> None:
    """A warning, in yellow on stderr."""
    err.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Stands in for `warnings.showwarning`, without the line of code that warned."""
    warn(str(message))


def print_json(values: dict[str, Any]) -> None:
    """One JSON object on stdout; numbers that JSON does not have (NaN, infinities) become null."""
    sys.stdout.write(json.dumps(plain(values), indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """The values with what JSON does not have, NaN and infinities, replaced by None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def explain(error: BaseException) -> str | None:
    """What a person needs to read about an error of the operating system; None if it is none."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (isinstance(error, OSError | SafetensorError) and "No space left on device" in str(error)):
        return (
            f"the disk is full ({error}). Free space and run again: `tardis fold` with --resume goes on behind the "
            "last finished layer, `tardis compare` behind the last finished method."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}. Check the path and its permissions."
    return None


class Clock:
    """Seconds since it was made, and the most memory that the process has had."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds elapsed."""
        return time.perf_counter() - self._start

    @property
    def peak_memory(self) -> int:
        """Most bytes that the process has had in memory since it started."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB

    def as_dict(self) -> dict[str, Any]:
        """Seconds and peak memory as plain values."""
        return {"seconds": round(self.seconds, 2), "peak_memory_bytes": self.peak_memory}

    def sentence(self) -> str:
        """Seconds and peak memory for people."""
        return f"{self.seconds:.1f} s, peak memory {size(self.peak_memory)}"


def table(title: str, *columns: str) -> Table:
    """A table whose columns, but for the first, are numbers."""
    made = Table(
        title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return made


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table of such columns and rows; see `table`."""
    made = table(title, *columns)
    for row in rows:
        made.add_row(*row)
    out.print(made)


def print_fold(report: FoldReport, title: str) -> None:
    """Print the figures of every layer of a fold and of all together, and what they mean; warn of useless layers."""
    kept = ["kept"] if report.kept else []
    made = table(title, "FFN", "bits", *kept, "fixed", "error", "linearity", "touched", "resident")
    for layer in report.layers:
        exact = [f"{layer.kept:.2%}"] * len(kept) + [f"{layer.fix_rate:.2%}"]
        figures = str(layer.bits), *exact, f"{layer.error:.4f}", f"{layer.linearity:.4f}"
        shares = f"{layer.touched / layer.dense:.2%}", f"{layer.resident / layer.dense:.1%}"
        made.add_row(layer.prefix, *figures, *shares, end_section=layer is report.layers[-1])
    shares = f"{report.touched / report.dense:.2%}", f"{report.resident / report.dense:.1%}"
    exact = [f"{report.kept:.2%}"] * len(kept) + [f"{report.fix_rate:.2%}"]
    made.add_row("all", "", *exact, "", "", *shares, style="bold")
    out.print(made)
    out.print(
        "[dim]kept: share of neurons computed for every token; fixed: of the others, share corrected per token. error: "
        "squared error of the FFN output over its variance; linearity: of the best affine map without fixing. "
        "touched: FFN bytes read per token at batch 1, everything counted. resident: FFN bytes kept in memory, "
        "fallback weights included. Shares are of the dense FFN bytes.[/]"
    )
    out.print(
        f"FFN bytes: dense {size(report.dense)}, touched per token {size(report.touched)} "
        f"(reduction {report.reduction:.2%}), resident {size(report.resident)} "
        f"({report.resident / report.dense:.1%} of dense); {report.exact}"
    )
    if linears := report.linears:
        stay = f", of which {size(linears.shared)} stay as the embedding" if linears.shared else ""
        stored = f"{linears.layers} linear layers outside the FFNs in int{linears.bits}: {size(linears.stored)}"
        out.print(f"{stored}, before {size(linears.dense)}{stay}")
    for layer in report.worse_than_mean:
        warn(
            f"{layer.prefix} has an error of {layer.error:.2f}, and its mean output alone would have 1. Leave it dense "
            "with --layers, lower --reduction, or give more --text."
        )


def perplexity(value: Perplexity) -> str:
    """A perplexity with its standard error."""
    return f"{value.value:.2f} ± {value.standard_error:.2f}"


def size(count: float) -> str:
    """A number of bytes in a readable unit.

    Example:
        >>> size(3 * 2**20)
        '3.00 MiB'
    """
    power = sum(abs(count) >= 1024**power for power in (1, 2, 3))
    return f"{count / 1024**power:,.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
