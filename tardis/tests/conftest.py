"""Models on disk that several tests read, none of which may change them; the command line; instruction sets."""

from __future__ import annotations

import gc
import os

# GPU kernels run in Triton's interpreter, which is chosen when Triton is imported
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from engines import save_tiny
from filelock import FileLock
from models import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

# paths of temporary folders may be long: messages must not be broken into lines within them
os.environ["COLUMNS"] = "400"

from tardis_llm import sample
from tardis_llm.cli.main import run
from tardis_llm.runtime.cpu.library import ISAS, open_library

# what was imported stays: collections of garbage, which many tests ask for, need not look through it
gc.freeze()

#: the sample folded coarsely, but for real, in seconds
QUICK_SAMPLE = ("--tokens", "6144", "--probe-tokens", "1024", "--predictor-bits", "1", "--reduction", "0.78")
#: the tiny model folds in a second
QUICK_TINY = (
    *("--tokens", "4096", "--probe-tokens", "256", "--sequence-length", "32"),
    *("--predictor-bits", "1", "--reduction", "0.5"),
)


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def assert_refused(result: Result, message: str, code: int = 1) -> None:
    """One error on stderr that says `message`, nothing on stdout, no traceback."""
    assert result.code == code
    assert message in result.err
    assert "error:" in result.err
    assert "Traceback" not in result.err
    assert not result.out


@pytest.fixture
def tardis(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process."""

    def call(*args: object) -> Result:
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels run on this instruction set."""
    built = open_library()
    if built is None:
        pytest.skip("the CPU kernels are not built: no C++ compiler was found")
    if request.param not in built.isas:
        pytest.skip(f"this processor, or the compiler, lacks {request.param}")
    with built.using(request.param):
        yield request.param


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense random GPT-2 with a byte tokenizer: 3 blocks, d = 64."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_model("gpt2").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 kB of English, which is 8,000 tokens of the byte tokenizer."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text(sample.calibration_text().read_text(encoding="utf-8")[:8_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def sample_folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled sample, folded by the command line; once for all processes of a run of the tests."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sample-folded"
    text = sample.calibration_text()
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            assert run(["fold", str(sample.model_dir()), "-o", str(directory), "--text", str(text), *QUICK_SAMPLE]) == 0
    return directory


@pytest.fixture
def fold(tardis: Callable[..., Result], tiny_dir: Path, tiny_text: Path, tmp_path: Path) -> Callable[..., Result]:
    """Fold the tiny model into tmp_path/out, or as the arguments say."""

    def call(*args: object, model: Path = tiny_dir, text: Path = tiny_text, out: Path = tmp_path / "out") -> Result:
        return tardis("fold", model, "-o", out, "--text", text, *QUICK_TINY, *args)

    return call


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folded tiny GPT-2 that vLLM can serve, and as transformers has it."""
    directory = tmp_path_factory.mktemp("gpt2")
    return directory, save_tiny("gpt2", directory)
