"""Text to calibrate and evaluate on: plain files, files of records (JSON, CSV, Parquet), and datasets by name.

A plain file is one document; a record is one document, its text a field of it. Documents are joined by a blank line.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError

#: the field of a record that holds its text, unless another is named
FIELD = "text"
_JSON = (".json", ".jsonl", ".ndjson")
#: suffix of a file -> builder and options with which `datasets` reads it
_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),  # else a document that reads "NA" would be lost
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
}
_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Documents:
    """The documents of one source.

    Attributes:
        source: path of the file, or name of the dataset.
        texts: the text of each document that is not empty.
        records: whether the documents are records; a plain file is one document.
        field: the field of the records that was read; None where the records are strings themselves.
        empty: how many records were left out because their text is missing or blank.
    """

    source: str
    texts: list[str]
    records: bool = False
    field: str | None = None
    empty: int = 0

    @property
    def text(self) -> str:
        """All documents, joined by blank lines."""
        return _SEPARATOR.join(self.texts)

    def sentence(self) -> str:
        """What was read, in words, such as "notes.jsonl (12 documents, field 'text')"."""
        if not self.records:
            return f"{self.source} ({len(self.text):,} characters)"
        field = f", field {self.field!r}" if self.field else ""
        left_out = f", {self.empty:,} empty ones left out" if self.empty else ""
        return f"{self.source} ({len(self.texts):,} documents{field}{left_out})"


def read_documents(source: str | Path, field: str | None = None) -> Documents:
    """Read the documents of a source.

    Args:
        source: a text file in UTF-8; records in .json, .jsonl, .ndjson, .csv, .tsv or .parquet; or a name for
            `datasets` as `name[:config[:split[:column]]]`.
        field: the field of the records that holds their text; default: "text".

    Raises:
        InvalidInputError: the source is missing, unreadable or not what its name says, it has no such field, the field
            holds something other than text, or the package `datasets` is needed and not installed.
    """
    path = Path(source)
    if not path.exists() or path.is_dir():
        _check_name(path)
        return _dataset_documents(str(source), field)
    kind = path.suffix.lower()
    if kind in _JSON:
        return _documents(str(source), _json_records(path), field)
    if kind in _TABLES:
        return _documents(str(source), _table_records(path, kind, field or FIELD), field)
    return Documents(str(source), [_read(path)])


def _check_name(path: Path) -> None:
    if path.suffix or path.is_dir() or len(path.parts) > 2:
        raise InvalidInputError(f"no text file {path}; give a path that exists, or a dataset name.")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # drops the byte order mark that some editors write
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not UTF-8 text ({error}); convert it first.") from error
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read ({error.strerror}); give a text file.") from error


def _json_records(path: Path) -> list[Any]:
    """The records of JSON lines, or of a file that is one list of records or one record."""
    content = _read(path)
    try:
        whole = json.loads(content)
    except ValueError:
        return list(_json_lines(path, content))
    return whole if isinstance(whole, list) else [whole]


def _json_lines(path: Path, content: str) -> Iterator[Any]:
    for number, line in enumerate(content.split("\n"), 1):  # other line breaks may be part of a string
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InvalidInputError(
                    f"line {number} of {path} is no JSON ({error}). Give one record per line, or one list of records; "
                    "if it is plain text, name it .txt."
                ) from error


def _table_records(path: Path, kind: str, field: str) -> list[dict[str, Any]]:
    """The records of a CSV or Parquet file, reduced to one field; where they lack it, the first record as it is."""
    _check_package(f"{path} is read by")
    from datasets import load_dataset

    builder, options = _TABLES[kind]
    try:
        # streamed, so that no copy of the file is left in a cache
        rows = load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
        known = rows.column_names or list(next(iter(rows), {}))
        return list(rows.select_columns([field]) if field in known else rows.take(1))
    except Exception as error:  # the library raises many kinds, all with the same remedy
        raise InvalidInputError(
            f"{path} cannot be read as {builder} ({error.__cause__ or error}); check that it is what its name says."
        ) from error


def _dataset_documents(name: str, field: str | None) -> Documents:
    """The documents in one column of a dataset that is named `name[:config[:split[:column]]]`."""
    _check_package(f"{name!r} is no file, and reading it as a dataset needs")
    from datasets import load_dataset

    dataset, config, split, column = (*name.split(":"), *[""] * 3)[:4]
    try:
        rows = load_dataset(dataset, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds, all with the same remedy
        raise InvalidInputError(
            f"{name!r} is neither a file nor a dataset that can be loaded ({error}); check the name, or give a file."
        ) from error
    column = column or field or FIELD
    if column not in rows.column_names:
        raise InvalidInputError(
            f"{dataset} has no column {column!r}; name one of {', '.join(rows.column_names)} as the fourth part of "
            "`name:config:split:column`, or by --text-field."
        )
    return _documents(name, [{column: value} for value in rows[column]], column)


def _check_package(what: str) -> None:
    """Raise InvalidInputError, which begins with `what`, where the package `datasets` is not installed."""
    if importlib.util.find_spec("datasets") is None:
        raise InvalidInputError(f"{what} the package datasets: pip install 'tardis-llm[eval]'.")


def _documents(source: str, records: Sequence[Any], field: str | None) -> Documents:
    """The documents of records: objects with the field, or plain strings if no field is named."""
    if field is None and records and all(isinstance(record, str) for record in records):
        return _without_empty(source, records, None)
    field = field or FIELD
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise InvalidInputError(
                f"record {number} of {source} is {_kind(record)}, not an object with a field {field!r}. Give one "
                "record per line, or one list of records."
            )
    names = list(dict.fromkeys(name for record in records for name in record))
    if records and field not in names:
        raise InvalidInputError(
            f"{source} has no field {field!r}; name one of {', '.join(names) or 'none'} by --text-field."
        )
    return _without_empty(source, [record.get(field) for record in records], field)


def _without_empty(source: str, values: Sequence[Any], field: str | None) -> Documents:
    """The documents of records from the values of their text field; empty ones are only counted."""
    for number, value in enumerate(values, 1):
        if value is not None and not isinstance(value, str):
            raise InvalidInputError(
                f"the field {field!r} of record {number} of {source} is {_kind(value)}, not text; name the one that "
                "holds the text by --text-field."
            )
    texts = [value for value in values if value and value.strip()]
    return Documents(source, texts, True, field, len(values) - len(texts))


def _kind(value: Any) -> str:
    """The type of a JSON value in words, such as "a list"."""
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
