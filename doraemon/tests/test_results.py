"""The page of results says what was measured, and nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "doraemon"


def load(name: str) -> ModuleType:
    """A script of the benchmarks."""
    path = BENCHMARKS / f"{name}.py"
    if not path.exists():
        pytest.skip("the benchmarks are in the repository only")
    spec = importlib.util.spec_from_file_location(f"doraemon_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCHMARKS))  # where a script's own modules are
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def results() -> ModuleType:
    return load("results")


def test_the_published_page_is_made_of_the_published_results(results: ModuleType) -> None:
    measured = results.by_processor(results.RESULTS)
    assert results.PAGE.read_text(encoding="utf-8") == results.page(measured)
    readme = results.README.read_text(encoding="utf-8")
    assert results.replace_part(readme, results.readme_part(measured[0])) == readme


def test_processors_of_one_name_are_kept_apart(results: ModuleType) -> None:
    names = ["AMD EPYC, family 25, model 1, cache 512 KB", "AMD EPYC, family 25, model 17, cache 1024 KB"]
    assert [load("timing").folder_of(name) for name in names] == [
        "amd-epyc-family-25-model-1",
        "amd-epyc-family-25-model-17",
    ]
    for measured in results.by_processor(results.RESULTS):
        assert len({machine["processor"] for machine in measured.machines.values()}) == 1


def test_a_target_is_met_by_the_worse_quartile(results: ModuleType) -> None:
    assert results.targets.met([8.0, 9.0, 10.0], 8, True) == "yes"
    assert results.targets.met([7.0, 8.0, 10.0], 8, True) == "by the median"
    assert results.targets.met([7.0, 7.9, 10.0], 8, True) == "**no**"
    assert results.targets.met([80.0, 90.0, 99.0], 100, False) == "yes"
    assert results.targets.met([80.0, 90.0, 100.0], 100, False) == "by the median"
    assert results.targets.met([80.0, 100.0, 101.0], 100, False) == "**no**"


def test_what_is_slower_than_others_is_bold(results: ModuleType) -> None:
    assert results.texts.times([0.5, 0.9, 1.2]) == "**0.90x**"
    assert results.texts.times([0.9, 1.1, 1.2]) == "1.10x"


def test_the_picture_is_drawn(results: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture and nothing else")
    results.plot(results.by_processor(results.RESULTS)[0], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_sections_are_of_what_was_measured_and_name_another_machine(results: ModuleType) -> None:
    measured, *others = results.by_processor(results.RESULTS)
    other = {"processor": "another one", "python": "3", "numpy": "2"}
    measured.machines["threads"] = other
    measured.rows["threads"] = [
        {
            "n": 4_000_000,
            "question": "count",
            "cores": 1,
            "threads": 2,
            "ns": {"1 threads": [9.0, 10.0, 11.0], "2 threads": [11.0, 12.0, 13.0]},
            "ratio": {"1 threads": [0.8, 0.83, 0.9]},
        }
    ]
    page = results.page([measured, *others])
    assert "\nOn another one; Python 3, NumPy 2.\n\n| n | question |" in page
    assert "`count` by 2 threads on 1 cores, 4M: 1.20 times as long as by one." in page
    measured.rows["threads"] = []
    assert "## Threads" not in results.page([measured, *others])
