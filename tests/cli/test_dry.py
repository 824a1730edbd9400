"""``deltatune tune --dry-run``: the memory and the time of a step, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltatune.cli.dry import _grounds, _show
from deltatune.training.forecast import Estimate
from tests.cli.conftest import Call, refused, tune_words

FOUND = Estimate(64, (128, 96), 400_000_000, 600_000_000, 90_000_000, 3.21, 6.05, (8, 16), "shapes")


def test_it_is_one_line_of_json_and_nothing_is_written(
    call: Call, encoder: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "cache"))
    before = {file: file.stat().st_mtime_ns for file in Path(encoder).rglob("*")}
    done = call(*tune_words(encoder, texts, tmp_path / "run", "--dry-run", "--json"))
    assert done.code == 0, done.err
    told = json.loads(done.out.splitlines()[-1])
    assert told["rows"] == 8 and told["counted"] == "shapes" and told["timed_rows"] == [8]
    assert 0 < told["live_bytes"] < 50_000_000 and told["seconds"] > 0
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache" / "tokens").exists()
    assert {file: file.stat().st_mtime_ns for file in Path(encoder).rglob("*")} == before


def test_what_people_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _show(FOUND, 500_000_000)
    printed = capsys.readouterr()
    assert "400 MB of live tensors, 600 MB of the process, for 64 rows of 128 tokens" in printed.out
    assert "90.0 MB beside that; 500 MB were free" in printed.out
    assert "3.21 s (6.05 of the processor), for 96 tokens a row" in printed.out
    assert "real steps of 8 and 16 rows, continued on a line" in printed.out
    assert "That is more than was free" in printed.err


def test_the_grounds_name_what_was_done() -> None:
    whole = Estimate(8, (9, 9), 1, None, 1, 1.0, 1.0, (8,), "rows")
    assert _grounds(whole).endswith("time: real steps of 8 rows")
    assert "cannot run without numbers" in _grounds(whole)


def test_many_jobs_have_no_dry_run(call: Call, tmp_path: Path) -> None:
    refused(call("tune", "--jobs", tmp_path / "jobs.yaml", "--dry-run", "--backbone", "minilm"), "--dry-run")
