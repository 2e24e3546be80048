"""llama.cpp as the npm package node-llama-cpp brings it: its kernels, driven by a program of ours that is built here.

The package has llama.cpp's libraries for every processor, and its source, of which only the headers are used. Building
needs npm, git and a C compiler, and no network but npm's registry.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tardis_llm.evaluation.perplexity import Perplexity

CACHE = Path.home() / ".cache" / "tardis" / "llama"
PACKAGE = "node-llama-cpp@3.21.1"
LIBRARY = f"libllama of {PACKAGE}"  #: what is measured, in records
SOURCE = Path(__file__).with_name("llama_cpp.c")
#: numbers of `llama_ftype` by name
TYPES = {"q4_0": 2, "q2_k": 10, "q3_k_m": 12, "q4_k_m": 15}
#: which of its kernels are for the instructions of ours, where not the best that the processor has are wanted
KERNELS = {"avx2": "haswell", "avxvnni": "alderlake", "avx512bw": "skylakex", "avx512vnni": "icelake", "avx512": "zen4"}
_SECONDS_TO_SLEEP = 1.5  # at most, until idle threads of llama.cpp sleep
_LIBRARIES = "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"
_BUNDLE = "node_modules/node-llama-cpp/llama/gitRelease.bundle"
_HEADERS = ("include", "ggml/include")


class Llama:
    """A process of llama.cpp that times what it is asked to, and waits in between.

    Args:
        file: GGUF file.
        threads: of its own.
        batch: sequences that it decodes at once.
        cache: folder with the npm package.
        instructions: key of `KERNELS`; None for the best that the processor has.
    """

    def __init__(self, file: Path, threads: int, batch: int, cache: Path, instructions: str | None = None) -> None:
        command = [program(cache), "time", file, threads, batch]
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(cache, instructions),
        )
        self.about = self._answer()

    def timed(self, steps: int, prompt: int) -> dict[str, float]:
        """Seconds per step of the batch (`step`) and to the first tokens (`first`) behind prompts of so many tokens.

        Returns only when its threads, which wait for more work without sleeping, have gone to sleep: they would take
        a third of the pace from who comes next.
        """
        assert self._process.stdin is not None, "it is a pipe"
        print(steps, prompt, file=self._process.stdin, flush=True)
        found = self._answer()
        time.sleep(_SECONDS_TO_SLEEP)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with status {self._process.wait()}; see what it said above.")
        answer: dict[str, Any] = json.loads(line)
        return answer


def quantised(file: Path, kind: str, output: Path, cache: Path = CACHE, pure: bool = False) -> Path:
    """A GGUF file in another type, made by llama.cpp's own quantiser without an importance matrix, unless it is there.

    Args:
        file: GGUF file of any type; its weights are written out first.
        kind: key of `TYPES`.
        output: file to write.
        cache: folder with the npm package.
        pure: every matrix in that type; otherwise llama.cpp gives some of them, as the head, more bits.
    """
    if not output.exists():
        part = output.with_suffix(".part")
        run = [str(program(cache)), "pure" if pure else "quantise", str(file), str(part), str(TYPES[kind])]
        subprocess.run(run, check=True, env=_environment(cache), stdout=subprocess.DEVNULL)
        part.replace(output)
    return output


def own_perplexity(file: Path, windows: Tensor, cache: Path = CACHE) -> Perplexity:
    """Token perplexity of a GGUF file on windows [n, length] of token ids, by the logits of llama.cpp itself."""
    run = [str(program(cache)), "losses", str(file), str(torch.get_num_threads()), str(windows.shape[1])]
    ids = windows.to(torch.int32).numpy().tobytes()
    done = subprocess.run(run, input=ids, check=True, env=_environment(cache), stdout=subprocess.PIPE)
    sums = torch.tensor([float(line) for line in done.stdout.split()], dtype=torch.float64)
    if len(sums) != len(windows):
        raise RuntimeError(f"llama.cpp judged {len(sums)} of {len(windows)} windows.")
    return Perplexity.of(sums / (windows.shape[1] - 1), windows.shape[1])


def program(cache: Path) -> Path:
    """The program of `llama_cpp.c`, built against the package unless that is done.

    Raises:
        RuntimeError: npm, git or a C compiler is missing.
    """
    built = cache / "llama_cpp"
    if built.exists() and built.stat().st_mtime > SOURCE.stat().st_mtime:
        return built
    if missing := [tool for tool in ("npm", "git", "cc") if shutil.which(tool) is None]:
        raise RuntimeError(f"llama.cpp is an npm package, and cc builds on it: install {' and '.join(missing)}.")
    _install(cache)
    libraries = [f"-l:{path.name}" for pattern in ("libllama.v*.so", "libggml*.v*.so", "libggml-base.so")
                 for path in (cache / _LIBRARIES).glob(pattern)]  # fmt: skip
    folders = [f"-I{cache / 'source' / folder}" for folder in _HEADERS]
    command = ["cc", "-O2", "-std=c11", "-D_GNU_SOURCE", *folders, str(SOURCE), "-o", str(built)]
    subprocess.run([*command, f"-L{cache / _LIBRARIES}", *libraries, "-lm"], check=True)
    return built


def _install(cache: Path) -> None:
    """Put package and headers into a folder, unless they are there."""
    if not (cache / _LIBRARIES).is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "package.json").write_text("{}")
        subprocess.run(["npm", "install", "--save-exact", "--ignore-scripts", PACKAGE], cwd=cache, check=True)
    source = cache / "source"
    if not (source / _HEADERS[0]).is_dir():
        shutil.rmtree(source, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", "--no-checkout", str(cache / _BUNDLE), str(source)], check=True)
        subprocess.run(["git", "checkout", "--quiet", "HEAD", "--", *_HEADERS], cwd=source, check=True)


def _environment(cache: Path, instructions: str | None = None) -> dict[str, str]:
    """That of this process, with where llama.cpp's libraries and kernels are."""
    libraries = cache / _LIBRARIES
    kernels = libraries if instructions is None else _only(libraries / f"libggml-cpu-{KERNELS[instructions]}.so", cache)
    return {**os.environ, "LIBRARIES": str(kernels), "LD_LIBRARY_PATH": str(libraries)}


def _only(kernels: Path, cache: Path) -> Path:
    """A folder with nothing but some kernels: llama.cpp takes the best of those that lie together."""
    folder = cache / f"only-{kernels.stem}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / kernels.name).exists():
        (folder / kernels.name).symlink_to(kernels.resolve(strict=True))
    return folder
