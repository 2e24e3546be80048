"""Keys that are str, bytes or records, against a sorted list of Python's own."""

from __future__ import annotations

import pickle
import threading
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doraemon import CorruptFileError, Index, lexicon, parallel
from doraemon.strings import pack

PREFIXES = ["", "a", "https://example.org/", "x" * 40, "é", "\U0010ffff", "\0"]
ENDS = st.text(st.sampled_from("\0ab\x7f\x80\u07ff\uffff\U00010000"), max_size=4)
TEXTS = st.tuples(st.sampled_from(PREFIXES), ENDS).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=20
)
BYTES = TEXTS.map(str.encode) | st.binary(max_size=12) | st.sampled_from([b"\xff" * 9, b"\xff" * 8, b"\0" * 9, b"\0"])
KINDS = {"str": TEXTS, "bytes": BYTES}
ODD_FLOATS = st.sampled_from([0.0, -0.0, np.inf, -np.inf])
FLOATS, SHORT_FLOATS = st.floats(allow_nan=False) | ODD_FLOATS, st.floats(allow_nan=False, width=32) | ODD_FLOATS
RECORDS: dict[str, tuple[list[Any], st.SearchStrategy[Any]]] = {
    "narrow": ([("a", "i4"), ("b", "f4")], st.tuples(st.integers(-2, 2), SHORT_FLOATS)),
    "wide": ([("a", "f8"), ("b", "i8"), ("c", "u4")], st.tuples(FLOATS, st.integers(-2, 2), st.integers(0, 2))),
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60)
def test_every_question_is_answered_as_a_sorted_list_would(kind: str, engine: str, data: st.DataObject) -> None:
    keys = data.draw(st.lists(KINDS[kind], max_size=120))
    index = Index(keys, dtype=kind, engine=engine)
    check(index, sorted(keys), data.draw(st.lists(KINDS[kind], max_size=20)) + keys[:20])


def check(index: Index, keys: list[Any], asked: list[Any]) -> None:
    """All keys, and everything that can be asked with some queries."""
    assert list(index) == index.keys().tolist() == keys
    left, right = [bisect_left(keys, query) for query in asked], [bisect_right(keys, query) for query in asked]
    assert [index.bisect_left(query) for query in asked] == index.searchsorted(asked).tolist() == left
    assert [index.bisect_right(query) for query in asked] == index.searchsorted(asked, "right").tolist() == right
    present = [low < high for low, high in zip(left, right, strict=True)]
    assert [query in index for query in asked] == index.contains(asked).tolist() == present
    for query, low, high in zip(asked, left, right, strict=True):
        found = [index.find_lt(query), index.find_le(query), index.find_gt(query), index.find_ge(query)]
        assert found == [keys[i] if 0 <= i < len(keys) else None for i in (low - 1, high - 1, high, low)]
        assert index.range(query).tolist() == keys[low:]
        assert index.count(asked[0], query) == max(0, low - left[0])
    assert [index.select(rank) for rank in range(len(keys))] == keys


