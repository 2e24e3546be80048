"""Calibration text to windows: spread over the text, repeatable, and split without overlap."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import END, POSITIONS, begun_tokenizer, tiny_tokenizer
from synthetic import quick

from tardis_llm.calibration.limits import default_length
from tardis_llm.calibration.text import (
    TOKENS_PER_DIMENSION,
    Windows,
    check_enough,
    first_token,
    read_windows,
    split_windows,
)
from tardis_llm.errors import InvalidInputError

WORDS = 60_000


class Numbers:
    """A tokenizer for texts of numbers: each is its own id."""

    model_max_length = 10**30

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """Ids of a text."""
        assert not add_special_tokens
        return [int(word) for word in text.split()]


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A file of the numbers from 0 to WORDS, so that an id tells its place."""
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(f"{i:05}" for i in range(WORDS)))
    return path


def places(windows: Windows) -> torch.Tensor:
    """All ids in order."""
    return torch.cat([windows.fit.flatten(), windows.heldout.flatten()]).sort().values


def test_text_of_less_than_the_tokens_wanted_is_used_whole(numbers: Path) -> None:
    windows = read_windows([numbers], Numbers(), 10 * WORDS, 32, 0.125)
    assert torch.equal(places(windows), torch.arange(WORDS))


@pytest.mark.parametrize("tokens", [1024, 4096, 40_000])
def test_windows_are_spread_over_the_whole_text(numbers: Path, tokens: int) -> None:
    windows = read_windows([numbers], Numbers(), tokens, 32, 0.125)
    assert tokens - 32 < windows.fit.numel() + windows.heldout.numel() <= tokens
    for part in (windows.fit, windows.heldout):
        shares = torch.histc(part.float(), 4, 0, WORDS) / part.numel()
        assert shares.min() > 0.12
    assert places(windows)[-1] > 0.95 * WORDS
    assert places(windows)[0] < 0.05 * WORDS


def test_every_window_begins_with_the_token_that_the_tokenizer_begins_texts_with(tiny_text: Path) -> None:
    plain = read_windows([tiny_text], tiny_tokenizer(), 1024, 31, 0.125)
    begun = read_windows([tiny_text], begun_tokenizer(), 1024, 32, 0.125)
    for some, others in ((begun.fit, plain.fit), (begun.heldout, plain.heldout)):
        assert bool((some[:, 0] == END).all())
        assert torch.equal(some[:, 1:], others)


def test_a_tokenizer_that_also_ends_texts_begins_no_window() -> None:
    tokenizer = begun_tokenizer()
    tokenizer.add_eos_token = True  # as those of encoders do
    assert first_token(begun_tokenizer()) == [END]
    assert first_token(tokenizer) == first_token(tiny_tokenizer()) == first_token(Numbers()) == []


def test_several_files_count_as_one_text(numbers: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(" ".join(str(i) for i in range(WORDS, 2 * WORDS)))
    windows = read_windows([numbers, str(other)], Numbers(), 4096, 32, 0.125)
    assert 0.4 < float((windows.fit < WORDS).float().mean()) < 0.6


def test_windows_are_pieces_of_the_text(numbers: Path) -> None:
    windows = read_windows([numbers], Numbers(), 4096, 32, 0.125)
    steps = windows.fit.diff(dim=1)
    assert float((steps == 1).float().mean()) > 0.95  # but where one place ends in a window and the next begins


def test_the_same_seed_gives_the_same_windows_and_another_others(numbers: Path) -> None:
    first, again, other = (read_windows([numbers], Numbers(), 2048, 32, 0.125, seed) for seed in (0, 0, 1))
    assert torch.equal(first.fit, again.fit)
    assert torch.equal(first.heldout, again.heldout)
    assert not torch.equal(first.fit, other.fit)


def test_words_are_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("123456 " * 20_000)
    windows = read_windows([path], Numbers(), 1024, 16, 0.125)
    assert windows.fit.unique().tolist() == [123456]


def test_text_without_spaces_serves_too(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("七" * 20_000, encoding="utf-8")
    windows = read_windows([path], tiny_tokenizer(), 512, 16, 0.125)
    assert windows.fit.numel() + windows.heldout.numel() == 512


def test_a_real_tokenizer_gives_its_ids_without_special_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 8)
    windows = read_windows([path], tiny_tokenizer(), 64, 8, 0.125)
    assert tiny_tokenizer().decode(windows.heldout[0]) == "abcdefgh"
    assert windows.fit.shape == (7, 8)
    assert windows.fit.dtype == torch.int64


@quick
@given(st.integers(16, 500), st.integers(2, 8), st.floats(0.01, 0.5))
def test_held_out_windows_are_apart_of_the_right_share_and_spread(count: int, length: int, share: float) -> None:
    windows = split_windows(torch.arange(count * length + length - 1), length, share)
    assert torch.equal(places(windows), torch.arange(count * length))
    assert windows.fit.shape[1] == windows.heldout.shape[1] == length
    assert len(windows.heldout) == max(1, round(count * share))
    ordered = windows.heldout[:, 0] // length
    assert (ordered.diff() >= int(count / len(ordered))).all()
    for first in (windows.fit, windows.heldout):
        assert (first.diff(dim=1) == 1).all()


def test_tokens_given_as_windows_keep_their_length() -> None:
    windows = split_windows(torch.arange(60, dtype=torch.int32).view(10, 6), length=99, heldout=0.2)
    assert windows.fit.shape == (8, 6)
    assert windows.heldout.shape == (2, 6)
    assert windows.fit.dtype == torch.int64
    assert torch.equal(places(windows), torch.arange(60))


@pytest.mark.parametrize("count", [0, 1, 63, 127])
def test_too_little_text_names_the_remedy(count: int) -> None:
    with pytest.raises(InvalidInputError, match=rf"{count} tokens, less than two windows of 64; give more text"):
        split_windows(torch.arange(count), 64, 0.125)


@pytest.mark.parametrize("text", ["", "   "])
def test_no_text_names_the_remedy(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match="give"):
        read_windows([path], Numbers(), 1024, 32, 0.125)


def test_text_that_is_not_utf_8_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(InvalidInputError, match=r"latin\.txt is not UTF-8 .*convert it"):
        read_windows([path], Numbers(), 1024, 32, 0.125)


@pytest.mark.parametrize("name", ["missing.txt", "a/b/missing", "/missing.txt", "."])
def test_a_missing_file_names_the_remedy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match=r"no text file .*give a path that exists"):
        read_windows([name], Numbers(), 1024, 32, 0.125)


