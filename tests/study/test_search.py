"""Learning rates are searched under one budget for all methods; the search goes on where it was, and its best rate is used."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from deltatune.errors import InvalidValue
from deltatune.study.design import Study
from deltatune.study.procedures import procedures
from deltatune.study.search import searches_of
from deltatune.study.store.store import Store
from deltatune.study.trial import Outcome, Trial
from tests.study.conftest import driver
from tests.study.made_up import design, outcome

GOAL = {"lora": 4e-3, "bitfit": 2e-3}
"""The rates that are best here; the methods' own are lower."""

CALLS: list[Trial] = []


def scored(trial: Trial, folder: Path) -> Outcome:
    """The nearer the rate is to the goal, the better."""
    CALLS.append(trial)
    lr = trial.run.settings.lr
    if lr is None:
        return outcome(trial)
    found = 1 - abs(math.log10(lr / GOAL[trial.label])) / 2
    if lr > 5 * GOAL[trial.label]:
        raise InvalidValue("diverged")
    return replace(outcome(trial, score=found), history=({"step": 1, "eval_score": found},))


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two methods with a search of six rates each, on two tasks."""
    monkeypatch.setitem(procedures._entries, "train", scored)
    monkeypatch.setitem(procedures._entries, "untrained", lambda trial, folder: outcome(trial))
    CALLS.clear()
    return design(tasks=["bbc-news", "glue-rte"], methods=["lora", "bitfit"], rates={"trials": 6, "tasks": ["bbc-news", "glue-rte"]})


def test_every_method_has_the_same_budget(study: Study, tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    store.add(study)
    progress = driver(store, study, tmp_path / "t").run()
    records = store.records(study.name)
    searched = [record for record in records if record.purpose == "search"]
    assert progress.total == len(records) == 8 + 2 * 6 * 2
    assert [sum(record.method == name for record in searched) for name in GOAL] == [12, 12]
    for name, goal in GOAL.items():
        own = {record.lr: record.score for record in searched if record.method == name and record.score is not None}
        best = max(own, key=lambda lr: own[lr] or 0.0)
        used = {record.lr for record in records if record.method == name and record.purpose == "trial"}
        assert used == {best}
        assert abs(math.log10((best or 0.0) / goal)) < 0.5
    frozen = [record for record in records if record.method in ("frozen", "random-delta")]
    assert all(record.purpose == "trial" and record.state == "done" for record in frozen)


def test_a_search_goes_on_where_it_was(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, store = Store(tmp_path / "whole.db"), Store(tmp_path / "s.db")
    whole.add(study)
    driver(whole, study, tmp_path / "t").run()
    rates = [trial.run.settings.lr for trial in CALLS]
    CALLS.clear()

    def stopped(trial: Trial, folder: Path) -> Outcome:
        if len(CALLS) == 7:
            raise KeyboardInterrupt
        return scored(trial, folder)

    store.add(study)
    monkeypatch.setitem(procedures._entries, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        driver(store, study, tmp_path / "u").run()
    monkeypatch.setitem(procedures._entries, "train", scored)
    driver(store, study, tmp_path / "u").run()
    assert sorted(trial.run.settings.lr or 0 for trial in CALLS) == sorted(rate or 0 for rate in rates)
    assert {record.key: record.lr for record in store.records(study.name)} == {
        record.key: record.lr for record in whole.records(study.name)
    }


def test_the_first_rate_is_the_methods_own(study: Study) -> None:
    search = searches_of(study)["minilm", "lora"]
    first, second = search.next()
    assert first.run.settings.lr == second.run.settings.lr == search.own
    assert (first.task, second.task) == ("bbc-news", "glue-rte")
    assert first.run.settings.test_rows == 1 and first.key != second.key
    search.take(first, [{"step": 1, "eval_score": 0.5}])
    assert list(search.next()) == []  # the other task is still being tried
    search.take(second, None)
    assert len(list(search.next())) == 2
    assert search.best == search.own
