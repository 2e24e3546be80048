"""Checkpoints that strangers have edited end in an error of ours, or in exactly the model that was saved.

`TARDIS_MUTATIONS=5000 pytest tests/test_mutations.py` runs as many random cases of each kind; without, a few.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import mostly_long
from models import tokens
from mutations import damage_text, edit_bytes, edit_files, edit_header, edit_index, edit_json, edit_sizes
from quick_folds import save_quick
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils import logging

from tardis_llm.checkpoint.loading import load_model, load_report
from tardis_llm.checkpoint.manifest import MANIFEST
from tardis_llm.errors import TardisError
from tardis_llm.runtime.placing import folded_ffns

CASES = int(os.environ.get("TARDIS_MUTATIONS", "0"))
#: family, storage form and size of a shard
SAVED = [("gpt2", "plain", "5GB"), ("phi", "all in few bits", "150KB"), ("bert", "stacked", "5GB")]
_KINDS = ["header", "config", "settings", "sizes", "files", "bytes", "record", "index", "text"]
_numbers = itertools.count()
outcomes: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="module", params=SAVED, ids=lambda each: each[0])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Tensor]]:
    """A folded checkpoint and its logits."""
    directory = tmp_path_factory.mktemp("form") / "saved"
    save_quick(directory, *request.param)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield directory, output(load_model(str(directory), "float32"))
    logging.enable_progress_bar()
    logging.set_verbosity_warning()


@torch.no_grad()
def output(model: PreTrainedModel) -> Tensor:
    """Logits; one token at a time goes through the kernels too."""
    return model(tokens(2, 5))[0]


def mutate(directory: Path, kind: str, draw: object, recorded: bool) -> None:
    """Apply one mutation of a kind."""
    sharded = (directory / "model.safetensors.index.json").exists()
    if kind == "header" or (kind == "index" and not sharded) or (kind == "record" and not recorded):
        edit_header(directory, draw, recorded)
    elif kind == "config":
        edit_json(directory / "config.json", draw, () if recorded else ("quantization_config",))
    elif kind == "sizes":
        edit_sizes(directory / "config.json", draw)
    elif kind == "settings":
        edit_json(directory / "config.json", draw, ("quantization_config",))
    elif kind == "index":
        edit_index(directory, draw)
    elif kind == "record":
        edit_json(directory / MANIFEST, draw)
    elif kind == "text":
        damage_text(draw(st.sampled_from(sorted(directory.glob("*.json")))), draw)
    elif kind == "bytes" and recorded:
        edit_bytes(directory, draw)
    else:
        edit_files(directory, draw)


@pytest.mark.parametrize("way", mostly_long(["load_model", "from_pretrained"], ["from_pretrained"]))
@settings(
    max_examples=CASES or 25,
    derandomize=not CASES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_an_edited_checkpoint_is_refused_or_the_one_that_was_saved(
    saved: tuple[Path, Tensor], way: str, data: st.DataObject
):
    directory, expected = saved
    auto = AutoModelForMaskedLM if "Masked" in (directory / "config.json").read_text() else AutoModelForCausalLM
    folder = directory.parent / f"case-{next(_numbers)}"
    copy = Path(shutil.copytree(directory, folder / "copy"))
    (folder / "outside").symlink_to(directory)
    try:
        recorded = data.draw(st.booleans())
        if not recorded:
            (copy / MANIFEST).unlink()
        kind = data.draw(st.sampled_from(_KINDS))
        mutate(copy, kind, data.draw, recorded)
        if way == "from_pretrained" and labels(copy) > 10**6:
            return  # transformers makes a name for each, before it asks us, until memory is full
        outcomes[kind, check(copy, way, expected, auto)] += 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def labels(directory: Path) -> int:
    """The `num_labels` of config.json, where it is read and has a number there."""
    with suppress(OSError, ValueError, RecursionError):
        config = json.loads((directory / "config.json").read_text())
        found = config.get("num_labels") if isinstance(config, dict) else None
        return int(found) if isinstance(found, int | float) and found < 1e300 else 0
    return 0


def check(directory: Path, way: str, expected: Tensor, auto: type) -> str:
    """Load an edited checkpoint; says how it ended."""
    with suppress(TardisError):
        load_report(str(directory))
    if way == "load_model":
        try:
            model = load_model(str(directory), "float32")
        except TardisError:
            return "refused"
    else:
        try:
            model = auto.from_pretrained(directory, dtype=torch.float32).eval()
        except TardisError:
            return "refused"
        except Exception:
            return "refused by transformers"
        if not folded_ffns(model):
            return "dense"  # config.json no longer names TARDIS, so transformers did not ask us
    assert torch.equal(output(model), expected)
    return "right"


@pytest.fixture(scope="module", autouse=True)
def say_outcomes() -> Iterator[None]:
    """Print how many cases ended how, where many are run."""
    yield
    if CASES:
        for (kind, outcome), number in sorted(outcomes.items()):
            print(f"{kind:10} {outcome:24} {number:6}")
        print("cases", sum(outcomes.values()))