def test_a_dataset_without_the_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "datasets" else found(name, *a))
    with pytest.raises(InvalidInputError, match=r"'no-such-set' is no file.*pip install 'tardis-llm\[eval\]'"):
        read_windows(["no-such-set"], Numbers(), 1024, 32, 0.125)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for the package; the calls of `load_dataset`."""
    calls: list[tuple[Any, ...]] = []

    class Rows(dict[str, list[str]]):
        column_names = ("text", "prose")

    def load_dataset(name: str, config: str | None, split: str) -> Rows:
        calls.append((name, config, split))
        if name == "none":
            raise FileNotFoundError("not on the hub")
        return Rows(text=["1 2", "3 4"], prose=["5 6 7 8"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: SimpleNamespace())
    return calls


@pytest.mark.parametrize(
    ("source", "call", "ids"),
    [
        ("some/set", ("some/set", None, "train"), [1, 2, 3, 4]),
        ("set:raw", ("set", "raw", "train"), [1, 2, 3, 4]),
        ("set:raw:test:prose", ("set", "raw", "test"), [5, 6, 7, 8]),
        ("set:::prose", ("set", None, "train"), [5, 6, 7, 8]),
    ],
)
def test_a_dataset_is_named_by_name_config_split_and_column(
    datasets: list[tuple[Any, ...]], source: str, call: tuple[Any, ...], ids: list[int]
) -> None:
    windows = read_windows([source], Numbers(), 1024, 2, 0.5)
    assert datasets == [call]
    assert places(windows).tolist() == ids


def test_a_column_that_is_not_there_names_those_that_are(datasets: list[tuple[Any, ...]]) -> None:
    with pytest.raises(InvalidInputError, match="no column 'poem'; name one of text, prose"):
        read_windows(["set:::poem"], Numbers(), 1024, 2, 0.5)


def test_a_dataset_that_cannot_be_loaded_names_the_remedy(datasets: list[tuple[Any, ...]]) -> None:
    with pytest.raises(InvalidInputError, match=r"'none' is neither a file nor .*not on the hub.*give a file"):
        read_windows(["none"], Numbers(), 1024, 2, 0.5)


def test_the_default_length_is_what_tokenizer_and_model_allow() -> None:
    assert default_length(tiny_tokenizer(), 4096) == POSITIONS
    assert default_length(Numbers(), 512) == 512
    assert default_length(Numbers(), None) == default_length(None, 10**6) == 1024
    assert type(default_length(Numbers(), None)) is int


def test_second_moments_need_some_tokens_per_dimension() -> None:
    windows = Windows(torch.zeros(10, 40, dtype=torch.int64), torch.zeros(90, 40, dtype=torch.int64))
    check_enough(windows, 400 // TOKENS_PER_DIMENSION)
    with pytest.raises(InvalidInputError, match=r"400 calibration tokens are too few .* width 101: .*more --text"):
        check_enough(windows, 400 // TOKENS_PER_DIMENSION + 1)
