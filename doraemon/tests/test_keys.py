"""The key mapping keeps order and refuses what has none."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pytest
from domains import DTYPES, STRANGE, keys, plain, queries
from hypothesis import given
from hypothesis import strategies as st

from doraemon import Index
from doraemon.keys import NumberType

NUMBERS = [dtype for dtype in DTYPES if not dtype.startswith("datetime")]


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_codes_keep_order_and_decode_to_the_keys(dtype: str, data: st.DataObject) -> None:
    array = np.array(data.draw(st.lists(keys(dtype), min_size=2, max_size=8)), dtype=dtype)
    codes = NumberType.of(dtype).encode(array)
    assert codes.dtype == np.uint64
    np.testing.assert_array_equal(codes[:, None] < codes, array[:, None] < array)
    np.testing.assert_array_equal(NumberType.of(dtype).decode(codes), array)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_a_cut_is_the_least_code_not_below_the_query(dtype: str, data: st.DataObject) -> None:
    kind, query = NumberType.of(dtype), data.draw(queries(dtype))
    code, exact = kind.cut_one(query)
    if code is None:
        assert plain(kind.decode_one(kind.top)) < plain(query) or kind.is_float
        return
    key = plain(kind.decode_one(code))
    assert key >= plain(query)
    assert exact == (key == plain(query))
    lowest = plain(kind.decode_one(0)) if not kind.is_float and kind.dtype.kind != "M" else None
    if code and not exact and lowest != key:
        assert plain(kind.decode_one(code - 1)) < plain(query)


@pytest.mark.parametrize("dtype", ["uint64", "int64", "uint32", "int32", "float64", "float32"])
@pytest.mark.parametrize(
    "other", ["uint8", "int8", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"]
)
def test_queries_of_another_dtype_are_compared_exactly(dtype: str, other: str, engine: str) -> None:
    extremes = np.finfo(other) if other[0] == "f" else np.iinfo(other)
    asked = np.array([extremes.min, extremes.max, 0, 1, 77, extremes.max // 3], dtype=other)
    own = np.finfo(dtype) if dtype[0] == "f" else np.iinfo(dtype)
    index = Index(np.array([own.min, 0, 1, 1, 5, own.max], dtype=dtype), engine=engine)
    ordered = index.keys().tolist()
    for side, strict in (("left", True), ("right", False)):
        expected = [sum(key < q if strict else key <= q for key in ordered) for q in asked.tolist()]
        assert index.searchsorted(asked, side).tolist() == expected  # type: ignore[arg-type]
    assert index.contains(asked).tolist() == [q in ordered for q in asked.tolist()]


@pytest.mark.parametrize("dtype", ["uint64", "int64", "float64"])
def test_python_ints_never_pass_through_float(dtype: str, engine: str) -> None:
    near = [2**53, 2**62, 2**63 - 1024] if dtype == "float64" else [2**53 + 1, 2**62 + 1, 2**63 - 1]
    index = Index(near, dtype=dtype, engine=engine)
    for place, key in enumerate(near):
        assert index.bisect_left(key) == place
        assert [key - 1 in index, key in index, key + 1 in index] == [False, True, False]
        assert index.contains([key - 1, key, key + 1]).tolist() == [False, True, False]


def test_lists_of_large_ints_are_not_guessed_to_be_floats() -> None:
    assert Index([2**63 - 1, 2**62 + 1]).dtype == np.int64
    assert Index([2**64 - 1, 2**53 + 1], dtype="uint64").keys().tolist() == [2**53 + 1, 2**64 - 1]
    with pytest.raises(ValueError, match="wider dtype"):
        Index([2**64 - 1])


def test_zeros_of_both_signs_are_one_key(engine: str) -> None:
    index = Index([-0.0, 0.0], engine=engine)
    assert index.searchsorted(np.array([0.0, -0.0])).tolist() == [0, 0]
    assert index.bisect_right(-0.0) == 2


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_nan_is_refused_with_a_remedy(dtype: str, engine: str) -> None:
    index = Index(np.array([1.0], dtype=dtype), engine=engine)
    for ask in (
        lambda: Index(np.array([1.0, np.nan], dtype=dtype)),
        lambda: index.searchsorted(np.array([np.nan], dtype=dtype)),
        lambda: float("nan") in index,
        lambda: index.insert(float("nan")),
        lambda: index.bisect_left(np.float32("nan")),
    ):
        with pytest.raises(ValueError, match=r"NaN.*np\.isnan"):
            ask()


def test_nat_is_refused_with_a_remedy(engine: str) -> None:
    nat = np.datetime64("NaT", "ns")
    with pytest.raises(ValueError, match=r"NaT.*np\.isnat"):
        Index(np.array([nat]))
    index = Index(np.array(["2020-01-01"], dtype="datetime64[ns]"), engine=engine)
    with pytest.raises(ValueError, match="NaT"):
        index.bisect_left(nat)


def test_times_of_other_units_are_compared_exactly(engine: str) -> None:
    days = np.array(["2020-01-01", "2020-01-02", "2020-01-04"], dtype="datetime64[D]")
    index = Index(days, engine=engine)
    assert index.bisect_left(np.datetime64("2020-01-01T00:00:01")) == 1
    assert index.bisect_left("2020-01-02") == 1
    assert datetime.date(2020, 1, 4) in index
    assert datetime.datetime(2020, 1, 4, 1) not in index
    hours = np.array(["2020-01-01T00", "2020-01-01T01", "2019-12-31T23"], dtype="datetime64[h]")
    assert index.searchsorted(hours, "right").tolist() == [1, 1, 0]
    assert index.contains(hours).tolist() == [True, False, False]
    nanoseconds = Index(days.astype("datetime64[ns]"), engine=engine)
    assert nanoseconds.searchsorted(days).tolist() == [0, 1, 2]
    far = np.array(["0001-01-01", "1677-09-21", "2262-04-11", "2262-04-12", "9999-01-01"], dtype="datetime64[D]")
    assert nanoseconds.searchsorted(far).tolist() == nanoseconds.searchsorted(far, "right").tolist() == [0, 0, 3, 3, 3]
    assert not nanoseconds.contains(far).any()


UNITS = {"as": 1, "ns": 10**9, "us": 10**12, "s": 10**18, "D": 86400 * 10**18, "W": 7 * 86400 * 10**18}


@pytest.mark.parametrize("own", UNITS)
@pytest.mark.parametrize("asked", UNITS)
def test_times_at_the_ends_of_two_units(own: str, asked: str, engine: str) -> None:
    ticks = [-(2**63) + 1, -(2**63) + 2, -86400, -1000, -1, 0, 1, 3, 86400, 10**9, 2**63 - 2, 2**63 - 1]
    index = Index(np.array(ticks).view(f"datetime64[{own}]"), engine=engine)
    queries = np.array(ticks).view(f"datetime64[{asked}]")
    for side, strict in (("left", True), ("right", False)):
        pairs = [[(key * UNITS[own], tick * UNITS[asked]) for key in ticks] for tick in ticks]
        expected = [sum(key < q if strict else key <= q for key, q in row) for row in pairs]
        assert index.searchsorted(queries, side).tolist() == expected  # type: ignore[arg-type]
        ask = index.bisect_left if strict else index.bisect_right
        assert [ask(q) for q in queries] == expected


def test_months_and_years_are_their_first_days(engine: str) -> None:
    days = Index(np.arange("2020-01-30", "2020-03-03", dtype="datetime64[D]"), engine=engine)
    assert days.bisect_left("2020-02") == 2
    assert days.searchsorted(np.array(["2020", "2021"], dtype="datetime64[Y]")).tolist() == [0, 33]
    months = Index(np.array(["2019-12", "2020-01"], dtype="datetime64[M]"), engine=engine)
    assert months.bisect_left(np.datetime64("2020", "Y")) == 1
    with pytest.raises(TypeError, match=r"astype\('datetime64\[M\]'\)"):
        months.bisect_left("2020-01-05")
    with pytest.raises(OverflowError, match="too far"):
        days.bisect_left(np.datetime64(10**9, "Y"))


@pytest.mark.parametrize("dtype", ["complex128", "int16", "V5", "bool", "datetime64", "datetime64[25s]", "float16"])
def test_other_dtypes_are_refused_with_a_remedy(dtype: str) -> None:
    with pytest.raises(TypeError, match=r"convert|unit"):
        Index(np.zeros(2, dtype=dtype))


@pytest.mark.parametrize("query", ["a", None, [1], 1j, np.array([1, 2])])
def test_what_is_not_a_number_is_refused(query: Any, engine: str) -> None:
    with pytest.raises(TypeError, match="is not a number"):
        Index([1, 2], engine=engine).bisect_left(query)


def test_keys_outside_the_dtype_are_refused_when_stored() -> None:
    index = Index([1], dtype="int32")
    for strange in (*STRANGE[1:], 1.5):
        with pytest.raises(ValueError, match="not a value of int32"):
            index.insert(strange)
        with pytest.raises(ValueError, match="not a value of int32"):
            index.extend([1, strange])
    assert len(index) == 1


def test_keys_in_foreign_byte_order_are_understood() -> None:
    assert Index(np.array([3, 1, 2], dtype=">i8")).keys().tolist() == [1, 2, 3]
    assert Index([1, 2, 3]).searchsorted(np.array([2], dtype=">i8")).tolist() == [1]
