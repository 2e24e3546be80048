"""List the benchmarks, or run one.

python benchmarks                             each with what it measures
python benchmarks ffn_kernels --batch 1,8     the script of that name, with the arguments behind it
"""

import ast
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def scripts() -> dict[str, Path]:
    """The scripts that can be run, by name: those of Doraemon begin with `doraemon/`."""
    files = [path for folder in (HERE, HERE / "doraemon") for path in sorted(folder.glob("[!_]*.py"))]
    runnable = (path for path in files if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"))
    return {path.relative_to(HERE).with_suffix("").as_posix(): path for path in runnable}


def purpose(path: Path) -> str:
    """The first line of a script's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def main(arguments: list[str]) -> None:
    """List the scripts, or become the one that is named first."""
    found = scripts()
    if not arguments:
        print("\n".join(f"{name:<20} {purpose(path)}" for name, path in found.items()))
        return
    name, *options = arguments
    if name not in found:
        sys.exit(f"there is no benchmark {name!r}; choose from {', '.join(found)}.")
    os.execv(sys.executable, [sys.executable, str(found[name]), *options])


if __name__ == "__main__":
    main(sys.argv[1:])
