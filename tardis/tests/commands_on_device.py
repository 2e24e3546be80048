"""Commands on the device that `on_device.py` makes up, which must find there what they find on the CPU.

    python commands_on_device.py FOLDER

prints one JSON object: what each command found on the CPU, and what there.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from harness_data import write_items
from models import tiny_model, tiny_tokenizer
from on_device import NAME, SMALL, register

from tardis_llm import sample
from tardis_llm.checkpoint import loading
from tardis_llm.cli.main import run

FOLD = ("--tokens", 2048, "--probe-tokens", 64, "--sequence-length", 32, "--predictor-bits", 1, "--reduction", 0.5)
#: each reads other statistics of a model's inputs, or changes the model in another way
METHODS = "magnitude,wanda,sparsegpt,owl-wanda,flap,skip,teal,cats@0.3,rtn4,gptq4+affine+refit+weigh,affine,tardis"

_ARGUMENTS = loading._arguments


def found(*args: object) -> Any:
    """What a command prints as JSON, without what depends on the machine and its clock."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run([*map(str, args), "--json"]) == 0
    record = json.loads(printed.getvalue())
    record.get("comparison", {}).pop("machine", None)
    return _untimed(record)


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        measured = [key for key in value if "seconds" in key or key == "peak_memory_bytes"]
        return {key: _untimed(each) for key, each in value.items() if key not in measured}
    return [_untimed(each) for each in value] if isinstance(value, list) else value


def commands(folder: Path) -> dict[str, tuple[object, ...]]:
    """Commands by name, without their devices; makes the models and the text that they read."""
    dense, folded, text = folder / "dense", folder / "folded", folder / "text.txt"
    tiny_model("llama", **SMALL["llama"]).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    text.write_text(sample.calibration_text().read_text(encoding="utf-8")[:4_000], encoding="utf-8")
    found("fold", dense, "-o", folded, "--text", text, *FOLD)
    compared = ("--text", text, "--eval-text", text, "--tokens", 2048, "--window", 32, "--eval-tokens", 512)
    return {
        "eval": ("eval", folded, "--text", text, "--window", 32),
        "eval of tasks": ("eval", folded, "--tasks", "blimp,lambada", "--task-data", write_items(folder)),
        "generate": ("generate", folded, "Once upon a time", "--max-new-tokens", 8),
        "generate, sampled": ("generate", folded, "Once", "--max-new-tokens", 8, "--temperature", 0.7, "--seed", 3),
        "compare": ("compare", dense, *compared, "--dtype", "float32", "--methods", METHODS, "--reductions", 0.5),
    }


def eager(*args: Any) -> dict[str, Any]:
    """Arguments by which a model is loaded to attend by plain operators: a CPU has kernels that others do not."""
    return {**_ARGUMENTS(*args), "attn_implementation": "eager"}


def both() -> dict[str, list[Any]]:
    """What each command finds on the CPU and on the device."""
    folder, made = Path(sys.argv[1]), {}
    for name, args in commands(folder).items():
        output = ["-o", folder / "out"] if name == "compare" else []
        made[name] = []
        for place in ("cpu", NAME):
            made[name].append(found(*args, *output, "--device", place))
            shutil.rmtree(folder / "out", ignore_errors=True)
    return made


def main() -> None:
    """Print what is found."""
    register()
    with patch.object(loading, "_arguments", eager):
        sys.stdout.write(json.dumps(both()))


if __name__ == "__main__":
    main()