@pytest.mark.parametrize("spread", ["same start", "each longer", "long", "dense"])
def test_large_sets_have_nodes_and_ties_of_every_kind(spread: str, engine: str) -> None:
    rng = np.random.default_rng(1)
    make = {
        "same start": lambda i: b"https://en.wikipedia.org/wiki/%d/%d" % (i % 7, i),
        "each longer": lambda i: b"a" * (i % 2500),
        "long": lambda i: b"%d" % (i % 3) * 5000 + b"%d" % i,
        "dense": lambda i: int(i).to_bytes(2, "big") * 5,
    }[spread]
    keys = [make(i) for i in range(2500)]
    index = Index(rng.permutation(np.array(keys, dtype=object)).tolist(), engine=engine)
    asked = [keys[i] for i in rng.integers(0, 2500, 700)]
    asked += [key[: len(key) // 2] for key in asked[:200]] + [key + b"\0" for key in asked[:200]]
    asked += [key[:-1] + bytes([255]) for key in asked[:200]]
    keys.sort()
    assert index.searchsorted(asked).tolist() == [bisect_left(keys, query) for query in asked]
    assert index.searchsorted(asked, "right").tolist() == [bisect_right(keys, query) for query in asked]


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_batches_find_texts_that_the_table_has_lost_and_those_that_are_none(share: float, engine: str) -> None:
    rng = np.random.default_rng(3)
    keys = sorted({f"{i % 97}/{i}" * (i % 5) for i in range(20_000)})
    index = Index(keys, engine=engine)
    there = rng.random(6000) < share
    asked = [keys[i] + ("" if t else "\0") for i, t in zip(rng.integers(0, len(keys), 6000), there, strict=True)]
    for queries in (asked, np.array(asked, dtype=np.dtypes.StringDType()), pack(asked, True, engine)):
        assert index.searchsorted(queries).tolist() == [bisect_left(keys, query) for query in asked]
        assert index.searchsorted(queries, "right").tolist() == [bisect_right(keys, query) for query in asked]
        assert index.contains(queries).tolist() == there.tolist()
    index.extend(asked[:50])  # some of which have codes only now
    keys = sorted(keys + asked[:50])
    assert index.searchsorted(asked).tolist() == [bisect_left(keys, query) for query in asked]
    assert [index.bisect_right(query) for query in asked[:200]] == [bisect_right(keys, q) for q in asked[:200]]


@pytest.mark.parametrize("wrong", ["\ud800", b"x", None, 5])
def test_a_wrong_item_of_a_long_list_is_named(wrong: Any, engine: str) -> None:
    index = Index(["a", "b"], engine=engine)
    with pytest.raises((TypeError, ValueError)) as long:
        index.searchsorted(["a"] * 5000 + [wrong])
    with pytest.raises(long.type) as single:
        index.bisect_left(wrong)
    assert str(long.value) == str(single.value)


@pytest.mark.parametrize("is_map", [False, True], ids=["multiset", "map"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_parts")
@given(data=st.data())
@settings(max_examples=10)
def test_changes_and_files_keep_what_they_should(
    kind: str, is_map: bool, engine: str, tmp_path: Path, data: st.DataObject
) -> None:
    draw, next_value = data.draw, 0
    index = Index([], [] if is_map else None, dtype=kind, engine=engine)
    keys: list[Any] = []
    values: dict[Any, int] = {}
    for _ in range(12):
        change = draw(st.sampled_from(["insert", "extend", "discard", "discard_many", "compact", "save", "pickle"]))
        some = draw(st.lists(KINDS[kind], max_size=8 if change != "insert" else 2))
        if change in ("insert", "extend"):
            fresh = [next_value + place for place in range(len(some))]
            next_value += len(some)
            if change == "extend":
                index.extend(some, fresh if is_map else None)
            for key, value in zip(some, fresh, strict=True):
                if change == "insert":
                    index.update(key, value) if is_map else index.insert(key)
                if not is_map or key not in keys:
                    keys.insert(bisect_left(keys, key), key)
                values[key] = value
        elif change.startswith("discard"):
            some += keys[::3]
            gone = [key for key in some if remove(keys, key)]
            removed = index.discard_many(some) if change == "discard_many" else sum(map(index.discard, some))
            assert removed == len(gone)
        elif change == "compact":
            index.compact()
        elif change == "save":
            index.save(tmp_path / "index")
            index = Index.open(tmp_path / "index", mmap=draw(st.booleans()), engine=engine)
        else:
            index = pickle.loads(pickle.dumps(index))
        check(index, keys, [*some[:4], *keys[:4]])
        if is_map:
            assert index.values().tolist() == [values[key] for key in keys]
            assert index.get_many(some, -1).tolist() == [values[k] if k in keys else -1 for k in some]


def remove(keys: list[Any], key: Any) -> bool:
    at = bisect_left(keys, key)
    there = at < len(keys) and keys[at] == key
    if there:
        del keys[at]
    return there


def test_numpy_pandas_and_arrow_give_the_same_keys_and_queries(engine: str) -> None:
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    words = ["pear", "", "fig", "äpfel", "fig", "\U0001f34f"]
    columns = [
        np.array(words),
        np.array(words).astype(">U9"),
        np.array(words, dtype=np.dtypes.StringDType()),
        np.array(words, dtype=object),
        pandas.Series(words),
        pandas.Series(words, dtype="category"),
        pandas.Index(words, dtype=object),
        arrow.array(words),
        arrow.array(["no", *words], arrow.large_string())[1:],
        arrow.chunked_array([words[:2], words[2:]]),
        arrow.array(words).cast(arrow.string_view()),
        Index(words, engine=engine),
        iter(words),
    ]
    for column in columns:
        index = Index(column, engine=engine, dtype="str")
        assert index.keys().tolist() == sorted(words)
        assert index.dtype == np.dtypes.StringDType()
    for column in columns[:-2]:
        assert index.searchsorted(column).tolist() == [bisect_left(sorted(words), word) for word in words]
    raw = [word.encode() for word in words]
    for column in (np.array(raw), arrow.array(raw), np.array(raw, dtype=object), raw):
        index = Index(column, engine=engine)
        assert index.keys().tolist() == sorted(raw)
        assert index.dtype == np.dtype("S")


@pytest.mark.parametrize("ask", ["bisect_left", "__contains__", "find_ge", "range", "insert", "discard"])
def test_the_other_kind_of_text_is_a_type_error_that_names_the_remedy(ask: str, engine: str) -> None:
    with pytest.raises(TypeError, match=r"decode\(\)"):
        getattr(Index(["a"], engine=engine), ask)(b"a")
    with pytest.raises(TypeError, match=r"encode\(\)"):
        getattr(Index([b"a"], engine=engine), ask)("a")
    with pytest.raises(TypeError, match="is no str"):
        getattr(Index(["a"], engine=engine), ask)(1)


@pytest.mark.parametrize("ask", ["searchsorted", "contains", "extend", "discard_many"])
def test_batches_of_other_things_are_refused(ask: str, engine: str) -> None:
    index = Index(["a"], engine=engine)
    for wrong in ([b"a"], np.array([b"a"]), ["a", 1], np.array([1.5])):
        with pytest.raises(TypeError, match=r"keys are|as the keys"):
            getattr(index, ask)(wrong)
    for missing in ([None], ["a", float("nan")]):
        with pytest.raises(ValueError, match="missing"):
            getattr(index, ask)(missing)
    with pytest.raises(ValueError, match="surrogatepass"):
        getattr(index, ask)(["\ud800"])
    assert index.keys().tolist() == ["a"]


def test_codes_run_out_and_are_spaced_anew(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexicon, "ONE_SIDED", 1 << 40)
    monkeypatch.setattr(lexicon, "END_STEP", 2)
    index = Index(["a", "z"], [0, 1], engine=engine)
    frozen, keys = index.snapshot(), ["a", "z"]
    spacings = {id(index._state.key_type)}
    for number in range(150):
        new = "m" * number + ("a" if number % 2 else "y")
        index.insert(new, number)
        keys.append(new)
        spacings.add(id(index._state.key_type))
    assert index.keys().tolist() == sorted(keys)
    assert frozen.keys().tolist() == ["a", "z"]
    assert len(spacings) > 1
    index.extend(iter(["b" * n for n in range(1, 90)]), np.arange(89))
    assert len(index) == 152 + 89


def test_copies_that_share_a_lexicon_go_their_own_ways(engine: str) -> None:
    one = Index(["b", "d"], engine=engine)
    other, frozen = one.copy(), one.snapshot()
    one.insert("a")
    other.insert("c")
    one.compact()
    one.extend(["c", "e"])
    assert list(one) == ["a", "b", "c", "d", "e"]
    assert list(other) == ["b", "c", "d"]
    assert list(frozen) == ["b", "d"]
    assert other.searchsorted(["a", "c", "e"]).tolist() == [0, 1, 3]


def test_merging_in_the_background_keeps_what_was_added_meanwhile(engine: str) -> None:
    index = Index([f"{number:05}" for number in range(0, 4000, 2)], engine=engine, merging="background")
    before = index._state
    index.discard_many([f"{number:05}" for number in range(0, 40, 2)])
    middle = index._state
    merged = middle.merged()
    index.extend(["00000", "00001", "~"])
    after = index._state.after_merge(middle, merged)
    assert after.key_type.decode(after.merged().run.codes).tolist() == index.keys().tolist()
    assert before.length == 2000
    assert len(index) == 1983


def test_texts_appended_behind_the_run_outlive_a_merge_in_the_background(engine: str) -> None:
    index = Index([f"{number:05}" for number in range(20_000)], engine=engine, merging="manual")
    index.discard("00003")
    index.compact()  # which leaves room
    index.discard("00005")
    before = index._state
    merged = before.merged()
    index.extend(["~a", "~b", "~b"])
    assert index.explain().run_keys == 19_999 + 3
    after = index._state.after_merge(before, merged)
    assert after is not None
    assert after.key_type.decode(after.run.codes).tolist() == index.keys().tolist()
    assert index.range("~a").tolist() == ["~a", "~b", "~b"]
    assert index.copy().count("~", ["~b", "~c"]).tolist() == [1, 3]


def test_threads_answer_batches_of_texts(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PART", 64)
    keys = [f"{number % 700}" for number in range(1500)]
    index, asked = Index(keys, engine=engine, threads=3), [f"{number}" for number in range(900)]
    keys.sort()
    assert index.searchsorted(asked).tolist() == [bisect_left(keys, query) for query in asked]
    assert index.contains(asked).tolist() == [query in set(keys) for query in asked]


def test_readers_see_whole_states_while_a_writer_adds_texts(request: pytest.FixtureRequest) -> None:
    index = Index([f"k{number}" for number in range(3000)])
    wrong: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            left, right = index.snapshot().searchsorted(["k1", "k", "l"]).tolist(), index.bisect_left("k1")
            if left[:2] != [1, 0] or left[2] < 3000 or right != 1:
                wrong.append(f"{left} {right}")

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(400):
        index.insert(f"k9{number}x")
        index.extend([f"kz{number}", f"kzz{number}"])
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(index) == 3000 + 1200


@pytest.mark.parametrize("ask", ["bisect_left", "bisect_right", "count", "find_gt", "range"])
def test_a_text_that_is_inserted_while_a_query_gets_its_code_is_on_the_right_side_of_it(
    ask: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, asked = Index(["a", "z"], engine=engine), []
    index.insert("b")

    def slowly(self: lexicon.Tiers) -> tuple[lexicon.Finder, ...]:
        finders = tuple(tier.finder for tier in self)
        if not asked:
            asked.append(finders)
            index.insert("p")
        return finders

    monkeypatch.setattr(lexicon.Tiers, "finders", property(slowly))
    found = index.count("a", "m") if ask == "count" else getattr(index, ask)("m")
    assert asked
    if ask == "range":
        assert found.tolist() in (["z"], ["p", "z"])
    else:
        assert found in ("z", "p") if ask == "find_gt" else found == 2


def test_a_damaged_file_of_texts_is_refused(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "index"
    Index(["alpha", "beta"], engine=engine).save(path)
    whole = path.read_bytes()
    at = whole.index(b"alphabeta")
    for wrong in (b"zlphabeta", b"\xfflphabeta"):
        path.write_bytes(whole[:at] + wrong + whole[at + 9 :])
        with pytest.raises(CorruptFileError):
            Index.open(path, engine=engine)


def test_texts_of_a_file_are_read_when_the_first_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("doraemon._native")
    path = tmp_path / "index"
    Index(["alpha", "beta"]).save(path)
    assert Index.open(path, mmap=True, verify=False).bisect_left("b") == 1
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"alphabeta", b"zlphabeta"))
    index = Index.open(path, mmap=True, verify=False)
    assert len(index) == 2
    with pytest.raises(CorruptFileError, match="order"):
        index.bisect_left("b")


def test_bytes_of_an_index_are_bounded() -> None:
    keys = [f"https://example.org/{number}" for number in range(5000)]
    assert Index(keys).explain().key_bytes < sum(map(len, keys)) + 44 * len(keys)


def test_what_was_handed_in_is_not_shared(engine: str) -> None:
    raw = np.array([b"a", b"b"])
    index = Index(raw, engine=engine)
    raw[0] = b"z"
    assert index.keys().tolist() == [b"a", b"b"]


@pytest.mark.parametrize("kind", RECORDS)
@given(data=st.data())
@settings(max_examples=15)
def test_records_are_ordered_as_tuples(kind: str, engine: str, tmp_path: Path, data: st.DataObject) -> None:
    dtype, records = RECORDS[kind]
    keys = data.draw(st.lists(records, max_size=40))
    array = np.array(keys, dtype=dtype)
    index = Index(array if data.draw(st.booleans()) else keys, dtype=dtype, engine=engine)
    more = data.draw(st.lists(records, max_size=5))
    index.extend(more)
    keys = sorted([*keys, *more])
    asked = [*data.draw(st.lists(records, max_size=8)), *keys[:5]]
    shorter = [key[:size] for key in asked for size in (0, 1, 2)]
    between = [(key[0], key[1] + 0.5, *key[2:]) for key in asked] + [(float("inf"),), (2**70, 0), (-(2**70),)]
    check(index, keys, asked + shorter + between)
    index.save(tmp_path / "index")
    assert list(Index.open(tmp_path / "index", engine=engine)) == list(pickle.loads(pickle.dumps(index))) == keys
    assert index.searchsorted(np.array(asked, dtype=dtype)).tolist() == [bisect_left(keys, key) for key in asked]


def test_records_may_have_times_and_are_refused_if_a_field_is_missing(engine: str) -> None:
    dtype = [("day", "M8[D]"), ("number", "i8")]
    index = Index([("2024-01-02", 5), ("2023-12-31", 7)], dtype=dtype, engine=engine)
    assert list(index) == [(np.datetime64("2023-12-31"), 7), (np.datetime64("2024-01-02"), 5)]
    assert index.range(("2024",)).tolist() == index.keys()[1:].tolist()
    assert ("2024-01-02", 5) in index
    for wrong in (("NaT", 1), (float("nan"), 1)):
        with pytest.raises((ValueError, TypeError)):
            index.insert(wrong)
    with pytest.raises(ValueError, match="not a value"):
        index.insert(("2024",))
    with pytest.raises(TypeError, match="tuple"):
        index.bisect_left(5)
    with pytest.raises(TypeError, match="fields"):
        index.bisect_left(("2024", 1, 2))
    with pytest.raises(TypeError, match="supported"):
        Index([], dtype=[("a", "U5"), ("b", "i8")])
    with pytest.raises(TypeError, match="dtype"):
        Index([(1, 2)])


def test_packed_texts_are_checked_by_the_extension() -> None:
    native = pytest.importorskip("doraemon._native")
    texts = pack(["a", "b"], True, "native")
    wrong = np.array([0, 5, 1])
    codes = np.zeros(2, dtype=np.uint64)
    with pytest.raises(ValueError, match="offsets"):
        native.Tree(texts.data, wrong, codes)
    with pytest.raises(ValueError, match="order"):
        native.Tree(texts.data[::-1].copy(), texts.offsets, codes)
    tree = native.Tree(texts.data, texts.offsets, codes)
    with pytest.raises(ValueError, match="offsets"):
        tree.find_many(texts.data, wrong, None, codes)
    with pytest.raises(ValueError, match="as many"):
        tree.find_many(texts.data, texts.offsets, None, codes[:1])
    with pytest.raises(ValueError, match="as many"):
        tree.find_items(["a"], True, None, codes)
    assert tree.find_items(["a", 5], True, None, codes) == 1
    with pytest.raises(IndexError):
        native.unpack(texts.data, texts.offsets, np.array([2]), True)
    with pytest.raises(ValueError, match="fit"):
        native.gather(texts.data, texts.offsets, np.array([0, 7]), np.zeros(2, dtype=np.uint8))
