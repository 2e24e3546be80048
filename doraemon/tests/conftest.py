"""Both engines for every test that asks for one; how long the long tests are."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings

from doraemon import engine as engines
from doraemon import memory, model, state, warming

settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--examples", type=int, default=6, help="examples per stateful test")
    parser.addoption("--crashes", type=int, default=6, help="how often a writer is killed")
    parser.addoption("--mutations", type=int, default=150, help="how many changed files are opened, with each engine")
    parser.addoption("--stress", type=float, default=1.0, help="seconds of each thread test")


#: methods whose examples need a package that is optional
NEEDED = {"from_pandas": "pandas", "from_arrow": "pyarrow", "to_arrow": "pyarrow"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        package = NEEDED.get(item.name.rsplit(".", 1)[-1])
        if package and find_spec(package) is None:
            item.add_marker(pytest.mark.skip(reason=f"{package} is not installed: the example is not tried"))


@pytest.fixture(params=["native", "numpy"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine in turn; the C extension only where it was built and the environment does not do without it."""
    if request.param == "native" and engines.choose() != "native":
        pytest.skip("the C extension was not built, or is not wanted")
    return str(request.param)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of few keys, early merges, memory that is used again: small examples have all parts of large indexes."""
    monkeypatch.setattr(model, "DEPTH", 4)
    monkeypatch.setattr(model, "LEAF_KEYS", 2)
    monkeypatch.setattr(model, "MIN_LEAF_KEYS", 1)
    monkeypatch.setattr(model, "MAX_POOL", 2)
    monkeypatch.setattr(state, "MIN_DELTA", 12)
    monkeypatch.setattr(memory.pool, "least", 1)
    monkeypatch.setattr(memory.pool, "most", 1 << 16)


@pytest.fixture
def leaves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hot table is tried, so that all accesses are the leaves' and nothing depends on the time that they take."""
    monkeypatch.setattr(warming, "MIN_SAMPLES", 1 << 62)
