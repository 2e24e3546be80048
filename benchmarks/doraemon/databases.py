"""Databases in memory as rivals: SQLite's B-tree and DuckDB's ART index, asked through their Python packages.

Both hold pairs of int64. Statements are prepared, or found prepared by their text, and each runs in a transaction that
is open already (SQLite) or of its own (DuckDB), without a journal or a file.
"""

from __future__ import annotations

import sqlite3
from typing import Any

import duckdb
import numpy as np
import pyarrow
from numpy.typing import NDArray
from sosd import Keys

Ints = NDArray[np.int64]
READ = "SELECT value FROM pairs WHERE key = "
UPDATE = "UPDATE pairs SET value = {} WHERE key = {}"
INSERT = "INSERT INTO pairs VALUES ({}, {})"
SCAN = "SELECT key, value FROM pairs WHERE key >= {} ORDER BY key LIMIT {}"
MODIFY = "UPDATE pairs SET value = value + {} WHERE key = {}"


def signed(keys: Keys) -> Ints:
    """The same order in int64, which is all that SQLite has."""
    return (keys ^ np.uint64(1 << 63)).view(np.int64)


def in_order(keys: Ints, values: Ints) -> list[Ints]:
    """Pairs by their keys, in which order both databases store them most compactly."""
    order = np.argsort(keys)
    return [keys[order], values[order]]


class Sqlite:
    """A table without row numbers, that is a B-tree of the keys."""

    def __init__(self, keys: Ints, values: Ints) -> None:
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("CREATE TABLE pairs (key INTEGER PRIMARY KEY, value INTEGER) WITHOUT ROWID")
        connection.execute("BEGIN")
        pairs = zip(*(column.tolist() for column in in_order(keys, values)), strict=True)
        connection.executemany(INSERT.format("?", "?"), pairs)
        self._execute = connection.cursor().execute

    def read(self, key: int, default: int | None = None) -> Any:
        found = self._execute(READ + "?", (key,)).fetchone()
        return default if found is None else found[0]

    def update(self, key: int, value: int) -> None:
        self._execute(UPDATE.format("?", "?"), (value, key))

    def insert(self, key: int, value: int) -> None:
        self._execute(INSERT.format("?", "?"), (key, value))

    def scan(self, key: int, length: int) -> int:
        return len(self._execute(SCAN.format("?", "?"), (key, length)).fetchall())

    def modify(self, key: int, value: int) -> None:
        self._execute(MODIFY.format("?", "?"), (value, key))


class Duck:
    """A table whose primary key DuckDB keeps in an adaptive radix tree; one thread."""

    def __init__(self, keys: Ints, values: Ints) -> None:
        self._connection = duckdb.connect()
        self._execute = self._connection.execute
        self._execute("SET threads TO 1")
        self._execute("CREATE TABLE pairs (key BIGINT PRIMARY KEY, value BIGINT)")
        self._connection.register("given", pyarrow.table(in_order(keys, values), ["key", "value"]))
        self._execute("INSERT INTO pairs SELECT * FROM given")
        self._connection.unregister("given")
        self._execute(f"PREPARE read AS {READ}$1")
        self._execute("PREPARE change AS " + UPDATE.format("$2", "$1"))
        self._execute("PREPARE put AS " + INSERT.format("$1", "$2"))
        self._execute("PREPARE scan AS " + SCAN.format("$1", "$2"))
        self._execute("PREPARE modify AS " + MODIFY.format("$2", "$1"))

    def read(self, key: int, default: int | None = None) -> Any:
        found = self._execute(f"EXECUTE read({key})").fetchone()
        return default if found is None else found[0]

    def update(self, key: int, value: int) -> None:
        self._execute(f"EXECUTE change({key}, {value})")

    def insert(self, key: int, value: int) -> None:
        self._execute(f"EXECUTE put({key}, {value})")

    def scan(self, key: int, length: int) -> int:
        return len(self._execute(f"EXECUTE scan({key}, {length})").fetchall())

    def modify(self, key: int, value: int) -> None:
        self._execute(f"EXECUTE modify({key}, {value})")

    def find(self, queries: Ints) -> Ints:
        """The value of each query, all of which are there: a join with a table of the queries and their places."""
        asked = pyarrow.table({"place": np.arange(len(queries)), "key": queries})
        self._connection.register("asked", asked)
        found = self._execute("SELECT place, value FROM asked JOIN pairs USING (key)").fetchnumpy()
        values = np.empty(len(queries), dtype=np.int64)
        values[found["place"]] = found["value"]
        return values
