"""Models on disk that several tests read, none of which may change them; the command line; instruction sets."""

from __future__ import annotations

import gc
import os

# GPU kernels run in Triton's interpreter, which is chosen when Triton is imported
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# paths of temporary folders may be long: messages must not be broken into lines within them
os.environ["COLUMNS"] = "400"

# Nothing heavy is imported here but where it is used: a process that only hands out tests to others imports this, too.

#: the sample folded coarsely, but for real, in seconds
QUICK_SAMPLE = ("--tokens", "3072", "--split", "uniform", "--predictor-bits", "1", "--reduction", "0.78")
#: the tiny model folds in a second
QUICK_TINY = (
    *("--tokens", "4096", "--probe-tokens", "256", "--sequence-length", "32"),
    *("--predictor-bits", "1", "--reduction", "0.5"),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of `isa` run on every instruction set that is here; test_kernels.py says which are not."""
    if "isa" in metafunc.fixturenames:
        from tardis_llm.runtime.cpu.library import open_library

        built = open_library()
        none = pytest.param(None, marks=pytest.mark.skip(reason="the CPU kernels are not built"))
        metafunc.parametrize("isa", built.isas if built else [none], indirect=True)


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage, which many tests ask for, need not look through it."""
    gc.freeze()


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
    from tardis_llm.cli.main import run

    def call(*args: object) -> Result:
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels run on this instruction set."""
    from tardis_llm.runtime.cpu.library import loaded

    with loaded().using(request.param):
        yield request.param


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense random GPT-2 with a byte tokenizer: 2 blocks, d = 64."""
    from models import tiny_model, tiny_tokenizer

    directory = tmp_path_factory.mktemp("tiny")
    tiny_model("gpt2").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 kB of English, which is 8,000 tokens of the byte tokenizer."""
    from tardis_llm import sample

    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text(sample.calibration_text().read_text(encoding="utf-8")[:8_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the processes of a run of the tests make once for all of them."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def sample_folded(shared: Path) -> Path:
    """The bundled sample, folded by the command line."""
    from tardis_llm import sample
    from tardis_llm.cli.main import run

    directory, text = shared / "sample-folded", sample.calibration_text()
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            assert run(["fold", str(sample.model_dir()), "-o", str(directory), "--text", str(text), *QUICK_SAMPLE]) == 0
    return directory


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape for `tardis bench` that is made in no time: GPT-2's, but narrow, and with few words."""
    from tardis_llm.evaluation.shapes import SHAPES

    monkeypatch.setitem(SHAPES, "gpt2-small", ("gpt2", {"n_embd": 256, "n_head": 4, "vocab_size": 1024}))
    return "gpt2-small"


@pytest.fixture
def fold(tardis: Callable[..., Result], tiny_dir: Path, tiny_text: Path, tmp_path: Path) -> Callable[..., Result]:
    """Fold the tiny model into tmp_path/out, or as the arguments say."""

    def call(*args: object, model: Path = tiny_dir, text: Path = tiny_text, out: Path = tmp_path / "out") -> Result:
        return tardis("fold", model, "-o", out, "--text", text, *QUICK_TINY, *args)

    return call


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folded tiny GPT-2 that vLLM can serve, and as transformers has it."""
    from engines import save_tiny

    directory = tmp_path_factory.mktemp("gpt2")
    return directory, save_tiny("gpt2", directory)
