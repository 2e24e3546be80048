"""Text from plain files, from records in JSON, CSV and Parquet, and what is said where it cannot be had."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import Result, assert_refused
from datasets import Dataset
from models import tiny_tokenizer

from tardis_llm import sample
from tardis_llm.calibration.documents import read_documents
from tardis_llm.calibration.text import read_windows
from tardis_llm.errors import InvalidInputError

Tardis = Callable[..., Result]
TEXTS = ["Zürich lies on a lake,\nand on a river.", 'He said "NA", and left.', "NA", "third, of four"]


def records(texts: Sequence[str | None], field: str) -> list[dict[str, object]]:
    """Records with the text beside other fields, of kinds that differ from one to the next."""
    return [{"id": i, field: text, "meta": None if i % 2 else {"from": i}} for i, text in enumerate(texts)]


def write_lines(path: Path, texts: Sequence[str | None], field: str) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records(texts, field)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")


def write_list(path: Path, texts: Sequence[str | None], field: str) -> None:
    path.write_text(json.dumps(records(texts, field), indent=2), encoding="utf-8")


def write_table(path: Path, texts: Sequence[str | None], field: str) -> None:
    rows = Dataset.from_dict({"id": list(range(len(texts))), field: list(texts)})
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    else:
        rows.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")


FORMATS = {
    "a.jsonl": write_lines,
    "a.ndjson": write_lines,
    "lines.json": write_lines,
    "list.json": write_list,
    "a.csv": write_table,
    "a.tsv": write_table,
    "A.PARQUET.parquet": write_table,
}
formats = pytest.mark.parametrize("name", FORMATS)


@formats
@pytest.mark.parametrize("field", [None, "body"])
def test_records_give_the_text_of_their_field(name: str, field: str | None, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name, [TEXTS[0], None, *TEXTS[1:3], "", " \n", TEXTS[3]], field or "text")
    documents = read_documents(tmp_path / name, field)
    assert documents.texts == TEXTS
    assert documents.sentence() == f"{tmp_path / name} (4 documents, field {field or 'text'!r}, 3 empty ones left out)"


@formats
def test_calibration_windows_are_those_of_the_same_text_in_a_plain_file(name: str, tmp_path: Path) -> None:
    texts = sample.calibration_text().read_text(encoding="utf-8")[:6_000].strip().split("\n\n")
    FORMATS[name](tmp_path / name, texts, "text")
    (tmp_path / "plain.txt").write_text("\n\n".join(texts), encoding="utf-8")
    for tokens in (512, 100_000):  # spans of the text; all of it
        one, other = (
            read_windows([tmp_path / file], tiny_tokenizer(), tokens, 16, 0.2) for file in (name, "plain.txt")
        )
        assert torch.equal(one.fit, other.fit)
        assert torch.equal(one.heldout, other.heldout)


@formats
def test_a_field_that_is_not_there_names_those_that_are(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name, TEXTS, "body")
    with pytest.raises(InvalidInputError, match=r"has no field 'text'; name one of id, body.* by --text-field"):
        read_documents(tmp_path / name)


@formats
def test_a_field_that_holds_no_text_is_refused(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name, TEXTS, "body")
    with pytest.raises(InvalidInputError, match=r"field 'id' of record 1 of .* is a number, not text"):
        read_documents(tmp_path / name, "id")


def test_a_list_of_strings_is_documents_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(TEXTS))
    documents = read_documents(tmp_path / "a.json")
    assert documents.texts == TEXTS
    assert documents.sentence().endswith("(4 documents)")


def test_a_plain_file_is_one_document_without_the_mark_of_its_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8-sig")
    documents = read_documents(tmp_path / "a.txt")
    assert documents.texts == ["one\n\ntwo"]
    assert documents.sentence() == f"{tmp_path / 'a.txt'} (8 characters)"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"line 2 of .* is no JSON"),
        ("a.jsonl", "plain text\n", r"line 1 of .* is no JSON .*name it \.txt"),
        ("a.jsonl", '{"text": "a"}\n3\n', "record 2 of .* is a number, not an object with a field 'text'"),
        ("a.json", '{"data": [{"text": "a"}]}', "has no field 'text'; name one of data"),
        ("a.json", '[["a"]]', "record 1 of .* is a list"),
        ("a.csv", "", "cannot be read as csv"),
        ("a.parquet", "text", "cannot be read as parquet"),
    ],
)
def test_files_that_are_not_what_their_name_says_are_refused(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        read_documents(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_tables_without_the_package_name_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path / name, TEXTS, "text")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "datasets" else found(name, *a))
    with pytest.raises(InvalidInputError, match=r"datasets: pip install 'tardis-llm\[eval\]'"):
        read_documents(tmp_path / name)


@pytest.fixture
def pages(tiny_text: Path, tmp_path: Path) -> Path:
    """The tiny text as records with a field `page`."""
    path = tmp_path / "pages.jsonl"
    write_lines(path, tiny_text.read_text(encoding="utf-8").split("\n\n"), "page")
    return path


def commands(model: Path, plain: Path, pages: Path, out: Path) -> dict[str, tuple[object, ...]]:
    """Every command that takes text, on records."""
    quick = ("--tokens", 4096, "--probe-tokens", 256, "--sequence-length", 32, "--reduction", 0.5)
    return {
        "fold": ("fold", model, "-o", out, "--text", pages, *quick),
        "eval": ("eval", model, "--text", pages),
        "words": ("eval", model, "--text", pages, "--recipe", "words"),
        "inspect": ("inspect", model, "--text", pages),
        "compare": ("compare", model, "-o", out, "--text", pages, "--eval-text", pages, "--methods", "affine"),
    }


@pytest.mark.parametrize("verb", ["fold", "eval", "words", "inspect", "compare"])
def test_every_command_reads_records_and_says_what_it_read(
    tardis: Tardis, tiny_dir: Path, tiny_text: Path, pages: Path, tmp_path: Path, verb: str
) -> None:
    command = commands(tiny_dir, tiny_text, pages, tmp_path / "out")[verb]
    assert_refused(tardis(*command), "has no field 'text'; name one of id, page, meta by --text-field")
    result = tardis(*command, "--text-field", "page")
    assert result.code == 0
    assert "documents, field 'page'" in " ".join(result.err.split())


def test_each_record_is_a_document_of_word_perplexity(tardis: Tardis, tiny_dir: Path, pages: Path) -> None:
    command = ("eval", tiny_dir, "--text", pages, "--text-field", "page", "--recipe", "words", "--json")
    figures = json.loads(tardis(*command).out)
    assert figures["perplexity"]["documents"] == len(read_documents(pages, "page").texts)
