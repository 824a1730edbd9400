"""``deltatune study``: run, look on, compare, report, remove; every mistake is one plain message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from deltatune.cli.main import main
from deltatune.study.design import read_study
from deltatune.study.store.store import Store
from tests.cli.conftest import Call, refused
from tests.study.made_up import design, filled


@pytest.fixture(scope="module")
def store(encoder: str, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one small study that was run."""
    place = tmp_path_factory.mktemp("study")
    written = {
        "name": "small",
        "backbones": encoder,
        "tasks": [{"path": str(texts), "text": "headline", "label": "topic"}],
        "methods": ["lora", "bitfit"],
        "settings": {"max_steps": 3, "batch_size": 8, "evaluations": 1},
        "profile": "quick",
    }
    file = place / "study.yaml"
    file.write_text(yaml.safe_dump(written))
    assert main(["study", "run", str(file), "--store", str(place / "s.db"), "--fuse"]) == 0
    return place / "s.db"


def test_status(call: Call, store: Path) -> None:
    status = json.loads(call("study", "status", "small", "--store", store, "--json").out)
    assert (status["done"], status["waiting"], status["failed"]) == (4, 0, 0)
    assert {trial["method"] for trial in status["trials"]} == {"lora", "bitfit", "frozen", "random-delta"}
    assert all(trial["attempts"] == 1 and trial["score"] is not None for trial in status["trials"])
    assert "small: 4 of 4 trials done" in call("study", "status", "small", "--store", store).out


def test_what_is_done_is_not_done_again(call: Call, store: Path) -> None:
    outcome = call("study", "resume", "small", "--store", store, "--json")
    events = [json.loads(line) for line in outcome.out.splitlines()]
    assert [event["event"] for event in events] == ["study_began", "study_ended"]


def test_list(call: Call, store: Path) -> None:
    [study] = json.loads(call("study", "list", "--store", store, "--json").out)
    assert study == {"name": "small", "experiment": "performance", "profile": "quick", "done": 4, "running": 0, "waiting": 0, "failed": 0}


def test_report(call: Call, store: Path, tmp_path: Path) -> None:
    told = json.loads(call("study", "report", "small", "--store", store, "--out", tmp_path / "out", "--json").out)
    assert [Path(file).name for file in told["files"]] == ["report.html", "report.md", "results.csv", "machines.json", "study.yaml"]
    assert all(Path(file).is_file() for file in told["files"])
    assert read_study(tmp_path / "out" / "study.yaml") == Store(store).study("small")
    assert {verdict["verdict"] for verdict in told["verdicts"]} == {"undecided"}


def test_import(call: Call, store: Path, tmp_path: Path) -> None:
    call("study", "report", "small", "--store", store, "--out", tmp_path / "out")
    other = tmp_path / "other.db"
    told = json.loads(call("study", "import", tmp_path / "out", "--store", other, "--json").out)
    assert told == {"study": "small", "taken": 4, "known": 0, "strange": 0}
    assert "0 trials taken, 4 were done here already" in call("study", "import", tmp_path / "out", "--store", other).err
    events = [json.loads(line) for line in call("study", "resume", "small", "--store", other, "--json").out.splitlines()]
    assert [event["event"] for event in events] == ["study_began", "study_ended"]
    refused(call("study", "import", tmp_path, "--store", other), "cannot be read")


def test_compare(call: Call, tmp_path: Path) -> None:
    filled(tmp_path / "s.db", design())
    told = json.loads(call("study", "compare", "made-up", "lora", "bitfit", "full", "--store", tmp_path / "s.db", "--json").out)
    assert [(one["method"], one["other"], one["tasks"]) for one in told] == [("bitfit", "lora", 10), ("full", "lora", 10)]
    refused(call("study", "compare", "made-up", "lroa", "--store", tmp_path / "s.db"), "`lroa` has no scores", "Did you mean `lora`?")


def test_remove(call: Call, tmp_path: Path) -> None:
    filled(tmp_path / "s.db", design())
    refused(call("study", "rm", "made-up", "--store", tmp_path / "s.db"), "50 results", "--yes")
    assert call("study", "rm", "made-up", "--store", tmp_path / "s.db", "--yes").code == 0
    assert json.loads(call("study", "list", "--store", tmp_path / "s.db", "--json").out) == []


def test_mistakes(call: Call, tmp_path: Path) -> None:
    place = ("--store", tmp_path / "s.db")
    refused(call("study", "status", "nothing", *place), "no study called `nothing`", "There is none yet")
    refused(call("study", "run", "performence", *place), "No experiment is called `performence`. Did you mean `performance`")
    refused(call("study", "run", tmp_path / "no.yaml", *place), "cannot be read")
    refused(call("study", "run", "performance", "--profile", "slow", *place), "neither quick nor full")
    refused(call("study", "resume", "x", "--workers", 2, *place), "belong to Ray")
    refused(call("study", "resume", "x", "--runner", "rey", *place), "no runner called `rey`")
