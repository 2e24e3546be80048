"""What an index is to Python, and how the package is built: abstract classes, import order, agreement with C."""

from __future__ import annotations

import ast
import collections.abc as abc
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from domains import DTYPES

import doraemon
from doraemon import Index, Snapshot, arrays, sources
from doraemon import engine as engines

#: from the lowest to the highest; a module imports only from those before it
LAYERS = [
    ["arrays", "errors", "sources", "workload", "replacing", "parallel", "memory"],
    ["engine", "inputs", "times", "dtypes", "columns"],
    ["keytype", "values", "keys", "storage", "splicing", "hot", "heat", "fitting", "steps"],
    ["strings", "lexicon", "texts", "records", "choosing"],
    ["model", "delta", "run", "appending", "search", "state"],
    [
        "accesses",
        "remembering",
        "changes",
        "front",
        "warming",
        "adaptation",
        "following",
        "explanation",
        "checking",
        "packing",
        "index",
    ],
]
ORDER = [module for layer in LAYERS for module in layer]


def held(index: Index | Snapshot) -> list[Any]:
    return index.keys().tolist() if index.dtype.kind != "M" else list(index.keys())


@pytest.fixture(params=DTYPES)
def every(request: pytest.FixtureRequest, engine: str) -> list[Index | Snapshot]:
    """Multiset, map, snapshot and an empty index, with changes that are not merged."""
    keys = np.array([5, 1, 3, 3, 9]).astype(request.param)
    multiset = Index(keys, engine=engine, merging="manual")
    pairs = Index(np.unique(keys), np.arange(4), engine=engine, merging="manual")
    multiset.extend(keys[:2])
    multiset.discard(keys[4])
    pairs.discard(keys[0])
    return [multiset, pairs, multiset.snapshot(), Index(dtype=request.param, engine=engine)]


@pytest.mark.parametrize("base", [abc.Container, abc.Iterable, abc.Sized, abc.Collection, abc.Reversible])
def test_an_index_is_a_collection_that_can_be_reversed(base: type) -> None:
    for cls in (Index, Snapshot):
        assert issubclass(cls, base)
    assert isinstance(Index([1]), base)
    assert isinstance(Index([1], [2]).snapshot(), base)


@pytest.mark.parametrize("base", [abc.Sequence, abc.Set, abc.Mapping, abc.ItemsView, abc.Callable])
def test_an_index_does_not_claim_what_it_does_not_do(base: Any) -> None:
    assert not isinstance(Index([1]), base)
    assert not isinstance(Index([1], [2]).snapshot(), base)


def test_the_size_is_the_number_of_items_iterated(every: list[Index | Snapshot]) -> None:
    for index in every:
        assert len(list(index)) == len(index) == len(index.keys())
        assert bool(index) == (len(index) > 0)


def test_what_is_iterated_is_contained_and_in_order(every: list[Index | Snapshot]) -> None:
    for index in every:
        items = list(index)
        assert items == sorted(items) == held(index)
        assert all(item in index for item in items)


def test_iterations_are_independent_and_iterators_iterate_themselves(every: list[Index | Snapshot]) -> None:
    for index in every:
        first, second = iter(index), iter(index)
        assert iter(first) is first
        assert list(first) == list(second) == list(index)


def test_reversed_is_the_other_way_round(every: list[Index | Snapshot]) -> None:
    for index in every:
        assert list(reversed(index)) == list(index)[::-1]


def test_an_abstract_part_that_is_missing_is_noticed() -> None:
    assert not Index.__abstractmethods__
    assert not Snapshot.__abstractmethods__


def test_a_snapshot_has_every_question_and_no_change() -> None:
    changing = {"insert", "update", "extend", "discard", "discard_many", "compact", "adapt", "__setitem__"}
    making = {"snapshot", "copy", "open", "from_pandas", "from_arrow"}
    public = {name for name in dir(Index) if not name.startswith("_")} | {"__setitem__"}
    assert {name for name in public if not hasattr(Snapshot, name)} == changing | making


def imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    tree = ast.parse((Path(doraemon.__path__[0]) / f"{module}.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {name for node in nodes for name in ([node.module] if node.module else [a.name for a in node.names])}


def test_every_module_is_in_the_order() -> None:
    modules = {path.stem for path in Path(doraemon.__path__[0]).glob("*.py")} - {"__init__"}
    assert sorted(ORDER) == sorted(modules)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_down(module: str) -> None:
    assert imports_of(module) - {"_native"} <= set(ORDER[: ORDER.index(module)])


def test_a_fingerprint_changes_with_any_c_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    assert sources.fingerprint() is None
    seen = set()
    for name, text in (("a.c", "int a;"), ("a.c", "int b;"), ("b.h", ""), ("b.h", "int c;"), ("b.py", "")):
        (tmp_path / name).write_text(text)
        seen.add(sources.fingerprint())
    assert sources.names() == ["a.c", "b.h"]
    assert len(seen) == 3  # neither an empty file nor one of Python makes another


@pytest.mark.parametrize("name", ["LAYOUT", "SOURCES"])
def test_the_c_extension_of_other_sources_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native = pytest.importorskip("doraemon._native")
    assert native.LAYOUT == arrays.LAYOUT
    assert sources.fingerprint() == native.SOURCES
    other = {"LAYOUT": (*arrays.LAYOUT[:2], arrays.PLACE_SHIFT + 1), "SOURCES": native.SOURCES ^ 1}
    monkeypatch.setattr(native, name, other[name])
    with pytest.raises(ImportError, match="reinstall"):
        importlib.reload(engines)
    monkeypatch.undo()
    importlib.reload(engines)
