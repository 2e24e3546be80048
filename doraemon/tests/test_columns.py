"""Columns of pandas and Arrow as keys and values, and Arrow tables as results."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from doraemon import Index, columns

NUMBERS = ["uint64", "int64", "uint32", "int32", "float64", "float32"]
BERLIN = "Europe/Berlin"


@pytest.fixture
def pd() -> Any:
    return pytest.importorskip("pandas", reason="pandas is not installed: its columns are not tested")


@pytest.fixture
def pa() -> Any:
    return pytest.importorskip("pyarrow", reason="pyarrow is not installed: its columns are not tested")


# ---- pandas


@pytest.mark.parametrize("dtype", [*NUMBERS, "datetime64[ns]", "datetime64[us]"])
def test_a_series_and_a_pandas_index_are_keys(pd: Any, dtype: str) -> None:
    keys = np.array([5, 1, 3, 3], dtype=dtype)
    for column in (pd.Series(keys, index=[9, 8, 7, 6]), pd.Index(keys)):
        index = Index.from_pandas(column)
        assert index.dtype == dtype
        np.testing.assert_array_equal(index.keys(), np.sort(keys))


@pytest.mark.parametrize("dtype", ["Int64", "Float32", "UInt32"])
def test_nullable_columns_are_keys_and_missing_ones_are_refused(pd: Any, dtype: str) -> None:
    assert Index.from_pandas(pd.Series([5, 1, 3], dtype=dtype)).dtype == dtype.lower()
    with pytest.raises(ValueError, match=r"missing.*dropna\(\)"):
        Index.from_pandas(pd.Series([5, None, 3], dtype=dtype))


@pytest.mark.parametrize("given", [[1.5, None], ["2026-01-01", None]])
def test_what_numpy_says_is_missing_is_refused(pd: Any, given: list[Any]) -> None:
    column = pd.Series(given) if isinstance(given[0], float) else pd.Series(pd.to_datetime(given))
    with pytest.raises(ValueError, match="has no place in an order: drop such keys"):
        Index.from_pandas(column)


@pytest.mark.parametrize("dtype", ["int64[pyarrow]", "double[pyarrow]", f"timestamp[ns, tz={BERLIN}][pyarrow]"])
def test_arrows_dtypes_in_pandas_are_keys(pd: Any, pa: Any, dtype: str) -> None:
    column = pd.Series(pa.array([3, 1, 2], pa.int64()).cast(pd.ArrowDtype.construct_from_string(dtype).pyarrow_dtype))
    index = Index.from_pandas(column.astype(dtype))
    np.testing.assert_array_equal(index.keys().astype(np.int64), [1, 2, 3])


def test_times_with_a_zone_are_of_utc_and_keep_their_unit(pd: Any) -> None:
    times = pd.to_datetime(["2026-07-01 12:00", "2026-01-01 12:00"]).tz_localize(BERLIN).as_unit("ms")
    index = Index.from_pandas(times, [7, 1])
    assert index.dtype == "datetime64[ms]"
    assert index["2026-01-01T11:00"] == index[times[1]] == 1
    assert index["2026-07-01T10:00"] == 7


def test_values_of_pandas_are_taken_in_the_order_of_the_keys(pd: Any) -> None:
    frame = pd.DataFrame({"key": [3, 1, 2], "value": [0.3, 0.1, 0.2]})
    for values in (frame["value"], frame["value"].array, [0.3, 0.1, 0.2]):
        assert Index.from_pandas(frame["key"], values).values().tolist() == [0.1, 0.2, 0.3]
    assert Index.from_pandas(pd.Index(frame["key"]), frame["value"])[3] == 0.3


def test_values_of_other_labels_are_refused(pd: Any) -> None:
    keys, values = pd.Series([3, 1], index=[0, 1]), pd.Series([0.3, 0.1], index=[1, 0])
    with pytest.raises(ValueError, match=r"labels: give values.reindex\(keys.index\)"):
        Index.from_pandas(keys, values)
    assert Index.from_pandas(keys, values.reindex(keys.index))[3] == 0.1
    assert Index.from_pandas(keys, values.array)[3] == 0.3


def test_what_is_no_column_is_refused_with_the_remedy(pd: Any) -> None:
    with pytest.raises(TypeError, match=r"keys in a DataFrame: give a Series, as frame\['column'\]"):
        Index.from_pandas(pd.DataFrame({"a": [1]}))
    with pytest.raises(TypeError, match="keys in a list"):
        Index.from_pandas([1, 2])


# ---- Arrow


@pytest.mark.parametrize("dtype", NUMBERS)
def test_arrow_arrays_and_chunked_ones_are_keys_and_queries(pa: Any, dtype: str) -> None:
    keys = pa.array(np.array([5, 1, 3, 3], dtype=dtype))
    for column in (keys, pa.chunked_array([keys[:1], keys[1:]]), keys.dictionary_encode(), keys[:0]):
        index = Index.from_arrow(column)
        assert index.dtype == dtype
        np.testing.assert_array_equal(index.keys(), np.sort(np.asarray(column)))
    index = Index.from_arrow(keys)
    assert index.searchsorted(pa.chunked_array([keys])).tolist() == [3, 0, 1, 1]
    assert pa.scalar(3, pa.int64()) in index or index.dtype.kind == "f"


def test_a_column_of_one_chunk_is_read_where_it_lies(pa: Any) -> None:
    column = pa.array([3, 1, 2], pa.timestamp("ns", BERLIN))
    address = column.buffers()[1].address
    for given in (column, pa.chunked_array([column])):
        assert columns.arrow_columns(given, None)[0].to_numpy().ctypes.data == address


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, BERLIN])
def test_timestamps_keep_their_unit_and_come_back_with_their_zone(pa: Any, unit: str, zone: str | None) -> None:
    column = pa.array([1_800_000_000, 3, -5], pa.timestamp(unit, zone))
    index = Index.from_arrow(column, pa.array(["late", "early", "before"]))
    assert index.dtype == f"datetime64[{unit}]"
    table = index.to_arrow(zone=zone)
    assert table["key"].type == column.type
    assert table["key"].to_pylist() == sorted(column.to_pylist())
    assert table["value"].to_pylist() == ["before", "early", "late"]


def test_dates_are_days(pa: Any) -> None:
    index = Index.from_arrow(pa.array([20_000, 3], pa.date32()))
    assert index.dtype == "datetime64[D]"
    assert index.to_arrow()["key"].type == pa.date32()


def test_nulls_are_refused_with_the_remedy(pa: Any) -> None:
    column = pa.chunked_array([[1], [None, 3]])
    with pytest.raises(ValueError, match=r"missing: drop such entries with drop_null\(\), or fill .* fill_null\(\)"):
        Index.from_arrow(column)
    with pytest.raises(ValueError, match=r"drop_null\(\)"):
        Index.from_arrow(pa.array([1, 2, 3]), column)
    assert Index.from_arrow(column.drop_null()).keys().tolist() == [1, 3]


def test_a_table_is_refused_with_the_remedy(pa: Any) -> None:
    with pytest.raises(TypeError, match=r"keys in a Table: give .* table\['column'\]"):
        Index.from_arrow(pa.table({"a": [1]}))


def test_types_without_keys_are_refused(pa: Any) -> None:
    for column in (pa.array([1], pa.duration("s")), pa.array([1], pa.time64("us")), pa.array([True])):
        with pytest.raises(TypeError, match="not supported: convert them to"):
            Index.from_arrow(column)


def test_a_table_of_a_range_is_of_keys_and_values(pa: Any) -> None:
    index = Index([5, 1, 3], [0.5, 0.1, 0.3])
    index.update(4, 0.4)
    assert index.to_arrow(2, 5).to_pydict() == {"key": [3, 4], "value": [0.3, 0.4]}
    assert Index([3, 3, 1]).snapshot().to_arrow().to_pydict() == {"key": [1, 3, 3]}
    assert Index(dtype="uint32").to_arrow()["key"].type == pa.uint32()


def test_texts_and_records_come_from_columns_and_go_back_to_them(pd: Any, pa: Any) -> None:
    for words in (["pear", "fig", "", "fig"], [b"pear", b"fig", b"\0", b"fig"]):
        column = pa.array(words)
        for given in (column, pa.chunked_array([column[:1], column[1:]]), column.dictionary_encode(), column[:0]):
            table = Index.from_arrow(given).to_arrow()
            assert table["key"].type == column.type
            assert table["key"].to_pylist() == sorted(given.to_pylist())
    assert Index.from_pandas(pd.Series(["b", "a"]), [2, 1]).to_arrow("b").to_pydict() == {"key": ["b"], "value": [2]}
    records = Index([(2, 0.5), (1, 1.5)], dtype=[("a", "i4"), ("b", "f8")])
    assert records.to_arrow()["key"].to_pylist() == [{"a": 1, "b": 1.5}, {"a": 2, "b": 0.5}]
    with pytest.raises(ValueError, match=r"missing.*drop_null\(\)"):
        Index.from_arrow(pa.array(["a", None]))


def test_zones_and_units_that_arrow_does_not_have_are_refused(pa: Any) -> None:
    with pytest.raises(TypeError, match="keys of dtype int64 have no zone"):
        Index([1]).to_arrow(zone="UTC")
    with pytest.raises(TypeError, match="have no zone"):
        Index(np.array([1], "datetime64[D]")).to_arrow(zone="UTC")
    with pytest.raises(TypeError, match=r"Arrow has no times like datetime64\[h\]: .* astype\('datetime64\[s\]'\)"):
        Index(np.array([1], "datetime64[h]")).to_arrow()


# ---- both


def test_options_are_those_of_an_index(pd: Any, pa: Any) -> None:
    for index in (
        Index.from_pandas(pd.Series([1]), dtype="float64", engine="numpy", threads=2),
        Index.from_arrow(pa.array([1]), dtype="float64", engine="numpy", threads=2),
    ):
        assert (index.dtype, index.explain().engine, index._threads) == ("float64", "numpy", 2)


@pytest.mark.parametrize("make", [Index.from_pandas, Index.from_arrow, lambda keys: Index(keys).to_arrow()])
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"(pandas|pyarrow) is not installed: install it with `pip install \1`"):
        make([1])
