"""A failing trial never stops a study; errors of ours are final, others are tried again."""

from __future__ import annotations

import io
import json
import time
from collections import deque
from pathlib import Path

import pytest

from deltatune.errors import Busy, InvalidValue, UnknownName
from deltatune.study.design import Study
from deltatune.study.driver import Driver, units
from deltatune.study.procedures import procedures
from deltatune.study.progress import Progress
from deltatune.study.runner.local import LocalRunner
from deltatune.study.runner.work import TimeLimit, limited
from deltatune.study.shows import Events, Lines
from deltatune.study.store.store import Store
from deltatune.study.trial import Outcome, Trial
from tests.study.conftest import driver
from tests.study.made_up import design, outcome

CALLS: list[str] = []


def behaved(trial: Trial, folder: Path) -> Outcome:
    """LoRA fails at its first attempt, BitFit always, by an error of ours; the others are done."""
    CALLS.append(trial.label)
    if trial.label == "lora" and CALLS.count("lora") == 1:
        raise MemoryError("no room")
    if trial.label == "bitfit":
        raise InvalidValue("not like this")
    return outcome(trial)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Study:
    """Five trials whose procedure only pretends."""
    monkeypatch.setitem(procedures._entries, "pretend", behaved)
    CALLS.clear()
    methods = [{"label": label, "method": label, "procedure": "pretend"} for label in ("lora", "bitfit", "adapter", "frozen")]
    return design(
        tasks=["bbc-news"], methods=[*methods, {"label": "random-delta", "method": "lora", "procedure": "pretend", "options": {"n": 1}}]
    )


def test_a_failing_trial_does_not_stop_the_study(study: Study, tmp_path: Path) -> None:
    store, said = Store(tmp_path / "s.db"), io.StringIO()
    store.add(study)
    progress = Driver(store, study.name, tmp_path / "t", LocalRunner, Lines(said)).run()
    assert (progress.done, progress.failed, progress.total) == (4, 1, 5)
    records = {record.method: record for record in store.records(study.name)}
    assert (records["lora"].state, records["lora"].attempts, records["lora"].error) == ("done", 2, None)
    assert (records["bitfit"].state, records["bitfit"].attempts) == ("failed", 1)
    assert records["bitfit"].error == "InvalidValue: not like this"
    [attempt] = store.attempts(study.name, records["bitfit"].key)
    assert "behaved" in (attempt.traceback or "") and attempt.ended is not None
    assert "lora on bbc-news, minilm, seed 0 failed, it is tried again. MemoryError: no room" in said.getvalue()
    assert CALLS.count("bitfit") == 1


def test_what_failed_is_tried_again_when_asked(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "s.db")
    store.add(study)
    driver(store, study, tmp_path).run()
    assert driver(store, study, tmp_path).run().failed == 1
    monkeypatch.setitem(procedures._entries, "pretend", lambda trial, folder: outcome(trial))
    progress = driver(store, study, tmp_path, again=True).run()
    assert (progress.done, progress.failed) == (5, 0)


def test_events_are_json(study: Study, tmp_path: Path) -> None:
    store, said = Store(tmp_path / "s.db"), io.StringIO()
    store.add(study)
    Driver(store, study.name, tmp_path / "t", LocalRunner, Events(said)).run()
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    names = [event["event"] for event in events]
    assert names[0] == "study_began" and names[-1] == "study_ended"
    assert (names.count("trial_began"), names.count("trial_done"), names.count("trial_failed")) == (6, 4, 2)
    assert events[-1]["done"] == 4 and events[-1]["seconds_left"] == 0
    assert {event["again"] for event in events if event["event"] == "trial_failed"} == {True, False}


def test_the_keyboard_loses_nothing(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(trial: Trial, folder: Path) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setitem(procedures._entries, "pretend", stop)
    store = Store(tmp_path / "s.db")
    store.add(study)
    with pytest.raises(KeyboardInterrupt):
        driver(store, study, tmp_path).run()
    assert store.counts(study.name) == {"done": 0, "running": 0, "waiting": 5, "failed": 0}
    assert [attempt.state for attempt in store.attempts(study.name, store.records(study.name)[0].key)] == ["interrupted"]


def test_one_driver_at_a_time(study: Study, tmp_path: Path) -> None:
    store, other = Store(tmp_path / "s.db"), Store(tmp_path / "s.db")
    store.add(study)
    with store.writer(study.name), pytest.raises(Busy, match="is being run by another process"):
        driver(other, study, tmp_path).run()
    assert driver(other, study, tmp_path).run().done == 4


def test_a_changed_design_keeps_what_it_shares(study: Study, tmp_path: Path) -> None:
    import dataclasses

    store = Store(tmp_path / "s.db")
    store.add(study)
    driver(store, study, tmp_path).run()
    more = dataclasses.replace(study, seeds=(0, 1), methods=study.methods[2:])
    with pytest.raises(InvalidValue, match="`methods`, `seeds` differ"):
        store.add(more)
    store.add(more, change=True)
    assert store.counts(study.name) == {"done": 3, "running": 0, "waiting": 3, "failed": 0}


def test_an_unknown_study(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="no study called `nothing`"):
        driver(Store(tmp_path / "s.db"), design(name="nothing"), tmp_path).run()


def test_a_time_limit() -> None:
    with pytest.raises(TimeLimit, match=r"0\.05 seconds"), limited(0.05):
        while True:
            time.sleep(0.01)


def test_the_estimate_goes_by_what_was_like_it() -> None:
    trials = list(design(tasks=["bbc-news"]).trials())
    progress = Progress("s", len(trials), waiting={trial.key: trial for trial in trials})
    assert progress.seconds_left is None
    progress.pace.learn("train", "minilm", "lora", 10.0)
    progress.pace.learn("train", "minilm", "full", 30.0)
    assert [progress.pace.of(trial) for trial in trials] == [30.0, 10.0, 20.0, 20.0, 20.0]


def test_units_hold_trainings_of_one_backbone() -> None:
    trials = list(design(backbones=["minilm", "smollm2-135m"], seeds=[0, 1]).trials())
    made = units(trials)
    assert sorted(trial.key for unit in made for trial in unit) == sorted(trial.key for trial in trials)
    assert all(len({trial.backbone for trial in unit}) == 1 and len(unit) <= 16 for unit in made)
    assert all(len(unit) == 1 for unit in made if unit[0].procedure != "train")


def test_a_queue_can_grow_while_it_is_conducted(study: Study, tmp_path: Path) -> None:
    trials = list(study.trials())
    queue = deque([(trials[2],)])
    happenings = []
    for happening in LocalRunner(tmp_path).conduct(queue):
        happenings.append(happening)
        if len(happenings) == 2:
            queue.append((trials[3],))
    assert [type(one).__name__ for one in happenings] == ["Begun", "Outcome", "Begun", "Outcome"]
