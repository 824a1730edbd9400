"""Stacks: a language from plain text, frozen, a task on top; and another language in its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import deltatune as dt
from deltatune.errors import InvalidValue, UnknownName, Unsupported
from deltatune.study.experiments import experiments, languages
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.procedures import procedures, stack, stages
from deltatune.study.trial import Trial
from deltatune.training.run import Run, method_from_dict
from deltatune.training.settings import Settings
from tests.study.made_up_numbers import evidence, record
from tests.study.test_stream import task
from tests.training import tiny

RECIPES: list[dict[str, Any]] = [{"name": "invertible-adapter"}, {"name": "pfeiffer-adapter"}, {"name": "pfeiffer-adapter"}]
ONE, OTHER = {"task": "ag-news", "column": "text"}, {"task": "subj", "column": "text"}


@pytest.fixture(autouse=True)
def made_up_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "load_data", lambda name, settings=None: task(name))


def trial(place: Path, **options: Any) -> Trial:
    settings = Settings(max_steps=4, batch_size=8, lr=2e-2, evaluations=1)
    methods = tuple(map(method_from_dict, RECIPES if {"language", "then"} & options.keys() else RECIPES[-1:]))
    return Trial(Run(tiny.folder("llama", place), "bbc-news", methods, settings=settings), "stacked", "stack", options=options)


def test_a_task_on_top_of_a_language(tmp_path: Path) -> None:
    outcome = procedures["stack"](trial(tmp_path, language=ONE, steps=12), tmp_path / "t")
    told = outcome.numbers["languages"]["ag-news.text"]
    assert told["after"] < told["before"]
    assert outcome.numbers["metric"] == "accuracy" and outcome.numbers["steps"] == 12 + 4
    model, _, _ = dt.open(tmp_path / "t" / "language" / "delta")
    assert [delta.budget().delta > 0 for delta in dt.deltas(model)] == [True, True]
    alone = procedures["stack"](trial(tmp_path), tmp_path / "alone").numbers
    assert alone["languages"] == {} and alone["trainable_parameters"] < outcome.numbers["trainable_parameters"]


def test_a_language_changes_below_a_task(tmp_path: Path) -> None:
    asked = trial(tmp_path, language=ONE, then=OTHER, source={"bbc-news": "subj"})
    numbers = procedures["stack"](asked, tmp_path / "t").numbers
    assert list(numbers["languages"]) == ["ag-news.text", "subj.text"]
    kept = procedures["stack"](trial(tmp_path, language=ONE, source={"bbc-news": "subj"}), tmp_path / "kept").numbers
    assert numbers["steps"] == 12 and kept["steps"] == 8
    assert numbers["score"] != kept["score"] or numbers["metrics"] != kept["metrics"]


def test_a_killed_stack_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = trial(tmp_path, language=ONE, then=OTHER)
    whole = procedures["stack"](asked, tmp_path / "whole")
    original, calls = stages.dt_train, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(stages, "dt_train", killed)
    with pytest.raises(KeyboardInterrupt):
        procedures["stack"](asked, tmp_path / "t")
    again = procedures["stack"](asked, tmp_path / "t")
    assert calls == ["language", "task", "then", "then"]
    assert again.numbers["metrics"] == whole.numbers["metrics"] and again.numbers["languages"] == whole.numbers["languages"]


def test_a_task_in_words_on_top_of_plain_text(tmp_path: Path) -> None:
    """The framing of the task is not that of the texts; a head takes no language below it."""
    asked = trial(tmp_path, language=ONE)

    def framed(name: str) -> Trial:
        return dataclasses.replace(
            asked, run=dataclasses.replace(asked.run, settings=dataclasses.replace(asked.run.settings, framing=name))
        )

    assert procedures["stack"](framed("text2text"), tmp_path / "t").numbers["metric"] == "accuracy"
    with pytest.raises(Unsupported, match="a language is learnt by the next token"):
        procedures["stack"](framed("head"), tmp_path / "head")


def test_what_cannot_be_stacked(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"language": "german"}, {"then": {"task": "subj"}}, {"source": "subj"}, {"steps": 0}]
    for options in wrong:
        with pytest.raises(InvalidValue, match="It wants `language` and `then` as"):
            procedures["stack"](trial(tmp_path, **options), tmp_path / "t")
    with pytest.raises(UnknownName):
        procedures["stack"](trial(tmp_path, language={"task": "no-such", "column": "text"}), tmp_path / "t")
    with pytest.raises(InvalidValue, match="`subj` has no column `de`"):
        procedures["stack"](trial(tmp_path, language={"task": "subj", "column": "de"}), tmp_path / "t")


FULL = experiments["languages"].study("full")


def stacks(seeds: int = 3, **worth: float) -> Evidence:
    """Scores of the stacks by their names, each a little better with each seed."""
    named = {getattr(languages, name): value for name, value in worth.items()}
    found = [
        record(method, name, value + 0.01 * seed, seed=seed)
        for method, value in named.items()
        for name in languages.SOURCES
        for seed in range(seeds)
    ]
    return evidence(FULL, found)


def test_languages_are_judged() -> None:
    def verdicts(found: Evidence) -> list[str]:
        return [claim.judge(found).verdict for claim in experiments["languages"].claims]

    assert verdicts(stacks(ON_GERMAN=0.8, ALONE=0.7, ON_ENGLISH=0.75, KEPT=0.4, CHANGED=0.5)) == ["holds"] * 3
    assert verdicts(stacks(ON_GERMAN=0.7, ALONE=0.8, ON_ENGLISH=0.75, KEPT=0.5, CHANGED=0.4)) == ["does not hold"] * 3
    assert verdicts(stacks(ON_GERMAN=0.7, ALONE=0.7, ON_ENGLISH=0.7, KEPT=0.5, CHANGED=0.5)) == ["undecided"] * 3
    assert verdicts(stacks(seeds=2, ON_GERMAN=0.8, ALONE=0.7, ON_ENGLISH=0.75, KEPT=0.4, CHANGED=0.5)) == ["undecided"] * 3
