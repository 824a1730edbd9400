"""``elsewhere``: train, open the finished run anew, and score it on further rows: those it was trained on, and other tasks'."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltatune.errors import InvalidValue
from deltatune.study.procedures.procedure import procedures
from deltatune.study.procedures.train import RUN, train
from deltatune.study.trial import Outcome, Trial
from deltatune.tasks import Rows, Task, get_task
from deltatune.tasks.framing import Framing
from deltatune.tasks.sampling import subset
from deltatune.training.evaluation import score_rows
from deltatune.training.job import check_module, choose_framing, kind_of
from deltatune.training.predict import Predictor
from deltatune.training.run import Run, load_data
from deltatune.training.train import sampled

TRAIN = "train"
"""Stands for rows of the run's own training."""

AS_TRAINED, AS_ITSELF = "as trained", "as itself"
ASKED = (AS_TRAINED, AS_ITSELF)
"""How another task is put: with the run's own head or label words, or with its own template and words."""


TRANSLATED = ("classification", "regression")
"""Types whose rows can be put as another task's."""


@dataclass(frozen=True)
class Place:
    """Where else a delta is scored.

    Attributes:
        task: its name, or ``train``.
        labels: its labels -> the run's, where they are called otherwise.
    """

    task: str
    labels: Mapping[str, str]


@procedures.register("elsewhere")
def elsewhere(trial: Trial, folder: Path) -> Outcome:
    """``train``, then a score on each place of ``also``, in ``numbers["also"]``: name -> metric, score and number of rows.

    Options:
        also: ``train``, which takes as many training rows as there are test rows; names of tasks, which take their test rows; or
            ``{task: name, labels: {theirs: ours}}``. Or a mapping from the run's task to such a list.
        asked: how other tasks are put: ``as trained``, by the run's own head or label words, or ``as itself``, each by its own words.

    Raises:
        InvalidValue: options that cannot be, or a task that the run's head or words do not fit.
        UnknownName: a task nobody knows.
    """
    began = time.perf_counter()
    wanted, asked = places(trial)
    outcome = train(trial, folder)
    predictor, run = Predictor.open(folder / RUN), trial.run
    also: dict[str, Any] = {}
    for place in wanted:
        framing, rows = put(predictor, run, place, asked)
        values = score_rows(framing, predictor.backbone, rows, run.settings.eval_batch_size)
        also[place.task] = {"metric": framing.task.metric, "score": values["score"], "rows": len(rows)}
    return replace(outcome, numbers={**outcome.numbers, "also": also}, seconds=round(time.perf_counter() - began, 3))


def places(trial: Trial) -> tuple[list[Place], str]:
    """What the options ask for.

    Raises:
        InvalidValue: they cannot be.
        UnknownName: a task nobody knows.
    """
    told, asked = trial.options.get("also"), trial.options.get("asked", AS_TRAINED)
    if isinstance(told, Mapping):
        told = told.get(trial.task)
    if not isinstance(told, Sequence) or isinstance(told, str) or asked not in ASKED:
        raise InvalidValue(
            f"The procedure `elsewhere` of `{trial.said}` was given `also: {trial.options.get('also')}` and `asked: {asked}`. It wants a "
            f"list of `train`, names of tasks, or {{task, labels}}, or such a list for the task `{trial.task}`; and {' or '.join(ASKED)}."
        )
    found = [_place(one, trial) for one in told]
    for place in found:
        if place.task != TRAIN:
            get_task(place.task)  # ahead of hours of training
    return found, asked


def _place(told: Any, trial: Trial) -> Place:
    if isinstance(told, str):
        return Place(told, {})
    if not isinstance(told, Mapping) or not isinstance(told.get("task"), str) or not isinstance(told.get("labels", {}), Mapping):
        raise InvalidValue(
            f"`also` of `{trial.said}` has the entry {told!r}. Write a task's name, or {{task: name, labels: {{theirs: ours}}}}."
        )
    return Place(told["task"], dict(told.get("labels", {})))


def put(predictor: Predictor, run: Run, place: Place, asked: str) -> tuple[Framing, Rows]:
    """How the rows of a place are put to the model, and the rows.

    Raises:
        InvalidValue: the run's head or words do not fit them.
    """
    settings = run.settings
    if place.task == TRAIN:
        data = sampled(load_data(run.task, settings), settings)
        most = min(len(data.test), settings.test_rows or len(data.test))
        return predictor.framing, subset(data.task, data.train, most, settings.seed)
    data = load_data(place.task)
    rows = subset(data.task, data.test, settings.test_rows) if settings.test_rows else data.test
    if asked == AS_TRAINED:
        return predictor.framing, translated(rows, data.task, predictor.framing.task, place.labels)
    framing = choose_framing(data.task, kind_of(predictor.backbone), settings, predictor.tokenizer)
    check_module(predictor.backbone, framing, settings)
    return framing, rows


def translated(rows: Rows, task: Task, own: Task, names: Mapping[str, str]) -> Rows:
    """Rows of another task as the run's own task has them: its columns by their order, its labels by their names.

    Args:
        rows: of ``task``.
        task: the other one.
        own: the run's.
        names: its labels -> the run's; others are called alike, capital letters aside.

    Raises:
        InvalidValue: another type or number of columns, or labels that the run does not know.
    """
    called = {name: names.get(name, name) for name in task.labels}
    known = {name.lower(): index for index, name in enumerate(own.labels)}
    unknown = [name for name, ours in called.items() if ours.lower() not in known]
    alike = task.type == own.type and task.type in TRANSLATED and len(task.text) == len(own.text) and not own.parts
    if unknown or not alike:
        raise InvalidValue(
            f"A run on {_said(own)} cannot be asked {_said(task)}. Take a task of the same type with labels of the same names, say what "
            "they are called (`labels`), or ask it by its own words (`asked: as itself`)."
        )
    order = [known[ours.lower()] for ours in called.values()]
    labels = [order[value] if order else value for value in rows[task.label]]
    return Rows({**{ours: rows[theirs] for ours, theirs in zip(own.text, task.text, strict=True)}, own.label: labels})


def _said(task: Task) -> str:
    return f"`{task.name}` ({task.type}, {len(task.text)} texts, labels {', '.join(task.labels) or 'none'})"
