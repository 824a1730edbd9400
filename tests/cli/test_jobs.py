"""``deltatune tune --jobs``: many deltas from one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltatune.errors import DeltaError
from deltatune.multi.together.file import read_jobs
from tests.cli.conftest import Call, refused


def written(place: Path, jobs: list[dict[str, Any]], **entries: Any) -> Path:
    """A ``jobs.yaml``."""
    file = place / "jobs.yaml"
    file.write_text(yaml.safe_dump({**entries, "jobs": jobs}))
    return file


@pytest.fixture
def file(encoder: str, texts: Path, tmp_path: Path) -> Path:
    """Two jobs on a tiny encoder, the second one too bold."""
    data = {"path": str(texts), "text": "headline", "label": "topic"}
    jobs: list[dict[str, Any]] = [
        {"data": data, "method": {"name": "lora", "rank": 2}, "settings": {"seed": 1}},
        {"name": "biases", "data": data, "method": "bitfit", "settings": {"max_steps": 3}},
    ]
    settings = {"max_steps": 2, "batch_size": 4, "evaluations": 0, "test_rows": 6}
    return written(tmp_path, jobs, backbone=encoder, out=str(tmp_path / "all"), tokens=100_000, settings=settings)


def test_a_table_for_people_and_a_folder_a_job(call: Call, file: Path, tmp_path: Path) -> None:
    done = call("tune", "--jobs", file)
    assert done.code == 0, done.err
    assert "headlines-lora" in done.out and "biases" in done.out and "lora rank=2" in done.out
    for name, steps in (("headlines-lora", 2), ("biases", 3)):
        assert json.loads((tmp_path / "all" / name / "metrics.json").read_text())["steps"] == steps
    again = call("tune", "--jobs", file, "--json")
    assert again.code == 0, again.err
    told = json.loads(again.out.splitlines()[-1])["jobs"]
    assert [(job["name"], job["steps"], job["error"]) for job in told] == [("headlines-lora", 2, None), ("biases", 3, None)]


def test_a_job_that_fails_is_told_and_the_others_are_finished(call: Call, file: Path, tmp_path: Path) -> None:
    entries = yaml.safe_load(file.read_text())
    entries["jobs"][1] |= {"where": "attention.nothing"}
    file.write_text(yaml.safe_dump(entries))
    done = call("tune", "--jobs", file, "--json", "--out", tmp_path / "other", "--batch-size", 3)
    refused(done, "1 of 2 jobs failed. biases: No site of")
    told = json.loads(done.out.splitlines()[-1])["jobs"]
    assert told[0]["error"] is None and "No site of" in told[1]["error"]
    run = yaml.safe_load((tmp_path / "other/headlines-lora/run.yaml").read_text())
    assert run["settings"]["batch_size"] == 3
    assert not (tmp_path / "other/biases").exists()


def test_options_of_a_single_run_are_refused(call: Call, file: Path, tmp_path: Path) -> None:
    refused(call("tune", "--jobs", file, "--task", "bbc-news"), "`--task` describes a single run")
    refused(call("tune", "--jobs", tmp_path / "none.yaml"), "none.yaml` cannot be read")


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "an entry nobody knows": (
        {"jobs": [{"task": "bbc-news", "method": "lora", "rate": 1}]},
        "Job 1 in the file of jobs .* has the entry `rate`",
    ),
    "a setting nobody knows": (
        {"jobs": [{"task": "bbc-news", "method": "lora", "settings": {"rate": 1}}]},
        "Job 1 .* no setting called `rate`",
    ),
    "no method": ({"jobs": [{"task": "bbc-news"}]}, "does not say its `method`"),
    "no task": ({"jobs": [{"method": "lora"}]}, "neither `task` nor `data`"),
    "both": ({"jobs": [{"task": "bbc-news", "data": {"path": "x"}, "method": "lora"}]}, "both `task` and `data`"),
    "no jobs": ({}, "has no `jobs`"),
    "jobs that are none": ({"jobs": ["lora"]}, "it has to be a list of jobs"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_the_file(case: str, tmp_path: Path) -> None:
    entries, words = FAULTS[case]
    file = tmp_path / "jobs.yaml"
    file.write_text(yaml.safe_dump({"backbone": "minilm", **entries}))
    with pytest.raises(DeltaError, match=words):
        read_jobs(file)
