"""``deltatune demo`` from end to end, on a fraction of the steps."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from deltatune.cli import demo
from tests.cli.conftest import Call


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"max_steps": 2, "max_length": 16, "eval_rows": 8, "test_rows": 40, "evaluations": 1}
    monkeypatch.setattr(demo, "TRAINING", few)
    monkeypatch.setattr(demo, "TIMED", demo.TIMED | {"max_steps": 2})


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_the_whole_demo(call: Call, finished: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(finished, tmp_path / "demo"))  # what an earlier demo left is replaced
    done = call("demo", "--out", place)
    assert done.code == 0, done.err
    rows = {row["method"]: row for row in json.loads((place / "comparison.json").read_text())}
    assert list(rows) == ["linear-probe", "lora", "full"]
    assert rows["linear-probe"]["trained"] < rows["lora"]["trained"] < rows["full"]["trained"]
    assert 0 < rows["lora"]["share"] < 0.01 and rows["full"]["share"] == 1
    assert rows["full"]["accuracy"] is None
    assert all(row["seconds_per_step"] > 0 and row["peak_memory_bytes"] > 1e8 and row["disk_bytes"] > 0 for row in rows.values())
    assert {"delta", "metrics.json", "curve.png", "run.yaml"} <= {entry.name for entry in place.iterdir()}
    for shown in (*rows, *demo.HEADLINES, "test accuracy", "peak memory"):
        assert shown in done.out
    assert "bbc-news" in (place / "run.yaml").read_text()
    assert "rows/s" in done.err and "left" in done.err
    said = [line for line in done.err.splitlines() if re.match(r"\d+:\d\d  [123]/3  ", line)]
    assert "about four minutes" in done.err
    assert [line.split()[2] for line in said] == ["linear-probe:", "lora:", "full:"]
