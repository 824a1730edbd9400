"""A study that is killed with SIGKILL, at whatever moment, goes on: nothing is lost and nothing is done twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltatune.study.design import Study
from deltatune.study.procedures import train
from deltatune.study.record import Record
from deltatune.study.store.store import Store
from tests.study.conftest import driver
from tests.study.killed import kill

RUNS_LEFT = {"begin:2": 5, "step:9": 5, "finish:2": 4, "commit:2": 4, "sweep:2": 4}
"""Of the six runs (the frozen backbone's are among them), those that a second driver has to begin or to finish; a run whose files are whole
is read."""


def values(records: list[Record]) -> dict[str, Any]:
    return {record.key: (record.score, record.numbers["metrics"], record.steps, record.tokens) for record in records}


@pytest.mark.parametrize("moment", RUNS_LEFT)
def test_a_killed_study_ends_as_if_it_had_not_been(
    moment: str, tiny: Study, whole: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kill(tiny.to_dict(), tmp_path, moment) == -9
    store = Store(tmp_path / "studies.db")
    before = {record.key: record for record in store.records("tiny") if record.state == "done"}
    runs: list[Any] = []
    original = train.dt_train
    monkeypatch.setattr(train, "dt_train", lambda *args, **kwargs: runs.append(args) or original(*args, **kwargs))

    progress = driver(store, tiny, tmp_path / "trials").run()

    records = store.records("tiny")
    assert (progress.done, progress.failed) == (8, 0)
    assert values(records) == values(whole)
    assert len(runs) == RUNS_LEFT[moment]
    assert [record for record in records if record.key in before] == list(before.values())
    attempts = {record.key: [attempt.state for attempt in store.attempts("tiny", record.key)] for record in records}
    assert all(states.count("done") == 1 and states[-1] == "done" for states in attempts.values())
    assert [states for states in attempts.values() if len(states) > 1] == ([] if moment == "sweep:2" else [["interrupted", "done"]])
    assert list((tmp_path / "trials").iterdir()) == []


def test_curves_are_kept(whole: list[Record], tiny: Study, tmp_path: Path) -> None:
    assert {record.method for record in whole} == {"lora", "bitfit", "frozen", "random-delta"}
    assert all(record.score is not None and record.attempts == 1 for record in whole)
    assert all((record.tokens or 0) > 0 for record in whole if record.method in ("lora", "bitfit"))
    assert all(record.tokens == 0 for record in whole if record.method in ("frozen", "random-delta"))
