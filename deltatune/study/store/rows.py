"""Rows of a store's tables, found by the names people use, and as values of ours."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from deltatune.errors import UnknownName, nearest
from deltatune.study.record import Record
from deltatune.study.store.schema import DONE, WAITING, AttemptRow, StudyRow, TrialRow
from deltatune.study.trial import Trial


def study_row(session: Session, name: str) -> StudyRow:
    """The row of a study.

    Raises:
        UnknownName: there is none of that name.
    """
    row = session.scalar(select(StudyRow).where(StudyRow.name == name))
    if row is None:
        known = list(session.scalars(select(StudyRow.name)))
        hint = nearest(name, known) if known else "There is none yet: `deltatune study run FILE` begins one."
        raise UnknownName(f"The store has no study called `{name}`. {hint}")
    return row


def trials_of(session: Session, name: str) -> Select[TrialRow]:
    """The question for the trials of a study."""
    return select(TrialRow).where(TrialRow.study_id == study_row(session, name).id)


def trial_row(session: Session, name: str, key: str) -> TrialRow:
    """The row of a trial.

    Raises:
        UnknownName: the study or the trial is not there.
    """
    row = session.scalar(trials_of(session, name).where(TrialRow.key == key))
    if row is None:
        raise UnknownName(f"The study `{name}` has no trial `{key}`. `deltatune study status {name} --json` lists them.")
    return row


def new_row(study: int, position: int, trial: Trial) -> TrialRow:
    """The row of a trial that waits."""
    return TrialRow(
        study_id=study,
        key=trial.key,
        position=position,
        purpose=trial.purpose,
        procedure=trial.procedure,
        backbone=trial.backbone,
        task=trial.task,
        category=trial.category,
        method=trial.label,
        seed=trial.seed,
        cell=dict(trial.cell),
        asked=json.loads(json.dumps(trial.to_dict(), default=str)),
        lr=rate_of(trial),
        state=WAITING,
    )


def rate_of(trial: Trial) -> float:
    """The learning rate that was asked for, or the methods' own."""
    given = trial.run.settings.lr
    return min(method.learning_rate for method in trial.run.methods) if given is None else given


def record_of(row: TrialRow, attempts: Sequence[AttemptRow]) -> Record:
    """A trial and its attempts, flat."""
    last = attempts[-1] if attempts else None
    same = ("key", "backbone", "task", "category", "method", "seed", "cell", "procedure", "purpose", "state", "score", "low", "high", "lr")
    more = ("trained", "total", "steps", "tokens", "seconds", "training_seconds", "seconds_per_step", "peak_memory_bytes", "delta_bytes")
    return Record(
        **{name: getattr(row, name) for name in (*same, *more)},
        metric=row.metric or "",
        degenerate=bool(row.degenerate),
        numbers=row.numbers or {},
        error=f"{last.error}: {last.message}" if last is not None and last.error and row.state != DONE else None,
        attempts=len(attempts),
        machine=last.surroundings_id if last is not None else None,
    )
