"""What NumPy and pandas users may hand in, and what they may do with an index.

Whatever holds keys, queries or values means the same as its items one by one; nothing is rounded, cut off or left out
without a word, and nothing that was handed in or out is shared with the index.
"""

from __future__ import annotations

import array
import copy
import datetime
import pickle
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from domains import DTYPES

from doraemon import Index
from doraemon.inputs import as_number

pd = pytest.importorskip("pandas", reason="pandas users hand in what pandas makes")

TICKS = [1, 2, 1000, 1001]
NUMBERS = [dtype for dtype in DTYPES if not dtype.startswith("datetime")]
UNITS = ["Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as"]


# ---- keys and queries of any container


def strided(keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.repeat(keys, 3)[::3]


def read_only(keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    keys = keys.copy()
    keys.flags.writeable = False
    return keys


def field(keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    records = np.zeros(len(keys), [("other", "i1"), ("key", keys.dtype)])
    records["key"] = keys
    return records["key"]  # neither contiguous nor aligned


HOLDERS: dict[str, Any] = {
    "array": np.copy,
    "strided": strided,
    "reversed": lambda keys: keys[::-1].copy()[::-1],
    "read-only": read_only,
    "field of records": field,
    "big-endian": lambda keys: keys.astype(keys.dtype.newbyteorder(">")),
    "masked array without masks": np.ma.array,
    "Series": pd.Series,
    "Series with another index": lambda keys: pd.Series(keys, index=range(len(keys))[::-1]),
    "Index": pd.Index,
    "column": lambda keys: pd.DataFrame({"key": keys, "other": 1})["key"],
    "categorical": lambda keys: pd.Series(keys).astype("category"),
    "list": lambda keys: list(keys),
    "tuple": tuple,
    "generator": lambda keys: (key for key in keys),
    "dict's keys": lambda keys: dict.fromkeys(keys).keys(),
    "another index": lambda keys: Index(keys),
    "snapshot": lambda keys: Index(keys).snapshot(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("holder", HOLDERS)
def test_keys_and_queries_in_any_container(holder: str, dtype: str, engine: str) -> None:
    keys = np.array(TICKS).astype(dtype)
    hold = HOLDERS[holder]
    index = Index(hold(keys), dtype=dtype, engine=engine)
    np.testing.assert_array_equal(index.keys(), keys)
    assert index.searchsorted(hold(keys)).tolist() == [0, 1, 2, 3]
    assert index.contains(hold(keys)).tolist() == [True] * 4
    assert index.count(hold(keys), hold(keys)).tolist() == [0] * 4
    prices = Index(hold(keys), hold(np.arange(4)), dtype=dtype, engine=engine)
    assert prices.get_many(hold(keys)).tolist() == [0, 1, 2, 3]
    prices.extend(hold(keys[:2]), hold(np.array([7, 8])))
    assert prices.values().tolist() == [7, 8, 2, 3]
    assert prices.discard_many(hold(keys[1:])) == 3


@pytest.mark.parametrize(
    "holder", ["array", "Series", "Index", "column", "masked array without masks", "another index"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_is_that_of_the_container(holder: str, dtype: str) -> None:
    if holder == "Index" and dtype.endswith("[D]"):
        dtype = "datetime64[s]"  # pandas has no days
    keys = np.array(TICKS).astype(dtype)
    held = HOLDERS[holder](keys)
    assert Index(held).dtype == np.asarray(held).dtype


@pytest.mark.parametrize("code", ["i", "I", "q", "Q", "f", "d"])
def test_buffers(code: str, engine: str) -> None:
    held = array.array(code, TICKS)
    for buffer in (held, memoryview(held), memoryview(np.array(held))):
        index = Index(buffer, engine=engine)
        assert index.dtype == np.asarray(held).dtype
        assert index.searchsorted(buffer).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_item_alone_is_as_good_as_all_together(dtype: str, engine: str) -> None:
    keys = np.array(TICKS).astype(dtype)
    index = Index(keys, engine=engine)
    scalars = [pd.Series(keys).tolist(), list(keys), [np.array(key) for key in keys], list(pd.Index(keys))]
    for items in scalars:
        assert [index.bisect_left(item) for item in items] == [0, 1, 2, 3]
        assert all(item in index for item in items)
        assert index.searchsorted(items).tolist() == [0, 1, 2, 3]
        assert index.searchsorted(np.array(items, dtype=object)).tolist() == [0, 1, 2, 3]
        changed = Index(keys[:0], engine=engine)
        for item in items:
            changed.insert(item)
        np.testing.assert_array_equal(changed.keys(), keys)
        assert changed.discard(items[2])
        np.testing.assert_array_equal(changed.keys(), keys[[0, 1, 3]])


@pytest.mark.parametrize("given", ["abc", b"abc", 5, 0.5, None, np.int64(5), np.datetime64("2020"), pd.Timestamp(0)])
def test_single_items_are_no_sequence(given: Any) -> None:
    with pytest.raises(TypeError, match="not a sequence"):
        Index(given)
    with pytest.raises(TypeError, match="not a sequence"):
        Index([1]).searchsorted(given)


@pytest.mark.parametrize(
    "given", [np.zeros((2, 2)), np.array(5), pd.DataFrame({"a": [1], "b": [2]}), memoryview(np.zeros((2, 2)))]
)
def test_other_dimensions_are_refused(given: Any) -> None:
    for ask in (lambda: Index(given, dtype="float64"), lambda: Index([0.5]).contains(given)):
        with pytest.raises(ValueError, match="ravel"):
            ask()


# ---- what is missing


MISSING = {
    "masked ints": np.ma.array([1, 2], mask=[False, True]),
    "masked floats": np.ma.array([1.0, 2.0], mask=[True, False]),
    "masked times": np.ma.array(np.array([1, 2], "M8[ns]"), mask=[True, False]),
    "masked records": np.ma.array([(1, 2)], dtype=[("a", int), ("b", int)], mask=[(False, True)]),
    "Int64": pd.Series([1, None], dtype="Int64"),
    "UInt64": pd.Series([2**63 + 1, None], dtype="UInt64"),
    "Float64": pd.array([1.0, None], dtype="Float64"),
    "categories": pd.Categorical([2**53 + 1, None]),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_entries_are_refused(name: str, engine: str) -> None:
    given = MISSING[name]
    index = Index(np.array([1, 2], "M8[ns]" if "times" in name else np.int64), [1, 2], engine=engine)
    asks = [lambda: Index(given), lambda: index.searchsorted(given), lambda: index.contains(given)]
    asks += [lambda: index.discard_many(given), lambda: index.count(given, given), lambda: index.get_many(given, 0)]
    asks += [lambda: index.extend(given, [0] * len(given)), lambda: Index(np.arange(len(given)), given)]
    for ask in asks:
        with pytest.raises(ValueError, match=r"(masked|missing).*(compressed|dropna)"):
            ask()
    assert len(index) == 2


@pytest.mark.parametrize("one", [np.ma.masked, np.ma.array(1, mask=True), pd.NA, pd.NaT, None, np.nan, Decimal("nan")])
@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "datetime64[ns]"])
def test_a_missing_key_is_refused(one: Any, dtype: str, engine: str) -> None:
    index = Index(np.array([0, 1], dtype), engine=engine)
    for ask in (index.bisect_left, index.__contains__, index.insert, index.discard, index.find_le):
        with pytest.raises((TypeError, ValueError), match=r"masked|not a number|not a time|no place"):
            ask(one)
    for batch in (index.contains, index.extend, index.discard_many):
        with pytest.raises((TypeError, ValueError), match=r"masked|not a number|not a time|no place"):
            batch([one])
    assert len(index) == 2


def test_missing_values_are_refused_where_they_would_become_numbers() -> None:
    prices = Index([1, 2], [10, 20])
    for ask in (
        lambda: Index([1, 2], [1, np.ma.masked]),
        lambda: prices.update(1, np.ma.masked),
        lambda: prices.extend([1], [np.ma.masked]),
        lambda: prices.get_many([5], default=np.ma.masked),
    ):
        with pytest.raises(ValueError, match="masked"):
            ask()
    kept = Index([1, 2], pd.Series([2**63, None], dtype="UInt64").astype(object))
    assert (kept[1], kept[2]) == (2**63, pd.NA)


# ---- numbers are compared exactly


@pytest.mark.parametrize("dtype", NUMBERS)
def test_numbers_of_other_types_are_compared_exactly(dtype: str, engine: str) -> None:
    index = Index(np.array([0, 1, 2, 2**24]).astype(dtype), engine=engine)
    ordered = [Fraction(key) for key in index.keys().tolist()]
    third, tiny = np.longdouble(1) / 3, np.nextafter(np.longdouble(1), np.longdouble(2))
    asked: list[Any] = [third, tiny, -tiny, np.longdouble("1e400"), np.longdouble("-1e400"), np.longdouble(2)]
    asked += [
        Fraction(1, 3),
        Fraction(5, 2),
        Fraction(2),
        Decimal("1.0000000000000000000001"),
        Decimal(1),
        Decimal("1e999"),
    ]
    asked += [np.longdouble(2**24) + np.longdouble("1e-9"), np.float16(1.5), np.longdouble("inf"), Decimal("-inf")]
    for query in asked:
        infinite = query in (np.inf, -np.inf)
        exact = float(query) if infinite else Fraction(*query.as_integer_ratio())
        assert index.bisect_left(query) == sum(key < exact for key in ordered)
        assert index.bisect_right(query) == sum(key <= exact for key in ordered)
        assert (query in index) == (exact in ordered)
    assert index.searchsorted(asked).tolist() == [index.bisect_left(query) for query in asked]
    long = np.array([query for query in asked if isinstance(query, np.longdouble)])
    assert index.searchsorted(long, "right").tolist() == [index.bisect_right(query) for query in long]
    assert index.contains(long).tolist() == [query in index for query in long]


@pytest.mark.parametrize("dtype", ["Int64", "UInt64", "int64[pyarrow]", "uint64[pyarrow]"])
def test_nullable_integers_keep_all_digits(dtype: str, engine: str) -> None:
    if "pyarrow" in dtype:
        pytest.importorskip("pyarrow", reason="the dtype is pyarrow's")
    given = pd.Series([2**53 + 1, 2**62 + 1], dtype=dtype)
    index = Index(given, values=given, engine=engine)
    assert index.dtype == index.values().dtype == np.dtype(dtype.lower().split("[")[0])
    assert index.keys().tolist() == index.values().tolist() == [2**53 + 1, 2**62 + 1]
    assert index.contains(given).all() and not index.contains(given - 1).any()
    assert Index([1], dtype=given.dtype).dtype == index.dtype


@pytest.mark.parametrize("dtype", ["Float32", "Float64", "float64[pyarrow]"])
def test_nullable_floats(dtype: str) -> None:
    if "pyarrow" in dtype:
        pytest.importorskip("pyarrow", reason="the dtype is pyarrow's")
    index = Index(pd.Series([0.5, 1.5], dtype=dtype))
    assert index.dtype == np.dtype(dtype.lower().split("[")[0])
    assert 1.5 in index


@pytest.mark.parametrize(
    "given",
    [
        pd.Series([True], dtype="boolean"),
        pd.period_range("2020", periods=2),
        pd.interval_range(0, 2),
        pd.MultiIndex.from_tuples([(1, 2)]),
        pd.to_timedelta([1, 2]),
        pd.Series([1, 2], dtype=object),
        np.array([1, 2], dtype=np.longdouble),
    ],
)
def test_other_dtypes_are_refused_in_plain_words(given: Any) -> None:
    with pytest.raises(TypeError, match="not supported: convert"):
        Index(given)
    with pytest.raises(TypeError, match="not supported: convert"):
        Index([1], dtype=given.dtype)


# ---- times


@pytest.mark.parametrize("unit", UNITS)
def test_times_of_every_unit(unit: str, engine: str, tmp_path: Path) -> None:
    times = np.array([-5, 0, 1, 2, 30], f"M8[{unit}]")
    index = Index(times, np.arange(5), engine=engine)
    assert index.dtype == times.dtype
    assert [index.bisect_left(time) for time in times] == index.searchsorted(times).tolist() == [0, 1, 2, 3, 4]
    assert index.searchsorted(list(times), "right").tolist() == [1, 2, 3, 4, 5]
    index.save(tmp_path / "times")
    np.testing.assert_array_equal(Index.open(tmp_path / "times", engine=engine).keys(), times)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_keep_all_digits(unit: str, engine: str) -> None:
    times = pd.DatetimeIndex(np.array(TICKS, f"M8[{unit}]"))
    index = Index(times, values=TICKS, engine=engine)
    assert [index[time] for time in times] == index.get_many(times).tolist() == TICKS
    assert index.contains(list(times)).all()
    assert pd.Timestamp(1002, unit=unit) not in index
    assert [index.bisect_right(time) for time in times] == [1, 2, 3, 4]
    assert index.range(times[1], times[3]).tolist() == times.to_numpy()[1:3].tolist()
    assert index.count(times[1], times[3]) == 2
    assert index.discard(times[3])
    assert index.keys().astype(np.int64).tolist() == [1, 2, 1000]
    index.insert(times[3], 5)
    assert index.keys().astype(np.int64).tolist() == TICKS
    assert index.discard_many(times[:2].tolist()) == 2


@pytest.mark.parametrize("hold", [pd.Series, pd.Index, pd.array, lambda times: times.astype(object), list])
def test_times_with_a_zone_are_those_of_utc(hold: Any, engine: str) -> None:
    zoned = pd.date_range("2020-03-28", periods=4, freq="D", tz="Europe/Berlin")  # the clock changes on the way
    plain = zoned.tz_convert("UTC").tz_localize(None).to_numpy()
    dtype = None if hasattr(hold(zoned), "tz") or hold is pd.Series else plain.dtype
    index = Index(hold(zoned), dtype=dtype, engine=engine)
    np.testing.assert_array_equal(index.keys(), plain)
    assert index.searchsorted(hold(zoned)).tolist() == index.searchsorted(plain).tolist() == [0, 1, 2, 3]
    assert [index.bisect_left(time) for time in zoned] == [0, 1, 2, 3]
    assert [time.to_pydatetime() in index for time in zoned] == [True] * 4
    index.insert(zoned[0])
    assert index.bisect_right(plain[0]) == 2


def test_what_is_a_time_and_what_is_not(engine: str) -> None:
    index = Index(np.array(["2020-01-01", "2020-02-01"], "M8[ns]"), engine=engine)
    utc = datetime.timezone(datetime.timedelta(hours=2))
    for one in (datetime.date(2020, 1, 1), "2020-01-01", datetime.datetime(2020, 1, 1, 2, tzinfo=utc)):
        assert one in index
    assert index.searchsorted(np.array(["2020-01-01", "2020-01-02"])).tolist() == [0, 1]
    for other in (pd.Period("2020-01"), 5, 0.5, pd.Timedelta(5), np.timedelta64(5), "yesterday", np.int64(5)):
        with pytest.raises(TypeError, match="not a time"):
            index.bisect_left(other)
        with pytest.raises(TypeError, match=r"not a time|not a sequence"):
            index.searchsorted([other])
    for number in (pd.Timestamp(5), np.datetime64(5, "ns"), np.timedelta64(5), pd.Timedelta(5), "5", np.bool_(True)):
        with pytest.raises(TypeError, match="not a number"):
            Index([5], engine=engine).bisect_left(number)


# ---- values


RECORDS: dict[str, np.dtype[Any]] = {
    "plain": np.dtype([("a", "i4"), ("b", "f8")]),
    "nested": np.dtype([("a", "i4"), ("point", [("x", "f8"), ("y", "f8")])]),
    "titled": np.dtype([(("a title", "a"), "i4"), ("b", "f4")]),
    "aligned": np.dtype([("a", "i1"), ("b", "f8")], align=True),
    "with a hole": np.dtype({"names": ["a", "b"], "formats": ["i1", "f8"], "offsets": [0, 16], "itemsize": 40}),
    "out of order": np.dtype({"names": ["a", "b"], "formats": ["f8", "i4"], "offsets": [8, 0], "itemsize": 16}),
    "overlapping": np.dtype({"names": ["a", "b"], "formats": ["i8", "i4"], "offsets": [0, 0]}),
    "with arrays": np.dtype([("a", "i4", (2, 3)), ("b", "U5"), ("c", "M8[ns]"), ("d", "?")]),
    "of records": np.dtype((np.record, [("a", "i4"), ("b", "f8")])),
    "big-endian": np.dtype([("a", ">i4"), ("b", [("x", ">f8")])]),
    "without fields": np.dtype([]),
}
PLAIN = ["?", "i1", "u2", "f2", "f4", "g", "F", "G", "M8[s]", "M8[25s]", "m8[ns]", "m8", "S3", "U4", "V5", ">i4", ">U2"]
VALUES = RECORDS | {name: np.dtype(name) for name in PLAIN}


def some(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Three values, not all zero."""
    array = np.zeros(3, dtype)
    for name in dtype.names or ():
        array[name].T[...] = some(dtype[name].base)
    if dtype.names is None:
        array[:2] = np.array([1, 0]).astype("V1" if dtype.kind == "V" else dtype)
    return array


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_from_everywhere(name: str, engine: str, tmp_path: Path) -> None:
    dtype = VALUES[name]
    values = some(dtype)
    native = dtype if dtype.isnative else dtype.newbyteorder("=")
    index = Index([1, 2, 3], values, engine=engine)
    index.save(tmp_path / "index")
    for back in (index, Index.open(tmp_path / "index", engine=engine), pickle.loads(pickle.dumps(index)), index.copy()):
        found = back.values()
        assert found.dtype == index.values().dtype == native
        assert found.dtype.type is values.dtype.type
        assert found.dtype.fields == native.fields
        assert found.dtype.isalignedstruct == dtype.isalignedstruct
        assert [repr(one) for one in found.tolist()] == [repr(one) for one in values.tolist()]
        back.extend([3, 9], back.values()[:2])
        back.update(10, back[1])
        back.compact()
        assert repr(back[9].tolist() if hasattr(back[9], "tolist") else back[9]) == repr(values.tolist()[1])


@pytest.mark.parametrize("values", [np.array([None, {}]), np.array(["a", "b"], np.dtypes.StringDType())])
def test_values_that_no_file_can_hold_are_refused_before_anything_is_written(values: Any, tmp_path: Path) -> None:
    index = Index([1, 2], values)
    index.update(3, index[1])
    with pytest.raises(TypeError, match="cannot be saved"):
        index.save(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []
    assert pickle.loads(pickle.dumps(index)).values().tolist() == [*values, values[0]]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_was_handed_out_changes_nothing(name: str, engine: str, tmp_path: Path) -> None:
    values = some(RECORDS[name])
    index = Index([1, 2, 3], values, engine=engine)
    index.update(3, values[0])
    index.save(tmp_path / "index")
    for each in (index, Index.open(tmp_path / "index", mmap=True, engine=engine)):
        frozen, before = each.snapshot(), repr(each.values())
        for record in (each[1], each.get(3), each.values()[0], each.get_many([1])[0], each.items()[1][0], frozen[3]):
            for field_name in record.dtype.names:
                record[field_name] = np.ones((), record.dtype[field_name])
        assert repr(each.values()) == repr(frozen.values()) == before


def test_records_of_tuples_are_checked_field_by_field(engine: str) -> None:
    index = Index([1], np.array([(1, 2.0, [3, 4])], [("a", "u1"), ("b", "f4"), ("c", "i2", 2)]), engine=engine)
    index.update(2, (5, 0.5, [6, 7]))
    assert index[2].tolist()[:2] == (5, 0.5) and index[2]["c"].tolist() == [6, 7]
    for wrong, error in (((300, 0, [1, 2]), OverflowError), ((0.5, 0, [1, 2]), TypeError), ((1, 2), TypeError)):
        with pytest.raises(error):
            index.update(2, wrong)
    longer = np.array([(300, 2.0, [3, 4])], [("a", "i8"), ("b", "f8"), ("c", "i8", 2)])
    with pytest.raises(OverflowError, match="does not fit"):
        index.extend([2], longer)
    with pytest.raises(TypeError, match="make the map with"):
        index.extend([2], longer[["a", "b"]])
    longer["a"] = 3
    index.extend([2], longer)
    assert index[2]["a"] == 3


#: dtype of a map, values that it has no place for
LOSSES: list[tuple[str, Any]] = [
    ("M8[s]", np.array(["2020-01-01T00:00:00.5"], "M8[ms]")),
    ("M8[s]", [pd.Timestamp(1)]),
    ("M8[D]", [datetime.datetime(2020, 1, 1, 1)]),
    ("M8[ns]", np.array(["0001-01-01"], "M8[D]")),
    ("m8[s]", np.array([5], "m8[ms]")),
    ("m8[s]", [pd.Timedelta(5)]),
    ("f8", [2**53 + 1]),
    ("f8", np.array([2**63 - 1])),
    ("f4", [2**24 + 1]),
    ("f4", [1e300]),
    ("f2", [70000]),
    ("F", [2**24 + 1]),
    ("i8", [2**63]),
    ("u1", [-1]),
    ("i8", [0.5]),
    ("?", [2]),
    ("U3", ["four"]),
    ("U3", [12]),
    ("S3", [b"four"]),
    ("S3", ["abc"]),
    ("U3", [b"ab"]),
    ("U3", ["a\0"]),
    ("V3", [b"abcd"]),
    ("i8", pd.Series(["x"])),
    ("i8", [None]),
    ("f8", ["1.5"]),
    ("f8", [1j]),
]


@pytest.mark.parametrize("number", range(len(LOSSES)))
def test_values_that_would_be_changed_are_refused(number: int, engine: str) -> None:
    dtype, values = LOSSES[number]
    index = Index([1], np.zeros(1, dtype), engine=engine)
    with pytest.raises((TypeError, OverflowError), match=r"make the map with|not a time|not a length"):
        index.extend([1], values)
    if isinstance(values, list):
        with pytest.raises((TypeError, OverflowError), match=r"make the map with|not a time|not a length"):
            index.update(1, values[0])
    assert index.values().tolist() == np.zeros(1, dtype).tolist()


GAINS: list[tuple[str, Any, Any]] = [
    ("M8[s]", [pd.Timestamp("2020-01-01")], np.datetime64("2020-01-01")),
    ("M8[s]", [datetime.datetime(2020, 1, 1)], np.datetime64("2020-01-01")),
    ("M8[s]", [datetime.date(2020, 1, 1)], np.datetime64("2020-01-01")),
    ("M8[s]", np.array(["2020-01-01"], "M8[ns]"), np.datetime64("2020-01-01")),
    ("m8[s]", [datetime.timedelta(seconds=5)], np.timedelta64(5, "s")),
    ("m8[ns]", [pd.Timedelta(5)], np.timedelta64(5, "ns")),
    ("f8", [2**53], 2.0**53),
    ("f8", np.array([2**53], np.uint64), 2.0**53),
    ("f4", [0.1], np.float32(0.1)),
    ("f4", [np.inf], np.inf),
    ("i4", np.array([7], np.uint64), 7),
    ("i4", pd.Series([7], dtype="UInt8"), 7),
    ("U5", ["abc"], "abc"),
    ("F", [3], 3 + 0j),
]


@pytest.mark.parametrize("number", range(len(GAINS)))
def test_values_of_other_types_that_fit_are_taken(number: int, engine: str) -> None:
    dtype, values, expected = GAINS[number]
    index = Index([1], np.zeros(1, dtype), engine=engine)
    index.extend([1], values)
    assert index[1] == expected


@pytest.mark.parametrize(
    "values", [[2**53 + 1, 0.5], [2**63 + 1, -1], [1, "a"], ["a\0", "b"], [b"a\0", b""], [None, 1], [2**70, 1]]
)
def test_lists_of_values_keep_every_item(values: list[Any], engine: str) -> None:
    index = Index([1, 2], values, engine=engine)
    assert index.values().tolist() == values
    assert [index[1], index[2]] == values


def test_values_without_an_order_are_refused() -> None:
    for values in ({1, 2}, {1: 2, 2: 3}, frozenset([1, 2])):
        with pytest.raises(TypeError, match="no order"):
            Index([1, 2], values)
    given = {3: "c", 1: "a"}
    assert Index(given.keys(), given.values()).values().tolist() == ["a", "c"]


# ---- defaults

#: values, default, dtype of what comes back
DEFAULTS: list[tuple[Any, Any, str]] = [
    (np.array([2**53 + 1, 2**63 + 5], "u8"), 0, "u8"),
    (np.array([2**53 + 1, 2**63 + 5], "u8"), np.int8(5), "u8"),
    (np.array([2**53 + 1, 2**63 + 5], "u8"), -1, "O"),
    (np.array([2**53 + 1, 2**63 + 5], "u8"), np.nan, "O"),
    (np.array([2**53 + 1, 2**63 + 5], "u8"), None, "O"),
    (np.array([2**53 + 1, -1], "i8"), np.nan, "O"),
    (np.array([2**53 + 1, -1], "i8"), 2**63, "O"),
    (np.array([2**53 + 1, -1], "i8"), 0.5, "O"),
    (np.array([2**53 + 1, -1], "i8"), "none", "O"),
    (np.array([2**53 + 1, -1], "i8"), np.datetime64(1, "s"), "O"),
    (np.array([1, 2], "i4"), np.nan, "f8"),
    (np.array([1, 2], "u1"), -1, "i8"),
    (np.array([1, 2], "f4"), 0.1, "f8"),
    (np.array([1, 2], "f4"), np.nan, "f4"),
    (np.array([1, 2], "f8"), 2**53 + 1, "O"),
    (np.array([1, 2], "g"), np.longdouble(1) / 3, "g"),
    (np.array([True, False]), 2, "i8"),
    (np.array([True, False]), None, "O"),
    (np.array(["a", "b"]), "longer", "U6"),
    (np.array(["a", "b"]), b"a", "O"),
    (np.array([1, 2], "M8[s]"), np.datetime64(5, "ns"), "O"),
    (np.array([1, 2], "M8[ns]"), np.datetime64("NaT"), "M8[ns]"),
    (np.array([1, 2], "M8[ns]"), pd.NaT, "M8[ns]"),
    (np.array([1, 2], "M8[ns]"), None, "O"),
    (np.array([(1, 2.0), (3, 4.0)], [("a", "i4"), ("b", "f8")]), (0, 0.0), "V12"),
    (np.array([(1, 2.0), (3, 4.0)], [("a", "i4"), ("b", "f8")]), None, "O"),
    (np.array([[1], None], object), [], "O"),
]


def same(one: Any, other: Any) -> bool:
    """Whether two items are equal, numbers exactly, or both missing."""
    one, other = (item.item() if isinstance(item, np.bool_ | np.void) else item for item in (one, other))
    if isinstance(one, int | float | np.number) and one == one:
        return isinstance(other, int | float | np.number) and as_number(one) == as_number(other)
    return bool(one == other) or (one is not None and bool(one != one and other != other))


@pytest.mark.parametrize("number", range(len(DEFAULTS)))
def test_neither_values_nor_the_default_are_changed(number: int, engine: str) -> None:
    values, default, dtype = DEFAULTS[number]
    index = Index([1, 2], values, engine=engine)
    for asked in ([1, 2, 3], [3], [1, 2], []):
        found = index.get_many(asked, default=default)
        assert found.dtype.str[1:] == np.dtype(dtype).str[1:]  # whether or not any is absent
        for key, one in zip(asked, found, strict=True):
            wanted = index.get(key, default)
            assert same(one, wanted), (one, wanted)


# ---- nothing is shared


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "hold", [lambda keys: keys, lambda keys: pd.Series(keys, copy=False), memoryview, lambda keys: keys[:], np.ma.array]
)
def test_what_was_handed_in_may_change_afterwards(hold: Any, dtype: str, engine: str) -> None:
    keys, values = np.arange(0, 100, 10).astype(dtype), np.arange(10)
    if hold is memoryview and keys.dtype.kind == "M":
        hold = np.asarray  # times have no buffers
    index = Index(hold(keys), hold(values), engine=engine)
    multiset, more = Index(hold(keys), engine=engine), Index(keys[:0], values[:0], engine=engine)
    more.extend(hold(keys), hold(values))
    expected = keys.copy()
    keys[3], values[3] = keys[0], -1
    for each in (index, more):
        np.testing.assert_array_equal(each.keys(), expected)
        assert each.values().tolist() == list(range(10))
        each.compact()
    np.testing.assert_array_equal(multiset.keys(), expected)
    assert multiset.contains(expected).all()


def test_a_table_may_change_afterwards(engine: str) -> None:
    table = pd.DataFrame({"id": np.arange(0, 100, 10, dtype=np.uint64)})
    index = Index(table["id"], engine=engine)
    table.loc[3, "id"] = 5
    assert 30 in index and 5 not in index


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_handed_out_may_be_changed(dtype: str, engine: str) -> None:
    index = Index(np.arange(10).astype(dtype), np.arange(10), engine=engine)
    before = index.keys()
    for given in (index.keys(), index.range(), index.values(), *index.items(), np.asarray(index)):
        given[:] = given[0]
    np.testing.assert_array_equal(index.keys(), before)
    assert index.values().tolist() == list(range(10))


# ---- subclasses, copies, pickles


class Named(Index):
    """An index with attributes of its own."""

    def __init__(self, *given: Any, name: str, **options: Any) -> None:
        super().__init__(*given, **options)
        self.name, self.notes = name, ["first"]


class Slotted(Index):
    """The same with slots."""

    __slots__ = ("name", "notes")

    def __init__(self, *given: Any, name: str, **options: Any) -> None:
        super().__init__(*given, **options)
        self.name, self.notes = name, ["first"]


COPIES: dict[str, Any] = {
    "copy()": lambda index: index.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {n}": lambda index, n=n: pickle.loads(pickle.dumps(index, n))
        for n in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


SLOTLESS = ("pickle 0", "pickle 1")  #: protocols that know no slots


@pytest.mark.parametrize(
    ("cls", "how"), [(Named, how) for how in COPIES] + [(Slotted, how) for how in COPIES if how not in SLOTLESS]
)
def test_copies_are_of_the_same_class_with_the_same_attributes(how: str, cls: Any, engine: str) -> None:
    index = cls([1, 2], [10, 20], name="prices", engine=engine, merging="manual", memory=3)
    index.update(3, 30)
    other = COPIES[how](index)
    assert type(other) is cls
    assert (other.name, other.notes) == ("prices", ["first"])
    assert (other.notes is index.notes) == (how in ("copy()", "copy.copy"))
    assert other.explain() == replace(index.explain(), model_bytes=other.explain().model_bytes)
    assert (other._merging, other._state.run.memory.capacity) == ("manual", 3)
    other.update(4, 40)
    other.discard(1)
    other.compact()
    assert (index.keys().tolist(), other.keys().tolist()) == ([1, 2, 3], [2, 3, 4])


@pytest.mark.parametrize("how", [name for name in COPIES if name != "copy()"])
def test_copies_of_snapshots(how: str, engine: str) -> None:
    index = Index([1, 2], [10, 20], engine=engine)
    frozen = COPIES[how](index.snapshot())
    index.update(1, 0)
    assert type(frozen) is type(index.snapshot())
    assert (frozen[1], frozen.explain().engine) == (10, engine)


def test_deep_copies_have_values_of_their_own() -> None:
    index = Index([1], np.array([[5]], object).reshape(1))
    index.update(2, [1, 2])
    shallow, deep = copy.copy(index), copy.deepcopy(index)
    index[2].append(3)
    assert (shallow[2], deep[2]) == ([1, 2, 3], [1, 2])


def test_opening_gives_the_class_that_was_asked(tmp_path: Path) -> None:
    Named([1, 2], name="prices").save(tmp_path / "index")
    assert type(Named.open(tmp_path / "index")) is Named


def test_numpy_and_pandas_see_the_keys(engine: str) -> None:
    index = Index([3, 1, 2], [30, 10, 20], engine=engine)
    assert np.asarray(index).tolist() == list(index) == [1, 2, 3]
    assert list(reversed(index)) == [3, 2, 1]
    assert np.asarray(index, dtype=np.float32).dtype == np.float32
    assert np.isin([1, 5], index).tolist() == [True, False]
    assert np.searchsorted(index, [2, 9]).tolist() == [1, 3]
    assert pd.Series(np.asarray(index.snapshot())).tolist() == [1, 2, 3]
    assert Index(index, engine=engine).keys().tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="ask for a copy"):
        np.asarray(index, copy=False)
