"""Streams: scores on every task behind every task, with one delta or many, and a backbone that is what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import InvalidValue, UnknownName
from deltatune.study.experiments import experiments
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.experiments.forgetting import FT, ON, OWN, RING
from deltatune.study.procedures import procedures, stages, stream
from deltatune.study.trial import Trial
from deltatune.tasks import Rows, Task, TaskData, Template, Verbalizer
from deltatune.training.run import Run, method_from_dict
from deltatune.training.settings import Settings
from tests.study.made_up_numbers import evidence, record
from tests.training import tiny

NAMES = ["bbc-news", "ag-news", "subj"]
"""Names that are known; made-up tasks are put in their places, with the same texts and other words for the answers."""


def task(name: str) -> TaskData:
    turn = NAMES.index(name)
    words = (*tiny.LABELS[turn:], *tiny.LABELS[:turn])
    made = Task(name, "classification", ("text",), "label", labels=tiny.LABELS, templates=(Template("{text} Topic:", Verbalizer(words)),))
    train, test = (Rows({"text": rows["text"], "label": rows["label"]}) for rows in (tiny.rows(36, turn), tiny.rows(24, 9)))
    return TaskData(made, train, test, test, "made up")


@pytest.fixture(autouse=True)
def made_up_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "load_data", lambda name, settings: task(name))


def trial(place: Path, method: str = "lora", backbone: str = "llama", first: str = "bbc-news", **options: Any) -> Trial:
    settings = Settings(max_steps=6, batch_size=8, lr=2e-2, evaluations=1)
    run = Run(tiny.folder(backbone, place), first, (method_from_dict({"name": method}),), settings=settings)
    return Trial(run, method, "stream", options={"tasks": NAMES, **options})


@pytest.mark.parametrize(("method", "backbone"), [("full", "llama"), ("lora", "bert")])
def test_one_delta_trains_on(method: str, backbone: str, tmp_path: Path) -> None:
    outcome = procedures["stream"](trial(tmp_path, method, backbone, first="ag-news"), tmp_path / "t")
    numbers = outcome.numbers
    assert [one["task"] for one in numbers["stages"]] == ["ag-news", "subj", "bbc-news"]
    assert [len(row) for row in numbers["matrix"]] == [1, 2, 3]
    assert [row[-1] for row in numbers["matrix"]] == [one["score"] for one in numbers["stages"]]
    assert numbers["score"] == pytest.approx(sum(numbers["matrix"][-1]) / 3)
    assert numbers["forgetting"] == stream.forgetting(numbers["matrix"])
    assert numbers["backbone"]["restored"] and numbers["backbone"]["before"] == numbers["backbone"]["after"]
    assert [entry["step"] for entry in outcome.history if "eval_score" in entry] == [6, 12, 18]


def test_deltas_of_their_own_forget_nothing(tmp_path: Path) -> None:
    numbers = procedures["stream"](trial(tmp_path, deltas="own"), tmp_path / "t").numbers
    assert numbers["forgetting"] == 0.0 and numbers["backbone"]["restored"]
    assert numbers["matrix"][2] == [row[-1] for row in numbers["matrix"]]
    alone = procedures["stream"](trial(tmp_path, first="subj", most=1), tmp_path / "alone").numbers
    assert alone["score"] == numbers["matrix"][2][2] and alone["forgetting"] is None


def test_a_trace_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = stream.detach

    def careless(delta: Any) -> None:
        original(delta)
        next(delta.backbone.parameters()).data[0] += 1e-3

    monkeypatch.setattr(stream, "detach", careless)
    told = procedures["stream"](trial(tmp_path, most=1), tmp_path / "t").numbers["backbone"]
    assert not told["restored"] and told["before"] != told["after"]


@pytest.mark.parametrize("deltas", ["same", "own"])
def test_a_killed_stream_goes_on(deltas: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = trial(tmp_path, deltas=deltas)
    whole = procedures["stream"](asked, tmp_path / "whole")
    original, calls = stages.dt_train, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1].task.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(stages, "dt_train", killed)
    with pytest.raises(KeyboardInterrupt):
        procedures["stream"](asked, tmp_path / "t")
    again = procedures["stream"](asked, tmp_path / "t")
    assert calls == [*NAMES, "subj"]
    assert again.numbers["matrix"] == whole.numbers["matrix"] and again.numbers["backbone"] == whole.numbers["backbone"]


def test_what_cannot_be_a_stream(tmp_path: Path) -> None:
    for options in ({"tasks": "ag-news"}, {"tasks": ["ag-news"]}, {"deltas": "none"}, {"most": 0}):
        with pytest.raises(InvalidValue, match="It wants a list of names with `bbc-news` among them"):
            procedures["stream"](trial(tmp_path, **options), tmp_path / "t")
    with pytest.raises(UnknownName):
        procedures["stream"](trial(tmp_path, tasks=["bbc-news", "no-such"]), tmp_path / "t")


FULL = experiments["forgetting"].study("full")


def streams(on: float, full: float = 0.3, own: float = 0.0, restored: bool = True, orders: int = 6) -> Evidence:
    """What is forgotten by deltas that train on, by full fine-tuning, and with a delta a task."""
    found = []
    for number, first in enumerate(RING[:orders]):
        for method in (FT, *ON, OWN):
            gone = {FT: full, OWN: own}.get(method, on) + (0.001 * number if method != OWN else 0.0)
            numbers = {"forgetting": gone, "matrix": [[0.8]], "backbone": {"restored": restored}}
            found.append(record(method, first, 0.8 - gone, numbers=numbers))
    return evidence(FULL, found)


def test_forgetting_is_judged() -> None:
    def verdicts(found: Evidence) -> list[str]:
        return [claim.judge(found).verdict for claim in experiments["forgetting"].claims]

    assert verdicts(streams(on=0.1)) == ["holds", "holds", "holds"]
    assert verdicts(streams(on=0.4, own=0.1, full=0.05)) == ["does not hold"] * 3
    assert verdicts(streams(on=0.3, restored=False)) == ["undecided", "does not hold", "holds"]
    assert verdicts(streams(on=0.1, orders=3)) == ["undecided"] * 3
