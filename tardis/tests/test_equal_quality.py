"""`benchmarks/equal_quality.py` on the bundled sample: what was measured is written down at once, and not again."""

from __future__ import annotations

import json
from pathlib import Path

import equal_quality
import pytest
from equal_quality import Judge, main
from transformers import PreTrainedModel

from real_models import DATA

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (DATA / "eval").is_dir(), reason="the texts and tasks of ../shared are not here"),
]
TASKS = ("tasks", "sample", "--only", "dense", "--items", "4", "--calibration", "1024", "--tasks")


def test_tasks_go_on_where_they_were_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output, loaded = ("--results", str(tmp_path)), []
    model = Judge.model

    def counted(judge: Judge, name: str) -> PreTrainedModel:
        loaded.append(name)
        return model(judge, name)

    monkeypatch.setattr(Judge, "model", counted)
    main([*TASKS, "piqa", *output])
    main([*TASKS, "piqa", *output])
    assert loaded == ["dense"], "nothing was left to run"
    main([*TASKS, "piqa", "winogrande", *output])
    assert loaded == ["dense", "dense"]
    scores = json.loads((tmp_path / "equal_tasks_sample.json").read_text())["entries"]["dense"]
    assert list(scores) == ["piqa", "winogrande"]
    for score in scores.values():
        assert score["items"] == len(score["correct"]) == 4
        assert score["value"] == score["correct"].count("1") / 4


def test_other_settings_begin_anew(tmp_path: Path):
    path = tmp_path / "equal_tasks_sample.json"
    path.write_text(json.dumps({"settings": {"items": 3}, "entries": {"dense": {"piqa": "of another run"}}}))
    assert equal_quality._known(path, {"items": 3})["entries"] == {"dense": {"piqa": "of another run"}}
    assert equal_quality._known(path, {"items": 4})["entries"] == {}
