"""The shelves of the package stand in one order, and nothing on a lower one knows of a higher one."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from marks import long

import tardis_llm

#: from what an FFN is to the command line; modules and folders at the top of the package
SHELVES = (
    "errors", "devices", "allocator", "precision", "files", "ffn", "config", "report", "families", "calibration",
    "folding", "runtime", "checkpoint", "pipeline", "baselines", "integrations", "evaluation", "sample", "",
    "cli", "__main__",
)  # fmt: skip
#: what lies inside the runtime, whose backends know nothing of the modules that use them
RUNTIME = (
    "operators",
    "cpu",
    "triton",
    "reference",
    "backend",
    "slow",
    "kept",
    "stored",
    "matrices",
    "state",
    "modules",
    "placing",
    "prefill",
    "linears",
    "decoding",
    "stepping",
)
ROOT = Path(tardis_llm.__file__).parent
#: lm-eval loads these by their place, not as modules of the package
LOOSE = ROOT / "evaluation" / "harness_tasks"
MODULES = sorted(path for path in ROOT.rglob("*.py") if LOOSE not in path.parents)


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules of the package that a file imports, anywhere in it, as parts of their names."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            base = tuple(part for part in base if part)
            for alias in node.names:
                named = (*base, alias.name)
                yield named if _is_module(named) else base
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "tardis_llm" for name in names), f"{path}: import relatively"


def _is_module(parts: tuple[str, ...]) -> bool:
    return ROOT.joinpath(*parts).with_suffix(".py").is_file() or ROOT.joinpath(*parts, "__init__.py").is_file()


def name_of(path: Path) -> tuple[str, ...]:
    """The module in a file, as parts of its name without the package's."""
    return tuple(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    own = name_of(path)
    shelf = SHELVES.index(own[0] if own else "")
    for other in filter(None, imported(path)):  # the version is asked for of the package itself
        assert SHELVES.index(other[0]) <= shelf, f"{'.'.join(own)} imports {'.'.join(other)}"
        if own[:1] == other[:1] == ("runtime",) and len(own) > 1 < len(other):
            assert RUNTIME.index(other[1]) <= RUNTIME.index(own[1]), f"{'.'.join(own)} imports {'.'.join(other)}"


IMPORTS = """
import sys, tardis_llm.integrations.vllm
print(*(name.split(".")[1] for name in sys.modules if name.startswith("tardis_llm.")))
import tardis_llm.cli.main
print(*sys.modules)
"""


@long
def test_loaders_and_servers_import_nothing_that_folds_and_the_command_line_nothing_of_lm_eval() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120, check=True)
    shelves, modules = (set(line.split()) for line in done.stdout.splitlines())
    below = SHELVES[: SHELVES.index("checkpoint") + 1]
    assert shelves == {*below, "integrations"} - {"precision", "calibration", "folding"}
    assert not {"lm_eval", "datasets"} & modules
