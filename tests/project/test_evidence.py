"""The script that makes the study's evidence: it goes on with what is committed, stops in time, and says how far it is."""

from __future__ import annotations

import csv
import importlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deltatune.study.design import Study, study_from_dict
from deltatune.study.experiments import experiments
from deltatune.study.runner.local import LocalRunner
from deltatune.study.store.store import Store
from tests.cli.conftest import write_texts
from tests.project import ROOT
from tests.training.tiny import folder

NAME = "performance"
SETTINGS = {"max_steps": 4, "evaluations": 2, "batch_size": 8, "lr": 5e-3}


@pytest.fixture()
def design(tmp_path: Path) -> Study:
    """Four trials on made-up texts, as the experiment `performance` would have them."""
    task = {"path": str(write_texts(tmp_path / "headlines.csv")), "text": "headline", "label": "topic"}
    methods = [{"name": "lora", "rank": 2}, "bitfit"]
    written = {"name": "small", "backbones": [folder("bert", tmp_path)], "tasks": [task], "methods": methods, "settings": SETTINGS}
    return study_from_dict({**written, "experiment": NAME})


@pytest.fixture()
def script(design: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with one small experiment in processes of its own choosing and its evidence elsewhere."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = importlib.import_module("evidence")
    monkeypatch.setattr(found, "experiments", {NAME: replace(experiments[NAME], study=lambda profile: design)})
    monkeypatch.setattr(found, "EVIDENCE", tmp_path / "evidence")
    monkeypatch.setattr(found, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(found, "ray_runner", lambda resources: LocalRunner)
    return found


def states(script: Any) -> Counter[str]:
    """How many trials of the written report are in which state."""
    with (script.EVIDENCE / NAME / "results.csv").open(encoding="utf-8") as file:
        return Counter(row["state"] for row in csv.DictReader(file))


def test_what_is_committed_is_not_done_again(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.run(Store(tmp_path / "one.db"), [NAME], minutes=60, workers=1)
    assert states(script) == {"done": 4}
    assert {"report.html", "report.md", "machines.json", "study.yaml"} <= {file.name for file in (script.EVIDENCE / NAME).iterdir()}
    first = (script.EVIDENCE / NAME / "results.csv").read_text()
    capsys.readouterr()
    script.run(Store(tmp_path / "two.db"), [NAME], minutes=60, workers=1)
    assert "4 trials taken" in capsys.readouterr().err
    assert (script.EVIDENCE / NAME / "results.csv").read_text() == first


def test_the_time_is_up(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.run(Store(tmp_path / "one.db"), [NAME], minutes=0, workers=1)
    assert f"{NAME}: stopped" in capsys.readouterr().err
    assert sum(states(script).values()) == 4 and states(script)["done"] < 4


def test_the_index_says_how_far_it_is(script: Any, tmp_path: Path) -> None:
    script.EVIDENCE.mkdir()
    script.index(Store(tmp_path / "none.db"))
    assert f"**{NAME}**: not begun (4 trials). `python benchmarks/evidence.py run {NAME}`" in (script.EVIDENCE / "README.md").read_text()
    script.run(Store(tmp_path / "one.db"), [NAME], minutes=60, workers=1)
    script.index(Store(tmp_path / "two.db"))
    told = (script.EVIDENCE / "README.md").read_text()
    assert f"[**{NAME}**]({NAME}/report.md): 4 of 4 trials; of its claims" in told
    for claim in experiments[NAME].claims:
        assert f"{claim.number}, *undecided*: {claim.says}" in told
